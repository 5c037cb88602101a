"""A trained model for other runtimes: python -m tools.export onnx|torch --resume CHECKPOINT --out FILE.

The file takes any batch and image size, holds its class names and image settings, and is compared with the
model on real images before the command ends.
"""
import argparse
import json
import sys
from pathlib import Path

import torch
from PIL import Image
from sklearn.datasets import load_digits
from timm.data import resolve_data_config

from common.log import logger
from common.text import file_size
from datasets.images import decode_path
from models import export
from models.export import SMALLEST_SIDE
from models.trained import Trained
from tools.command import add_model_arguments, load_model, new_parser, run_command
from tools.predict import find_images

IMAGES = 8  # to compare on


def about(trained: Trained, softmax: bool) -> dict[str, str]:
    """What a user of the file has to know, as texts: ONNX keeps no other values."""
    settings = resolve_data_config(model=trained.model)
    values = {"model": trained.name, "classes": trained.classes, "input_size": trained.settings.input_size,
              "output": "probabilities" if softmax else "logits",
              **{name: settings[name] for name in ("crop_pct", "mean", "std", "interpolation")}}
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}


def example_images(trained: Trained, given: list[str]) -> torch.Tensor:
    """Float32 (N, 3, size, size) of up to eight of the given images, or scikit-learn's handwritten digits."""
    if given:
        images = [decode_path(path) for path in find_images(given)[:IMAGES]]
    else:
        digits, _ = load_digits(return_X_y=True)  # (1797, 64) in 0..16
        pixels = (digits[:IMAGES].reshape(-1, 8, 8) * 15.9375).astype("uint8")
        images = [Image.fromarray(image).convert("RGB") for image in pixels]
    return torch.stack([trained.transform(image) for image in images])


def arguments() -> argparse.ArgumentParser:
    parser = new_parser("export", "A trained model for other runtimes.", "onnx --resume runs/mine")
    add = parser.add_argument
    add("kind", choices=["onnx", "torch"], help="onnx: for ONNX Runtime and others; torch: torch.export")
    add_model_arguments(parser)
    add("--out", help="file to write (default: MODEL.onnx or MODEL.pt2 here)")
    add("--softmax", action="store_true", help="let the file give probabilities instead of logits")
    add("--images", "--pictures", nargs="+", default=[], metavar="PATH",
        help="images to compare on (default: scikit-learn's handwritten digits)")
    return parser


def run(args: argparse.Namespace) -> int:
    trained = load_model(args)
    if trained.settings.input_size < SMALLEST_SIDE:
        logger.info("%s works on images of %d pixels, exported files on %d and more: the file says %d.",
                    trained.name, trained.settings.input_size, SMALLEST_SIDE, SMALLEST_SIDE)
        args.input_size = SMALLEST_SIDE
        trained = load_model(args)
    images = example_images(trained, args.images)
    out = Path(args.out or f"{trained.name}.{'onnx' if args.kind == 'onnx' else 'pt2'}")
    out.parent.mkdir(parents=True, exist_ok=True)
    program = export.exported_program(trained.model, trained.settings.input_size, args.softmax)
    if args.kind == "onnx":
        export.export_onnx(program, out, about(trained, args.softmax))
        exported = export.onnx_function(out)
    else:
        torch.export.save(program, out, extra_files=about(trained, args.softmax))
        exported = torch.export.load(out).module()
    worst = export.check_exported(trained.model, exported, images, args.softmax)
    logger.info("wrote %s (%s): %s, input `images` float32 (batch, 3, height, width), sides from %d pixels",
                out, file_size(out.stat().st_size), trained.name, SMALLEST_SIDE)
    logger.info("compared on %d images and at two other sizes: largest difference %.1e, allowed %.0e",
                len(images), worst, export.TOLERANCE)
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_command(arguments(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
