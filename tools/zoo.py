"""Published weights: python -m tools.zoo list | get MODEL | verify FILE… | convert FILE --out FILE.

Files are kept in ~/.cache/hornet, or the folder named by --folder or HORNET_CACHE; a file placed there by
hand is used without a network.
"""
import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from common.errors import UserError
from common.files import atomic_write, sha256_file
from common.log import logger
from common.safe_load import save_safetensors
from models.download import cache_folder, fetch_published
from models.trained import load
from models.weights import to_openmmlab
from models.zoo import PUBLISHED, VARIANTS
from run.state import FORMAT
from tools.command import add_weights_argument, new_parser, run_command


def list_models(args: argparse.Namespace) -> int:
    """A table of all models, what is published of them, and which files are in the folder."""
    form, folder = "{:25}{:>12} {:>10} {:>5} {:>8} {:>6} {:>6}  {:50} {}\n", cache_folder(args.folder)
    title = ("model", "parameters", "FLOPs", "size", "classes", "top-1", "top-5", "file", "here")
    sys.stdout.write(form.format(*title))
    for name, row in VARIANTS.items():
        accuracy = [f"{value:.2f}" if value else "-" for value in (row.top1, row.top5)]
        here = any((folder / file.name).exists() for file in row.files)
        sys.stdout.write(form.format(
            name, f"{row.params:,}", f"{row.flops / 1e9:.4g} G", row.input_size, row.classes, *accuracy,
            row.files[0].name if row.files else "none published", "yes" if here else "-"))
    sys.stdout.write("top-1 and top-5 in percent on ImageNet-1k, measured by OpenMMLab on the authors' "
                     f"weights; parameters with 1000 classes; files in {folder}\n")
    return 0


def get(args: argparse.Namespace) -> int:
    """Download (or find) the file of each model, check it, and print its path."""
    for name in args.models:
        sys.stdout.write(f"{fetch_published(name, args.folder, args.source)}\n")
    return 0


def verify(args: argparse.Namespace) -> int:
    """For each file: its hash against the published one, and whether it holds a model that can be used."""
    known = {file.name: (name, file.sha256_prefix) for name, row in PUBLISHED.items() for file in row.files}
    wrong = 0
    for path in map(Path, args.files):
        name, prefix = known.get(path.name, (None, ""))
        try:
            trained, digest = load(path, model=name), sha256_file(path)[:8]
            if not digest.startswith(prefix):
                raise UserError(f"its sha256 begins with {digest}, published is {prefix}", code="other_file")
            result = (f"ok: {trained.name}, {len(trained.classes)} classes, sha256 {digest}..., "
                      f"{'hash as published' if prefix else 'no published hash'}")
        except UserError as error:
            result, wrong = f"WRONG: {error}", 1
        sys.stdout.write(f"{path}: {result}\n")
    return wrong


def convert(args: argparse.Namespace) -> int:
    """Write the weights of a file under the published names, or OpenMMLab's, as .pth or .safetensors.

    Class names and image settings go along: without them a file would be evaluated with other images.
    """
    out, openmmlab = Path(args.out), args.names == "openmmlab"
    if out.suffix not in (".pth", ".safetensors") or out.resolve() == Path(args.file).resolve():
        raise UserError(f"--out {out} is not accepted: it takes another file, in .pth or .safetensors.",
                        code="invalid_value")
    trained = load(args.file, weights=args.weights)
    state = trained.model.state_dict()
    state = to_openmmlab(state) if openmmlab else state
    options = {"model": trained.name, **asdict(trained.settings)}
    about = {"format": FORMAT, "classes": trained.classes, "args": options}
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".safetensors":
        save_safetensors(out, state, about)
    else:
        content = {"state_dict" if openmmlab else "model": state, **about}
        atomic_write(out, lambda file: torch.save(content, file))
    logger.info("wrote %s: %d tensors of %s, names as in %s files", out, len(state), trained.source.name,
                "OpenMMLab's" if openmmlab else "the authors'")
    return 0


def arguments() -> argparse.ArgumentParser:
    parser = new_parser("zoo", "Published weights of HorNet.", "get hornet_tiny_7x7")
    parser.add_argument("--folder", help="where published files are (default: HORNET_CACHE, ~/.cache/hornet)")
    commands = parser.add_subparsers(dest="command", required=True, metavar="list|get|verify|convert")

    def command(work: Callable[[argparse.Namespace], int], name: str, help: str) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=help)
        one.set_defaults(work=work)
        return one
    command(list_models, "list", "all models, what is published and which files are here")
    one = command(get, "get", "download files, check them, print their paths")
    one.add_argument("models", nargs="+", metavar="MODEL", help="such as hornet_tiny_7x7")
    one.add_argument("--source", default="auto", choices=["auto", "openmmlab", "authors"],
                     help="where from; auto: the first that is available (default)")
    one = command(verify, "verify", "check files against published hashes and architectures")
    one.add_argument("files", nargs="+", metavar="FILE")
    one = command(convert, "convert", "between the authors' and OpenMMLab's names, .pth and .safetensors")
    one.add_argument("file", metavar="FILE", help="checkpoint to read, in either naming")
    one.add_argument("--out", required=True, help="file to write, ending in .pth or .safetensors")
    one.add_argument("--names", default="authors", choices=["authors", "openmmlab"],
                     help="names of the tensors to write (default authors)")
    add_weights_argument(one)
    return parser


def main(argv: list[str] | None = None) -> int:
    return run_command(arguments(), lambda args: args.work(args), argv)


if __name__ == "__main__":
    sys.exit(main())
