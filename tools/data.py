"""Look at data, pack it into tars, check every image: python -m tools.data info|pack|check PATH."""
import argparse
import sys
import time
from collections.abc import Sequence

import numpy as np

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


def describe(part: str, reader: Reader, sampled: int) -> list[str]:
    """What `info` writes on a split."""
    counts = np.bincount(reader.labels, minlength=len(reader.classes))
    chosen = np.linspace(0, len(reader) - 1, min(sampled, len(reader))).astype(int).tolist()
    started = time.perf_counter()
    found = [sentence for image in chosen if (sentence := problem(reader, image))]
    speed = len(chosen) / (time.perf_counter() - started)
    left_out = ", ".join(f"{count} {printable(kind)}" for kind, count in reader.left_out.items())
    return [f"{part}: {len(reader):,} images in {plural(len(reader.classes), 'class')}, {reader.form}, order "
            f"{reader.order[:8]}",
            f"  {printable(reader.root)}; {counts.min():,} to {counts.max():,} images per class",
            *([f"  skipped, not images: {left_out}"] if left_out else []),
            f"  {speed:.0f} images/s read and decoded by one core, {len(found)} of a sample of {len(chosen)} "
            "unreadable", *(f"  {sentence}" for sentence in found[:3])]


def run(args: argparse.Namespace) -> int:
    cache = IndexCache(args.index_cache)
    if args.command == "pack":
        size = int(args.tar_gb * 1e9)
        lines = pack(args.path, args.target, tar_bytes=size, resize=args.resize, cache=cache)
    elif args.command == "info":
        lines = [line for part, reader in splits_in(args.path, cache).items()
                 for line in describe(part, reader, args.sample)]
    else:
        lines, broken = [], 0
        for part, reader in splits_in(args.path, cache).items():
            for _, sentence in in_threads(reader, lambda image: problem(reader, image), f"check {part}"):
                if sentence:
                    broken += 1
                    logger.error("%s", sentence)
            lines.append(f"{part}: {len(reader):,} images checked")
        lines.append(f"{plural(broken, 'unreadable image')}")
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return ExitCode.FAILED if args.command == "check" and broken else ExitCode.DONE


def arguments() -> argparse.ArgumentParser:
    parser = new_parser("data", "Look at data, pack it into tars, check every image.", "info imagenet/")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("info", "form, counts, order, sampled speed"),
                       ("check", "decode every image, list what is unreadable; exit code 1 then"),
                       ("pack", "write plain tars, bytes unchanged")):
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.add_argument("path", metavar="PATH", help="folder of the data set, or of one split")
        command.add_argument("--index_cache", help="folder for the saved index (default: the user's cache)")
        if name == "info":
            command.add_argument("--sample", type=int, default=64, help="images to decode (default 64)")
        if name == "pack":
            command.add_argument("target", metavar="FOLDER", help="folder for the tars")
            command.add_argument("--tar_gb", type=float, default=1.0, help="size of a tar in GB (default 1)")
            command.add_argument("--resize", type=int, default=0, metavar="N",
                                 help="make larger images N pixels on the short side: changes pixels")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(arguments(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
