"""A trained model for other runtimes: python -m tools.export onnx|torch --resume CHECKPOINT --out FILE.

The file takes any batch and image size, holds its class names and image settings, and is compared with the
model before the command ends.
"""
import argparse
import json
import sys
from pathlib import Path

import torch
from timm.data import resolve_data_config

from common.log import logger
from common.text import file_size
from models import export
from tools.command import add_model_arguments, load_model, new_parser, run_command


def arguments() -> argparse.ArgumentParser:
    parser = new_parser("export", "A trained model for other runtimes.", "onnx --resume runs/mine")
    add = parser.add_argument
    add("kind", choices=["onnx", "torch"], help="onnx: for ONNX Runtime and others; torch: torch.export")
    add_model_arguments(parser)
    add("--out", help="file to write (default: MODEL.onnx or MODEL.pt2 here)")
    return parser


def run(args: argparse.Namespace) -> int:
    trained = load_model(args)
    side = max(trained.settings.input_size, export.SMALLEST_SIDE)
    settings = resolve_data_config(model=trained.model)
    out = Path(args.out or f"{trained.name}.{'onnx' if args.kind == 'onnx' else 'pt2'}")
    out.parent.mkdir(parents=True, exist_ok=True)
    # What a user of the file has to know, as texts: ONNX keeps no other values.
    about = {"model": trained.name, "classes": trained.classes, "input_size": side, "output": "logits",
             **{name: settings[name] for name in ("crop_pct", "mean", "std", "interpolation")}}
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()}
    program = export.exported_program(trained.model, side)
    if args.kind == "onnx":
        export.export_onnx(program, out, texts)
        exported = export.onnx_function(out)
    else:
        torch.export.save(program, out, extra_files=texts)
        exported = torch.export.load(out).module()
    worst = export.check_exported(trained.model, exported, side)
    logger.info("wrote %s (%s): %s for images of %d pixels, input `images` float32 (batch, 3, height, width) "
                "with sides from %d on; largest difference from the model %.1e, allowed %.0e",
                out, file_size(out.stat().st_size), trained.name, side, export.SMALLEST_SIDE, worst,
                export.TOLERANCE)
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_command(arguments(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
