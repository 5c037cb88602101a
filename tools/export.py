"""A trained model for other runtimes: python -m tools.export onnx|torch --resume CHECKPOINT --out FILE.

The file takes any batch and picture size, holds its class names and picture settings, and is compared with the
model on real pictures before the command ends.
"""
import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from common.errors import UserError
from common.log import logger
from datasets.images import decode_path
from models.export import SMALLEST_SIDE, export_onnx, exported_program, onnx_function
from tools.command import run_command
from tools.loading import Trained, load_trained
from tools.predict import find_pictures

TOLERANCE = 1e-4  # of the logits in float32, relative to the largest where that is above 1
PICTURES = 8


def settings(trained: Trained, softmax: bool) -> dict[str, str]:
    """What a user of the file has to know, as texts: ONNX keeps no other values."""
    values = {"model": trained.name, "classes": trained.classes, "input_size": trained.input_size,
              "crop_pct": trained.crop_pct or (1.0 if trained.input_size >= 384 else 0.875),
              "mean": trained.mean, "std": trained.std, "interpolation": "bicubic",
              "output": "probabilities" if softmax else "logits"}
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}


def check_pictures(trained: Trained, given: list[str]) -> Tensor:
    """Float32 (N, 3, size, size) of up to eight of the given pictures, or of scikit-learn's handwritten digits."""
    if given:
        pictures = [decode_path(path) for path in find_pictures(given)[:PICTURES]]
    else:
        from sklearn.datasets import load_digits
        pictures = [Image.fromarray((digit * 15.9375).astype("uint8")).convert("RGB") for digit in load_digits().images[:PICTURES]]
    return torch.stack([trained.transform()(picture) for picture in pictures])


def compare(trained: Trained, exported: Callable[[Tensor], Tensor], pictures: Tensor, softmax: bool) -> float:
    """Largest difference from the model over a batch, single pictures, and two other sizes. Raises UserError."""
    side, found = trained.input_size, []
    other = torch.nn.functional.interpolate(pictures[:2], (side + 32, side + 64))
    for images in (pictures, pictures[:1], other, other[:1].transpose(2, 3).contiguous()):
        with torch.inference_mode():
            wanted = trained.model(images).softmax(-1) if softmax else trained.model(images)
        difference = (exported(images) - wanted).abs().max().item()
        found.append(difference / max(1.0, wanted.abs().max().item()))
    if not all(difference <= TOLERANCE for difference in found):  # true for not-a-number, too
        raise UserError(f"the exported model differs from the model by {max(found):.1e}, more than {TOLERANCE:.0e}: "
                        "the file is not to be used; report this with the versions of torch and onnxruntime.")
    return max(found)


def export(trained: Trained, kind: str, out: Path, softmax: bool = False) -> Callable[[Tensor], Tensor]:
    """Write the file and return it as a function of pictures, loaded back from the disk."""
    program, about = exported_program(trained.model, trained.input_size, softmax), settings(trained, softmax)
    out.parent.mkdir(parents=True, exist_ok=True)
    if kind == "onnx":
        export_onnx(program, out, about)
        return onnx_function(out)
    torch.export.save(program, out, extra_files=about)
    return torch.export.load(out).module()


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.export", allow_abbrev=False, description="A trained model for other runtimes.",
        epilog="example: python -m tools.export onnx --resume runs/mine/checkpoint-best.pth --out hornet.onnx")
    add = parser.add_argument
    add("kind", choices=["onnx", "torch"], help="onnx: for ONNX Runtime and others; torch: torch.export, .pt2")
    add("--resume", help="checkpoint file or https address (default: the published weights of --model)")
    add("--model", help="name of the model; needed only where the checkpoint does not say it")
    add("--weights", default="auto", choices=["auto", "model", "ema"],
        help="which weights of the checkpoint; auto: those that it says were best (default)")
    add("--out", help="file to write (default: MODEL.onnx or MODEL.pt2 here)")
    add("--softmax", action="store_true", help="let the file give probabilities instead of logits")
    add("--input_size", type=int, help="side in pixels that the file is compared at (default: the checkpoint's)")
    add("--pictures", nargs="+", default=[], metavar="PATH",
        help="pictures to compare on (default: scikit-learn's handwritten digits)")
    return parser


def run(args: argparse.Namespace) -> int:
    trained = load_trained(args.model, args.resume, args.weights, args.input_size)
    if trained.input_size < SMALLEST_SIDE:
        logger.info("%s works on pictures of %d pixels, exported files on %d and more: the file says %d.", trained.name,
                    trained.input_size, SMALLEST_SIDE, SMALLEST_SIDE)
        trained = replace(trained, input_size=SMALLEST_SIDE)
    pictures = check_pictures(trained, args.pictures)
    out = Path(args.out or f"{trained.name}.{'onnx' if args.kind == 'onnx' else 'pt2'}")
    exported = export(trained, args.kind, out, args.softmax)
    worst = compare(trained, exported, pictures, args.softmax)
    logger.info("wrote %s (%.1f MB): %s, input `images` float32 (batch, 3, height, width), sides from %d pixels on",
                out, out.stat().st_size / 1e6, trained.name, SMALLEST_SIDE)
    logger.info("compared on %d pictures and at two other sizes: largest difference %.1e, allowed %.0e", len(pictures),
                worst, TOLERANCE)
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_command(arguments(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
