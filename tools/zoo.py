"""Published weights, and one's own to publish: python -m tools.zoo list | get MODEL | hub RUN --out DIR.

Files are kept in ~/.cache/hornet, or the folder named by --folder or HORNET_CACHE; a file placed there by
hand is used without a network.
"""
import argparse
import sys
from pathlib import Path

from common.log import logger
from common.text import table
from models.download import HUB_WEIGHTS, cache_folder, fetch_published
from models.hub import push, write_hub
from models.trained import load
from models.zoo import VARIANTS
from report.card import model_card
from tools.command import add_weights_argument, new_parser, run_command


def list_models(args: argparse.Namespace) -> int:
    """A table of all models, what is published of them, and which files are in the folder."""
    folder = cache_folder(args.folder)
    rows = [{"model": name, "parameters": f"{row.params:,}", "FLOPs": f"{row.flops / 1e9:.4g} G",
             "size": row.input_size, "classes": row.classes, "top-1": row.top1 or "-",
             "top-5": row.top5 or "-", "file": row.files[0].name if row.files else "none published",
             "here": "yes" if any((folder / file.name).exists() for file in row.files) else "-"}
            for name, row in VARIANTS.items()]
    sys.stdout.write(f"{table(rows)}top-1 and top-5 in percent on ImageNet-1k, measured by OpenMMLab on the "
                     f"authors' weights; parameters with 1000 classes; files in {folder}\n")
    return 0


def get(args: argparse.Namespace) -> int:
    """Download (or find) the file of each model, check it, and print its path."""
    for name in args.models:
        sys.stdout.write(f"{fetch_published(name, args.folder)}\n")
    return 0


def hub(args: argparse.Namespace) -> int:
    """Write a trained model as a folder in the Hub's layout, and upload it if asked to."""
    trained, out = load(args.source, weights=args.weights), Path(args.out)
    write_hub(trained, out, model_card(trained, args.push or "USER/NAME", args.licence), args.licence)
    logger.info("wrote %s: %s for timm, transformers and models.load, from %s, %s", out, HUB_WEIGHTS,
                trained.source, trained.weights or "bare weights")
    if args.push:
        logger.info("pushed to %s", push(out, args.push))
    return 0


def arguments() -> argparse.ArgumentParser:
    parser = new_parser("zoo", "Published weights of HorNet.", "get hornet_tiny_7x7")
    parser.add_argument("--folder", help="where published files are (default: HORNET_CACHE, ~/.cache/hornet)")
    commands = parser.add_subparsers(dest="command", required=True, metavar="list|get|hub")
    one = commands.add_parser("list", help="all models, what is published and which files are here")
    one.set_defaults(work=list_models)
    one = commands.add_parser("get", help="download files, check them, print their paths")
    one.set_defaults(work=get)
    one.add_argument("models", nargs="+", metavar="MODEL", help="such as hornet_tiny_7x7")
    one = commands.add_parser("hub", help="a folder for the Hugging Face Hub: weights, config.json and card")
    one.set_defaults(work=hub)
    one.add_argument("source", metavar="RUN|CHECKPOINT", help="run folder (its best checkpoint) or file")
    one.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    one.add_argument("--push", metavar="USER/NAME", help="also upload it (after `hf auth login`)")
    one.add_argument("--licence", default="mit", help="of the weights, by the Hub's name (default mit)")
    add_weights_argument(one)
    return parser


def main(argv: list[str] | None = None) -> int:
    return run_command(arguments(), lambda args: args.work(args), argv)


if __name__ == "__main__":
    sys.exit(main())
