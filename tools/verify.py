"""The published table on your ImageNet: python -m tools.verify --data_path IMAGENET [options of main.py].

Finds or fetches the files of the six ImageNet-1k models, evaluates each in true float32, and compares top-1
with the published figure. `--dry_run true` tries every step on generated weights and images in a minute.
"""
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path

import timm
import torch
from PIL import Image

from common.files import read_json, sha256_file, write_json, write_text
from common.outcome import ExitCode
from common.synsets import imagenet_synsets
from common.text import duration, table
from config.parse import Resolved, parse
from evaluation import evaluate_checkpoints
from launch.process import Process, start
from launch.watchdog import Watchdog
from models.download import cache_folder, fetch
from models.weights import to_openmmlab
from models.zoo import PUBLISHED, PublishedFile, Variant
from report.metrics import Predictions, image_key
from report.results import read_predictions
from run.folder import environment
from tools.command import new_parser, run_command

NAMES = tuple(name for name, row in PUBLISHED.items() if row.top1)
LIMIT = 0.02  # points of top-1: ten of the 50,000 images


def verify(resolved: Resolved, row: Variant, process: Process, rehearsal: bool) -> dict:
    """Evaluate one model into `--report` and judge it: its row of the table (plain values).

    Where that folder holds the predictions of an earlier evaluation, the images are named that changed.
    """
    folder = Path(resolved.options.report or "")
    predictions = folder / "predictions.npz"
    stored = read_predictions(predictions) if predictions.is_file() else None
    with Watchdog(process, hang_timeout=resolved.options.hang_timeout) as watchdog:
        evaluate_checkpoints(resolved, process, watchdog)
    result = read_json(folder / "eval.json")
    difference = result["acc1"] - (row.top1 or 0.0)
    # A rehearsal departs from the published protocol: it has fewer and smaller images.
    passed = abs(difference) <= LIMIT + 1e-9 and (rehearsal or not result["departures"])
    return {"model": resolved.options.model, "file": Path(result["checkpoint"]).name, "top-1": result["acc1"],
            "published": row.top1, "difference": difference, "top-5": result["acc5"],
            "published top-5": row.top5, "verdict": "PASS" if passed else "FAIL",
            "time": duration(result["seconds"]), "departures": result["departures"],
            "changed": changed(stored, read_predictions(predictions)) if stored else None}


def changed(stored: Predictions, found: Predictions) -> list[str]:
    """`image: stored class, class now` for each image that two evaluations answer differently."""
    one, other = ({image_key(path): [*each.classes, "unreadable"][answer] for path, answer in
                   zip(each.paths, each.top5[:, 0])} for each in (stored, found))
    return [f"{key}: {one[key]}, now {other[key]}" for key in sorted(one.keys() & other.keys())
            if one[key] != other[key]]


def as_markdown(rows: list[dict]) -> str:
    """The table, and below it why a model did not pass."""
    text = table([{key: f"{value:.2f}" if isinstance(value, float) else value for key, value in row.items()
                   if key not in ("departures", "changed")} for row in rows])
    for row in rows:
        for what, found in (("departs from the published protocol", row["departures"]),
                            ("images differ from the stored predictions", row["changed"])):
            if row["verdict"] == "FAIL" and found:
                text += f"\n{row['model']}, {len(found)} {what}: {'; '.join(found[:10])}\n"
    return text


def rehearse(folder: Path, names: list[str]) -> dict[str, Variant]:
    """100 images of noise in ten classes, and a file of each model by turns in the two published formats, to
    be found or fetched; their heads always prefer the first classes, so that the accuracy is known."""
    for number in range(100):
        place = folder / "val" / imagenet_synsets()[number // 10]
        place.mkdir(parents=True, exist_ok=True)
        noise = Image.effect_noise((48, 40), 64)
        noise.save(place / f"ILSVRC2012_val_{number + 1:08d}.JPEG")
    rows = {}
    for number, name in enumerate(names):
        with torch.device("meta"):
            shapes = timm.create_model(name).state_dict()
        state = {key: torch.full(value.shape, 0.01) for key, value in shapes.items()}
        state["head.bias"] = -torch.arange(1000.0)
        theirs, authors = PUBLISHED[name].files
        file = authors if number % 2 else theirs
        path = folder / ("elsewhere" if number % 3 else "files") / file.name
        path.parent.mkdir(exist_ok=True)
        torch.save({"model": state} if number % 2 else {"state_dict": to_openmmlab(state), "meta": {}}, path)
        hashed = sha256_file(path)[:8] if file is theirs else ""
        rows[name] = replace(PUBLISHED[name], files=(PublishedFile(file.name, path.as_uri(), hashed),),
                             top1=10.0, top5=50.0)
    return rows


def run(args: Namespace) -> int:
    rows, out, rehearsal = [], Path(args.out), args.dry_run == "true"
    with tempfile.TemporaryDirectory() as folder:
        variants, files, argv = PUBLISHED, cache_folder(), ["--eval", "true", *args.others]
        if rehearsal:
            variants, files = rehearse(Path(folder), args.models), Path(folder, "files")
            argv += ["--data_path", folder, "--input_size", "32", "--num_workers", "0"]
        options = parse(argv).options
        paths = {name: fetch(variants[name].files, files) for name in args.models}  # before hours are spent
        with start(options.device, options.rendezvous_timeout) as process:
            # The first one twice, so that a rehearsal also compares with stored predictions.
            for name in args.models[:int(rehearsal)] + args.models:
                flags = ["--model", name, "--resume", str(paths[name]), "--report", str(out / name)]
                found = verify(parse([*argv, *flags]), variants[name], process, rehearsal)
                rows = [row for row in rows if row["model"] != name] + [found]
    text = as_markdown(rows)
    write_json(out / "verified.json", {"models": rows, "environment": environment()})
    write_text(out / "verified.md", text)
    sys.stdout.write(text)
    return ExitCode.DONE if all(row["verdict"] == "PASS" for row in rows) else ExitCode.FAILED


def arguments() -> ArgumentParser:
    parser = new_parser("verify", "The published accuracies on your ImageNet.", "--data_path IMAGENET")
    parser.add_argument("--models", nargs="+", default=list(NAMES), choices=NAMES, metavar="MODEL")
    parser.add_argument("--out", default="runs/verified", help="folder for tables and predictions")
    parser.add_argument("--dry_run", default="false", choices=["true", "false"], help="try it in a minute")
    parser.set_defaults(others=[])  # main.py's
    return parser


def main(argv: list[str] | None = None) -> int:
    return run_command(arguments(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
