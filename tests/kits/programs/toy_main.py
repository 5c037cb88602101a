"""Stands in for main.py in tests of the launcher: the toy training with main.py's way of taking options.

    toy_main.py [--config FILE] --output_dir DIR --updates N [--faults "raise=1@5 pace=0.1"] [--print_config
    true]
"""
import argparse
import sys
from pathlib import Path

import yaml

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name in ("config", "output_dir", "device", "updates", "faults", "print_config"):
        parser.add_argument(f"--{name}", default="20" if name == "updates" else "")
    options = parser.parse_args()
    if options.print_config:
        recipe = yaml.safe_load(Path(options.config).read_text()) if options.config else {}
        output_dir = options.output_dir or recipe.get("output_dir")
        yaml.safe_dump({"output_dir": output_dir, "device": options.device or None}, sys.stdout)
    else:
        import toy_training  # with PyTorch, so only where it is needed

        sys.exit(toy_training.main([options.output_dir, options.updates, *options.faults.split()]))
