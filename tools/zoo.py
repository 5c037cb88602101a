"""Published weights: python -m tools.zoo list | get MODEL | verify FILE… | convert FILE --out FILE.

Files are kept in ~/.cache/hornet, or the folder named by --folder or HORNET_CACHE; a file placed there by
hand is used without a network.
"""
import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from common.errors import UserError
from common.files import atomic_write, sha256_file
from common.log import logger
from common.safe_load import safe_torch_load, save_safetensors
from config.options import ImageSettings
from models.download import cache_folder, fetch_published
from models.weights import identify, published_names, select_weights, to_openmmlab
from models.zoo import PUBLISHED
from tools.command import add_weights_argument, new_parser, run_command


def list_models(args: argparse.Namespace) -> int:
    """A table of what is published, and which files are in the folder."""
    form, folder = "{:25}{:>12} {:>8} {:>5} {:>8} {:>6} {:>6}  {:50} {}\n", cache_folder(args.folder)
    title = ("model", "parameters", "FLOPs", "size", "classes", "top-1", "top-5", "file", "here")
    sys.stdout.write(form.format(*title))
    for name, row in PUBLISHED.items():
        accuracy = [f"{value:.2f}" if value else "-" for value in (row.top1, row.top5)]
        here = any((folder / file.name).exists() for file in row.files)
        sys.stdout.write(form.format(
            name, f"{row.params:,}", f"{(row.flops or 0) / 1e9:.4g} G", row.input_size, row.classes,
            *accuracy, row.files[0].name if row.files else "none published", "yes" if here else "-"))
    sys.stdout.write("top-1 and top-5 in percent on ImageNet-1k, measured by OpenMMLab on the authors' "
                     f"weights; parameters with 1000 classes; files in {folder}\n")
    return 0


def get(args: argparse.Namespace) -> int:
    """Download (or find) the file of each model, check it, and print its path."""
    for name in args.models:
        sys.stdout.write(f"{fetch_published(name, args.folder, args.source)}\n")
    return 0


def verify(args: argparse.Namespace) -> int:
    """For each file: its hash against the published one, and whether its tensors are of a published model."""
    wrong = 0
    for path in map(Path, args.files):
        try:
            result = _verify(path)
        except UserError as error:
            result, wrong = f"WRONG: {error}", wrong + 1
        sys.stdout.write(f"{path}: {result}\n")
    return 1 if wrong else 0


def _verify(path: Path) -> str:
    checkpoint, digest = safe_torch_load(path), sha256_file(path)[:8]
    known = {file.name: (name, file.sha256_prefix) for name, row in PUBLISHED.items() for file in row.files}
    name, prefix = known.get(path.name, (None, ""))
    if prefix and digest != prefix:
        raise UserError(f"its sha256 begins with {digest}, published is {prefix}", code="other_file")
    state, key = select_weights(checkpoint, str(path))
    looks = identify(published_names(state)) or "no model of this project"
    if name is not None and looks != name:
        raise UserError(f"it should hold {name}, and its tensors are of {looks}", code="other_file")
    if not all(bool(value.isfinite().all()) for value in state.values() if value.is_floating_point()):
        raise UserError("some of its weights are infinite or undefined", code="nonfinite_weights")
    return (f"ok: {looks}, {len(state)} tensors{f' under {key}' if key else ''}, sha256 {digest}..., "
            + ("hash as published" if prefix else "no published hash"))


def convert(args: argparse.Namespace) -> int:
    """Write the weights of a file under the published names, or OpenMMLab's, as .pth or .safetensors.

    Class names and image settings go along: without them a file would be evaluated with other images.
    """
    source, out, openmmlab = Path(args.file), Path(args.out), args.names == "openmmlab"
    if out.suffix not in (".pth", ".safetensors"):
        raise UserError(f"--out {out} must end in .pth or .safetensors.", code="invalid_value")
    if out.resolve() == source.resolve():
        raise UserError(f"--out {out} is the file that is converted; name another.", code="invalid_value")
    checkpoint = safe_torch_load(source)
    state, key = select_weights(checkpoint, str(source), weights=args.weights)
    state = to_openmmlab(published_names(state)) if openmmlab else published_names(state)
    content = checkpoint if key else {}  # a bare state dict says nothing else
    about = {name: content[name] for name in ("format", "classes") if content.get(name)}
    if options := content.get("args"):
        kept = ("model", *ImageSettings.__dataclass_fields__)
        about["args"] = {name: options[name] for name in kept if options.get(name) is not None}
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".safetensors":
        save_safetensors(out, state, about or None)
    else:
        state = {name: value.clone() for name, value in state.items()}  # not a view with its whole storage
        content = {"state_dict" if openmmlab else "model": state, **about}
        atomic_write(out, lambda file: torch.save(content, file))
    logger.info("wrote %s: %d tensors%s, names as in %s files", out, len(state),
                f" from '{key}'" if key else "", "OpenMMLab's" if openmmlab else "the authors'")
    return 0


def arguments() -> argparse.ArgumentParser:
    parser = new_parser("zoo", "Published weights of HorNet.", "get hornet_tiny_7x7")
    parser.add_argument("--folder", help="where published files are (default: HORNET_CACHE, ~/.cache/hornet)")
    commands = parser.add_subparsers(dest="command", required=True, metavar="list|get|verify|convert")

    def command(work: Callable[[argparse.Namespace], int], name: str, help: str) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=help)
        one.set_defaults(work=work)
        return one
    command(list_models, "list", "what is published and which files are here")
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
