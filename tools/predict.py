"""What a trained model sees in images: python -m tools.predict PATH... --resume CHECKPOINT.

Folders are searched for images. Class names and image settings come from the checkpoint; files that are no
readable images are reported and skipped.
"""
import argparse
import io
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

import native
from common.errors import UserError
from common.log import logger
from common.outcome import ExitCode
from common.text import printable
from datasets.images import BadImage, decode, extensions, is_image, read_file
from launch.process import choose_device
from models.inspect import heatmap, image_transforms, overlay, predict
from models.trained import Trained
from tools.command import add_model_arguments, load_model, new_parser, run_command


def find_images(given: list[str]) -> list[str]:
    """Files as given, and the images below folders in the order of their names; UserError for none."""
    found = []
    for path in given:
        inside = sorted(os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names
                        if is_image(name))
        found += inside if os.path.isdir(path) else [path]
    if not found:
        raise UserError(f"no images in {', '.join(map(printable, given))}; files that end in "
                        f"{', '.join(extensions())} are looked for.", code="missing_data")
    return found


def answers(trained: Trained, paths: list[str], *, topk: int, batch_size: int) -> list[dict]:
    """One record per file in order: path, error (None for a readable image), top (best class first)."""
    def read(path: str) -> torch.Tensor | str:
        try:
            return trained.transform(decode(read_file(path)))
        except BadImage as error:
            return str(error)

    records = []
    with ThreadPoolExecutor() as pool, tqdm(total=len(paths), unit="image", disable=None) as bar:
        for start in range(0, len(paths), batch_size):
            found = list(pool.map(read, paths[start:start + batch_size]))
            images = [image for image in found if isinstance(image, torch.Tensor)]
            predictions = iter(predict(trained.model, torch.stack(images), topk) if images else ())
            for path, image in zip(paths[start:], found):
                top = [] if isinstance(image, str) else [
                    {**p._asdict(), "class": trained.classes[p.index]} for p in next(predictions)]
                records.append({"path": path, "error": None if top else image, "top": top})
            bar.update(len(found))
    return records


def as_text(record: dict) -> str:
    """One answer as a line for people."""
    words = [f"{entry['name']} {entry['probability']:.1%}" for entry in record["top"]]
    return f"{printable(record['path'])}: {', '.join(words) or 'not readable: ' + record['error']}\n"


def write_heatmaps(trained: Trained, records: list[dict], folder: Path) -> None:
    """For each readable image, the part that the model sees with its Grad-CAM map, as NAME.heat.png."""
    folder.mkdir(parents=True, exist_ok=True)
    part, numbers = image_transforms(trained.model)
    for number, record in enumerate(records):
        if not record["error"]:
            seen = part(decode(read_file(record["path"])))
            name = f"{number:05d}.{printable(Path(record['path']).stem)[:100]}.heat.png"
            overlay(seen, heatmap(trained.model, numbers(seen))[0]).save(folder / name)


def arguments() -> argparse.ArgumentParser:
    parser = new_parser("predict", "What a trained model sees in images.", "photo.jpg --resume runs/mine")
    add = parser.add_argument
    add("paths", nargs="+", metavar="PATH", help="image files, and folders to search for images")
    add_model_arguments(parser)
    add("--topk", type=int, default=5, help="classes per image (default 5)")
    add("--out", default="text", choices=["text", "json"], help="format of the answers (default text)")
    add("--heatmap", metavar="DIR", help="also write images of where the model looks (Grad-CAM) to DIR")
    add("--batch_size", type=int, default=32, help="images at a time (default 32)")
    add("--device", default="cpu", help="cpu (default), cuda, mps, xpu, a numbered one as cuda:1, or auto")
    return parser


def run(args: argparse.Namespace) -> int:
    if min(args.topk, args.batch_size) < 1:
        raise UserError("--topk and --batch_size must be 1 or more.", code="invalid_value")
    paths = find_images(args.paths)
    trained = load_model(args, choose_device(args.device, 0, 1))
    native.attach(trained.model)
    records = answers(trained, paths, topk=args.topk, batch_size=args.batch_size)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names that the terminal's encoding lacks
    # JSON in ASCII, so that paths of any bytes come back as they were.
    text = "".join(map(as_text, records)) if args.out == "text" else json.dumps(records, indent=1) + "\n"
    sys.stdout.write(text)
    if args.heatmap:
        write_heatmaps(trained, records, Path(args.heatmap))
    read = sum(not record["error"] for record in records)
    logger.info("%d of %d images predicted with %s from %s", read, len(records), trained.name, trained.source)
    return ExitCode.DONE if read else ExitCode.FAILED


def main(argv: list[str] | None = None) -> int:
    return run_command(arguments(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
