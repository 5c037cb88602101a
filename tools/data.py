"""Look at data, pack it into tars, check every image: python -m tools.data info|pack|check PATH."""
import argparse
import sys
import time
from collections.abc import Sequence

import numpy as np

from common.errors import UserError
from common.log import logger
from common.outcome import ExitCode
from common.text import plural, printable
from datasets.images import BadImage, decode, unreadable
from datasets.index import IndexCache
from datasets.pack import in_threads, pack, splits_in
from datasets.readers import Reader
from tools.command import new_parser, run_command


def problem(reader: Reader, image: int) -> str:
    """Why an image cannot be read, "" when it can."""
    try:
        decode(reader.encoded(image))
    except BadImage as error:
        return unreadable(reader.name(image), str(error))
    return ""


def info(reader: Reader, sampled: int) -> list[str]:
    """Lines on a split: what it is, and a sample of its images."""
    counts = np.bincount(reader.labels, minlength=len(reader.classes))
    chosen = np.linspace(0, len(reader) - 1, min(sampled, len(reader))).astype(int).tolist()
    started = time.perf_counter()
    found = [sentence for image in chosen if (sentence := problem(reader, image))]
    speed = len(chosen) / (time.perf_counter() - started)
    left_out = [f"  not images: {count} {printable(kind)}" for kind, count in reader.left_out.items()]
    return [f"{len(reader):,} images in {plural(len(reader.classes), 'class')} ({counts.min():,} to "
            f"{counts.max():,} each), {reader.form}, order {reader.order[:8]}, in {printable(reader.root)}",
            f"  {speed:.0f} images/s read and decoded by one core, {len(found)} of {len(chosen)} unreadable",
            *left_out, *(f"  {sentence}" for sentence in found[:3])]


def run(args: argparse.Namespace) -> int:
    cache, broken = IndexCache(args.index_cache), 0
    if args.command == "pack":
        if not args.target or args.tar_gb <= 0 or args.resize < 0:
            raise UserError("pack takes a FOLDER for the tars, and sizes above 0.", code="missing_option")
        size = int(args.tar_gb * 1e9)
        lines = pack(args.path, args.target, tar_bytes=size, resize=args.resize, cache=cache)
        sys.stdout.write("".join(f"{line}\n" for line in lines))
        return ExitCode.DONE
    for part, reader in splits_in(args.path, cache).items():
        if args.command == "info":
            lines = info(reader, args.sample)
        else:
            problems = in_threads(reader, lambda image: problem(reader, image), f"check {part}")
            found = [logger.error("%s", sentence) for _, sentence in problems if sentence]
            lines, broken = [f"{len(reader):,} images, {len(found)} unreadable"], broken + len(found)
        sys.stdout.write(f"{part}: " + "".join(f"{line}\n" for line in lines))
    return ExitCode.FAILED if broken else ExitCode.DONE


def arguments() -> argparse.ArgumentParser:
    parser = new_parser("data", "Look at data (info), check every image (check: exit code 1 when one is "
                        "unreadable), pack it into tars in the WebDataset layout, bytes unchanged (pack).",
                        "info imagenet/")
    add = parser.add_argument
    add("command", choices=["info", "check", "pack"])
    add("path", metavar="PATH", help="folder of the data set, or of one split")
    add("target", metavar="FOLDER", nargs="?", help="pack: folder for the tars")
    add("--index_cache", help="folder for the saved index (default: the user's cache)")
    add("--sample", type=int, default=64, help="info: images to decode (default 64)")
    add("--tar_gb", type=float, default=1.0, help="pack: size of a tar in GB (default 1)")
    add("--resize", type=int, default=0, metavar="N", help="pack: short sides of at most N: changes pixels")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(arguments(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
