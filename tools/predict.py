"""What a trained model says about pictures: python -m tools.predict PATH… --resume CHECKPOINT.

Folders are searched for pictures. Class names and picture settings come from the checkpoint; files that are no
readable pictures are reported and passed over.
"""
import argparse
import csv
import json
import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TextIO

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from common.errors import UserError
from common.log import logger
from datasets.images import EXTENSIONS, BadImage, decode_path, show
from launch.process import choose_device
from models.inspect import Prediction, heatmap, overlay, predict
from tools.command import run_command
from tools.loading import Trained, load_trained


class Pictures(Dataset):
    """Files as (index, float32 (3, size, size), error text); a bad file gives zeros and its reason."""

    def __init__(self, paths: list[str], trained: Trained):
        self.paths, self.size, self.transform = paths, trained.input_size, trained.transform()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor, str]:
        try:
            return index, self.transform(decode_path(self.paths[index])), ""
        except BadImage as error:
            return index, torch.zeros(3, self.size, self.size), str(error)


def find_pictures(given: list[str]) -> list[str]:
    """Files as given, and the pictures below folders in the order of their names. Raises UserError for none."""
    found = []
    for path in given:
        if os.path.isdir(path):
            inside = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]
            found += sorted(name for name in inside if name.lower().endswith(EXTENSIONS))
        elif os.path.exists(path):
            found.append(path)
        else:
            raise UserError(f"{show(path)} does not exist; give picture files or folders of pictures.")
    if not found:
        raise UserError(f"no pictures in {', '.join(map(show, given))}; files that end in {', '.join(EXTENSIONS)} "
                        "are looked for.")
    return found


def answers(trained: Trained, paths: list[str], topk: int, batch_size: int,
            workers: int = 0) -> Iterator[tuple[str, list[Prediction], str]]:
    """(path, best classes first, error) for each file in order; the error is "" for a readable picture."""
    loader = DataLoader(Pictures(paths, trained), batch_size, num_workers=workers)
    with tqdm(total=len(paths), unit="picture", disable=None, file=sys.stderr) as bar:
        for indices, images, errors in loader:
            said = predict(trained.model, images, topk, trained.classes)
            for index, predictions, error in zip(indices.tolist(), said, errors):
                yield paths[index], [] if error else predictions, error
            bar.update(len(indices))


def _text(path: str) -> str:
    """`path` as valid UTF-8 and otherwise to the letter, for programs that read the answers."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def write(rows: list[tuple[str, list[Prediction], str]], classes: list[str], form: str, out: TextIO) -> None:
    """Write the answers as csv (one line per picture and class), json, or text for people."""
    if form == "json":
        json.dump([{"path": _text(path), "error": error or None,
                    "top": [{"index": p.index, "class": classes[p.index], "name": p.name, "probability": p.probability}
                            for p in said]} for path, said, error in rows], out, ensure_ascii=False, indent=1)
        out.write("\n")
    elif form == "csv":
        table = csv.writer(out, lineterminator="\n")
        table.writerow(["path", "rank", "index", "class", "name", "probability", "error"])
        for path, said, error in rows:
            table.writerows([_text(path), rank, p.index, classes[p.index], p.name, f"{p.probability:.6f}", ""]
                            for rank, p in enumerate(said, 1))
            if error:
                table.writerow([_text(path), "", "", "", "", "", error])
    else:
        for path, said, error in rows:
            words = error and f"not readable: {error}" or ", ".join(f"{p.name} {p.probability:.1%}" for p in said)
            out.write(f"{show(path)}: {words}\n")


def write_heatmaps(trained: Trained, paths: list[str], folder: Path) -> None:
    """For each readable picture, the part the model sees with its Grad-CAM map, as NAME.heat.png."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, path in enumerate(paths):
        try:
            picture = decode_path(path)
        except BadImage:
            continue
        seen = trained.transform()(picture)[None]
        heat = heatmap(trained.model, seen)[0]
        overlay(trained.seen(picture), heat).save(folder / f"{number:05d}.{show(Path(path).stem)[:100]}.heat.png")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.predict", allow_abbrev=False, description="What a trained model says about pictures.",
        epilog="example: python -m tools.predict photo.jpg holidays/ --resume runs/mine/checkpoint-best.pth --topk 3")
    add = parser.add_argument
    add("paths", nargs="+", metavar="PATH", help="picture files, and folders to search for pictures")
    add("--resume", help="checkpoint file or https address (default: the published weights of --model)")
    add("--model", help="name of the model; needed only where the checkpoint does not say it")
    add("--weights", default="auto", choices=["auto", "model", "ema"],
        help="which weights of the checkpoint; auto: those that it says were best (default)")
    add("--topk", type=int, default=5, help="classes per picture (default 5)")
    add("--out", default="text", metavar="FORMAT", help="csv or json on standard output, or a file name ending in "
        ".csv or .json (default: lines of text)")
    add("--heatmap", metavar="DIR", help="also write pictures of where the model looks (Grad-CAM) to DIR")
    add("--input_size", type=int, help="side of the pictures in pixels (default: the checkpoint's)")
    add("--batch_size", type=int, default=32, help="pictures at a time (default 32)")
    add("--num_workers", type=int, default=0, help="processes that read pictures (default 0: none beside this one)")
    add("--device", default="cpu", help="cpu, cuda, mps, xpu, one of them such as cuda:1, or auto (default cpu)")
    return parser


def run(args: argparse.Namespace) -> int:
    form = Path(args.out).suffix[1:] or args.out
    if form not in ("text", "csv", "json"):
        raise UserError(f"--out {args.out} is not accepted: csv, json, or a file name ending in .csv or .json.")
    if min(args.topk, args.batch_size) < 1:
        raise UserError("--topk and --batch_size must be 1 or more.")
    paths = find_pictures(args.paths)
    device = choose_device(args.device, 0, 1)
    trained = load_trained(args.model, args.resume, args.weights, args.input_size, device)
    rows = list(answers(trained, paths, args.topk, args.batch_size, args.num_workers))
    to_file = args.out not in ("text", "csv", "json")
    if not to_file and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # names that the terminal's encoding lacks
    with open(args.out, "w", encoding="utf-8") if to_file else nullcontext(sys.stdout) as out:
        write(rows, trained.classes, form, out)
    if args.heatmap:
        write_heatmaps(trained, paths, Path(args.heatmap))
    bad = [(path, error) for path, _, error in rows if error]
    for path, error in bad[:20]:
        logger.warning("not a readable picture: %s (%s)", show(path), error)
    logger.info("%d of %d pictures predicted with %s from %s", len(rows) - len(bad), len(rows), trained.name,
                trained.source)
    return 1 if len(bad) == len(rows) else 0


def main(argv: list[str] | None = None) -> int:
    return run_command(arguments(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
