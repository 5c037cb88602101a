"""Make the figures of tests/parity/test_same_numbers.py again, or print the bits that a training ends with.

    python -m tests.parity.store_same_numbers           writes tests/data/parity/same_numbers.json
    python -m tests.parity.store_same_numbers --bits    prints a sha256 of each row's final weights, average
    and
                                                        optimizer: `diff` two of these, made on one machine
"""
import hashlib
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from tests.kits import numbers
from tests.kits.images import write_images
from tests.kits.runs import result

STORED = Path(__file__).resolve().parents[1] / "data" / "parity" / "same_numbers.json"
TRAIN, VAL, GLOBAL_BATCH, EPOCHS = 28, 9, 8, 2  # three updates per epoch; four images are left over
# Layer scale and learning rate are large, so that every draw leaves its mark on the weights within a few
# updates.
OPTIONS = {
    "device": "cpu", "input_size": 32, "epochs": EPOCHS, "global_batch": GLOBAL_BATCH, "lr": 0.002,
    "warmup_epochs": 1, "weight_decay_end": 0.1, "clip_grad": 5, "drop_path": 0.3,
    "layer_scale_init_value": 0.5, "reprob": 0.5, "model_ema_decay": 0.9, "num_workers": 0, "print_freq": 2,
    "seed": 5}
MIXED, PLAIN = {"mixup": 0.8, "cutmix": 1.0}, {"mixup": 0, "cutmix": 0}
EMA, BF16 = {"model_ema": "true", "model_ema_eval": "true"}, {"use_amp": "true", "amp_dtype": "bf16"}


def _row(model: str, accumulation: int, *changes: dict, processes: int = 1) -> dict:
    options = {"model": f"hornet_nano_{model}", "batch_size": GLOBAL_BATCH // accumulation // processes,
               **{name: value for change in changes for name, value in change.items()}}
    if "model_ema" not in options:
        options["disable_eval"] = "true"
    return {"options": options, "processes": processes}


ROWS = {
    "7x7": _row("7x7", 1, MIXED),
    "7x7-2x-ema": _row("7x7", 2, MIXED, EMA),
    "7x7-4x-unmixed": _row("7x7", 4, PLAIN, {"layer_decay": 0.7}),
    "7x7-bf16": _row("7x7", 1, MIXED, BF16, EMA),
    "7x7-2x-two": _row("7x7", 2, MIXED, processes=2),
    "gf": _row("gf", 1, MIXED),
    "gf-4x-ema": _row("gf", 4, MIXED, EMA),
    "gf-2x-unmixed": _row("gf", 2, PLAIN, {"clip_by": "agc", "clip_grad": 0.05}),
    "gf-2x-bf16-unmixed": _row("gf", 2, PLAIN, BF16),
    "gf-two-elem": _row("gf", 1, MIXED, {"mixup_mode": "elem", "recount": 2}, EMA, processes=2)}
RESUMED = (("7x7-2x-ema", 1), ("gf", 4), ("gf-two-elem", 3))  # row, update in which it is stopped, within an epoch


def run(name: str, data: Path, work: Path, stop_after: int | None = None) -> dict:
    """Train a row of ROWS in `work`; with `stop_after` in two attempts."""
    row, folder = ROWS[name], work / "run"
    work.mkdir()
    values = {**OPTIONS, **row["options"], "data_path": data, "index_cache": data / "cache",
              "output_dir": folder}
    argv = [word for option, value in values.items() for word in (f"--{option}", str(value))]
    updates = []
    for last, stop in ([] if stop_after is None else [(False, stop_after)]) + [(True, None)]:
        codes, seen = numbers.train(argv, work, row["processes"], stop)
        assert codes == [0 if last else 75] * row["processes"], numbers.console(work)
        updates += seen
    return {"updates": updates, "tensors": numbers.tensors(folder), "log": result(folder)["log"]}


def figures(result: dict) -> dict:
    """The numbers of a result that are stored and compared."""
    norms = {name: float(f"{value.double().norm().item():.6g}") for name, value in result["tensors"].items()}
    log = [{key: line[key] for key in ("epoch", "train_loss", "test_loss", "test_loss_ema", "train_lr") if key in line}
           for line in result["log"]]
    return {**{key: [update[key] for update in result["updates"]] for key in ("update", "batch", "loss", "grad_norm")},
            "log": log, "norms": norms}


def bits(result: dict) -> str:
    """sha256 of all final tensors."""
    digest = hashlib.sha256()
    for name, value in sorted(result["tensors"].items()):
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """The packages whose draws and arithmetic stand in the figures."""
    return {name: version(name) for name in ("torch", "torchvision", "timm", "pillow", "numpy")}


def read() -> dict:
    """The stored figures: `versions`, and `rows` as `figures` gives them."""
    stored = json.loads(STORED.read_text())
    for row in stored["rows"].values():
        row["norms"] = dict(zip(stored["names"][row.pop("names")], row["norms"], strict=True))
    return stored


def write(rows: dict[str, dict]) -> None:
    """Store `figures` of each row; the names of tensors once."""
    names: dict[str, list[str]] = {}
    for name, row in rows.items():
        row["names"] = f"{name.partition('-')[0]} {len(row['norms'])}"
        names[row["names"]], row["norms"] = [*row["norms"]], [*row["norms"].values()]
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(row, separators=(',', ':'))}" for name, row in rows.items())
    STORED.write_text(f'{{"versions": {json.dumps(versions())},\n"names": {json.dumps(names, separators=(",", ":"))},\n'
                      f'"rows": {{\n{lines}}}}}\n')


def main(argv: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        data = write_images(Path(folder) / "data", TRAIN, VAL)
        results = {name: run(name, data, Path(folder) / name) for name in ROWS}
    if "--bits" in argv:
        sys.stdout.writelines(f"{bits(result)}  {name}\n" for name, result in results.items())
    else:
        write({name: figures(result) for name, result in results.items()})


if __name__ == "__main__":
    main(sys.argv[1:])
