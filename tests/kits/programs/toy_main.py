"""Stands in for main.py in tests of the launcher: the toy training with main.py's way of taking options.

    toy_main.py [--config FILE] --output_dir DIR --updates N [--faults "raise=1@5 pace=0.1"] [--print_config
    true]
"""
import argparse
import sys
from pathlib import Path

import yaml


def main() -> int:
    p = argparse.ArgumentParser()
    p.add_argument("--config")
    p.add_argument("--output_dir", default="")
    p.add_argument("--device")
    p.add_argument("--updates", default="20")
    p.add_argument("--faults", default="")
    p.add_argument("--print_config", default="")
    options = p.parse_args()
    if options.print_config:
        recipe = yaml.safe_load(Path(options.config).read_text()) if options.config else {}
        output_dir = options.output_dir or recipe.get("output_dir")
        yaml.safe_dump({"output_dir": output_dir, "device": options.device}, sys.stdout)
        return 0
    import toy_training  # with PyTorch, so only where it is needed

    return toy_training.main([options.output_dir, options.updates, *options.faults.split()])


if __name__ == "__main__":
    sys.exit(main())
