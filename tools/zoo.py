"""Published weights: python -m tools.zoo list | get MODEL | verify FILE… | convert FILE --out FILE.

Files are kept in ~/.cache/hornet, or the folder named by --folder or HORNET_CACHE; a file placed there by hand is
used without a network.
"""
import argparse
import sys
from pathlib import Path

import torch

from common.errors import UserError
from common.files import atomic_write, sha256_file
from common.log import logger
from common.safe_load import safe_torch_load, save_safetensors
from models.download import cache_folder, fetch_published
from models.weights import identify, published_names, select_weights, to_openmmlab
from models.zoo import PUBLISHED, published_files
from tools.command import run_command

# Kept beside converted weights: without them a file would be evaluated with other pictures than its run was.
ABOUT, ABOUT_ARGS = ("format", "classes"), ("model", "input_size", "crop_pct", "imagenet_default_mean_and_std",
                                            "layer_scale_init_value")


def list_models(args: argparse.Namespace) -> int:
    """A table of what is published, and which files lie in the folder."""
    rows = [("model", "parameters", "size", "classes", "top-1", "top-5", "file", "here")]
    for name, entry in PUBLISHED.items():
        figures = [f"{value:.2f}" if value is not None else "-" for value in (entry.top1, entry.top5)]
        files = published_files(name)
        here = any((cache_folder(args.folder) / file.name).exists() for file in files)
        rows.append((name, f"{entry.params:,}", str(entry.input_size), str(entry.classes), *figures,
                     files[0].name if files else "none published", "yes" if here else "-"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        sys.stdout.write("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() + "\n")
    sys.stdout.write("top-1 and top-5 in percent on ImageNet-1k, measured by OpenMMLab on the authors' weights; "
                     f"parameters with 1000 classes; files in {cache_folder(args.folder)}\n")
    return 0


def get(args: argparse.Namespace) -> int:
    """Download (or find) the file of each model, check it, and print its path."""
    for name in args.models:
        sys.stdout.write(f"{fetch_published(name, args.folder, args.source)}\n")
    return 0


def verify(args: argparse.Namespace) -> int:
    """For each file: its hash against the published one, and whether its tensors are those of a published model."""
    known = {file.name: (name, file) for name in PUBLISHED for file in published_files(name)}
    wrong = 0
    for path in map(Path, args.files):
        try:
            said = _verify(path, known)
        except UserError as error:
            said, wrong = f"WRONG: {error}", wrong + 1
        sys.stdout.write(f"{path}: {said}\n")
    return 1 if wrong else 0


def _verify(path: Path, known: dict) -> str:
    checkpoint = safe_torch_load(path)
    digest = sha256_file(path)
    name, file = known.get(path.name, (None, None))
    if file is not None and not digest.startswith(file.sha256_prefix):
        raise UserError(f"its sha256 begins with {digest[:8]}, published is {file.sha256_prefix}")
    state, key = select_weights(checkpoint, str(path))
    looks = identify(published_names(state)) or "no model of this project"
    if name is not None and looks != name and not name.startswith(looks):
        raise UserError(f"it should hold {name}, and its tensors are of {looks}")
    if not all(bool(value.isfinite().all()) for value in state.values() if value.is_floating_point()):
        raise UserError("some of its weights are infinite or undefined")
    checked = "hash as published" if file is not None and file.sha256_prefix else "no published hash"
    return f"ok: {looks}, {len(state)} tensors{f' under {key}' if key else ''}, sha256 {digest[:8]}…, {checked}"


def convert(given: argparse.Namespace) -> int:
    """Write the weights of a file under the published names, or OpenMMLab's, as .pth or .safetensors."""
    source, out = Path(given.file), Path(given.out)
    if out.suffix not in (".pth", ".safetensors"):
        raise UserError(f"--out {out} must end in .pth or .safetensors.")
    if out.exists() and out.samefile(source):
        raise UserError(f"--out {out} is the file that is converted; name another.")
    checkpoint = safe_torch_load(source)
    state, key = select_weights(checkpoint, str(source), weights=given.weights)
    state = published_names(state)
    if given.names == "openmmlab":
        state = to_openmmlab(state)
    out.parent.mkdir(parents=True, exist_ok=True)
    about = {name: checkpoint[name] for name in ABOUT if checkpoint.get(name)}
    if isinstance(args := checkpoint.get("args"), dict):
        about["args"] = {name: args[name] for name in ABOUT_ARGS if isinstance(args.get(name), (str, int, float))}
    if out.suffix == ".safetensors":
        save_safetensors(out, state, about or None)
    else:
        state = {name: value.clone() for name, value in state.items()}  # a view would bring its whole storage along
        entry = "state_dict" if given.names == "openmmlab" else "model"
        atomic_write(out, lambda file: torch.save({entry: state, **about}, file))
    logger.info("wrote %s: %d tensors%s, names as in %s files", out, len(state), f" from '{key}'" if key else "",
                "OpenMMLab's" if given.names == "openmmlab" else "the authors'")
    return 0


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.zoo", description="Published weights of HorNet.",
                                     allow_abbrev=False, epilog="example: python -m tools.zoo get hornet_tiny_7x7")
    parser.add_argument("--folder", help="where published files lie (default: HORNET_CACHE or ~/.cache/hornet)")
    commands = parser.add_subparsers(dest="command", required=True, metavar="list|get|verify|convert")
    commands.add_parser("list", help="what is published and what lies here").set_defaults(work=list_models)
    one = commands.add_parser("get", help="download files, check them, print their paths")
    one.add_argument("models", nargs="+", metavar="MODEL", help="such as hornet_tiny_7x7")
    one.add_argument("--source", default="auto", choices=["auto", "openmmlab", "authors"],
                     help="where from; auto: whichever can be had (default)")
    one.set_defaults(work=get)
    one = commands.add_parser("verify", help="check files against published hashes and architectures")
    one.add_argument("files", nargs="+", metavar="FILE")
    one.set_defaults(work=verify)
    one = commands.add_parser("convert", help="between the authors' and OpenMMLab's names, .pth and .safetensors")
    one.add_argument("file", metavar="FILE", help="checkpoint to read, in either naming")
    one.add_argument("--out", required=True, help="file to write, ending in .pth or .safetensors")
    one.add_argument("--names", default="authors", choices=["authors", "openmmlab"],
                     help="names of the tensors to write (default authors)")
    one.add_argument("--weights", default="auto", choices=["auto", "model", "ema"],
                     help="which weights to take; auto: those that the file says were best (default)")
    one.set_defaults(work=convert)
    return parser


def main(argv: list[str] | None = None) -> int:
    return run_command(arguments(), lambda args: args.work(args), argv)


if __name__ == "__main__":
    sys.exit(main())
