"""The real program on a few images: its command line, its start in other processes, what it leaves."""
import json
import re
from pathlib import Path

import torch
from torch.utils._pytree import keystr, tree_flatten_with_path

from tests.kits.processes import Child, environment, places
from tests.kits.programs import hooked_main

TRAIN_IMAGES, VAL_IMAGES, GLOBAL_BATCH, EPOCHS = 52, 14, 8, 3
UPDATES = TRAIN_IMAGES // GLOBAL_BATCH  # per epoch; four images are left over
TIMINGS = ("train_images_per_second", "train_data_wait", "seconds")
# Layer scale and learning rate are large, so that every draw of the recipe leaves its mark on the weights at
# once.
OPTIONS = {
    "model": "hornet_pico_7x7", "device": "cpu", "input_size": 32, "epochs": EPOCHS, "batch_size": 4,
    "update_freq": 2, "lr": 0.01, "warmup_epochs": 1, "weight_decay_end": 0.1, "clip_grad": 0.5,
    "drop_path": 0.3, "layer_scale_init_value": 0.5, "mixup": 0.8, "cutmix": 1.0, "reprob": 0.5,
    "aa": "rand-m9-mstd0.5-inc1", "model_ema": "true", "model_ema_eval": "true", "model_ema_decay": 0.9,
    "num_workers": 0, "print_freq": 2, "seed": 5}


def arguments(data: Path, output: Path, **changes) -> list[str]:
    """main.py's command line for the small recipe; None leaves an option out."""
    values = {**OPTIONS, "data_path": data, "output_dir": output, "index_cache": data / "cache", **changes}
    return [word for name, value in values.items() if value is not None for word in (f"--{name}", str(value))]


def start(argv: list[str], output: Path, world_size: int = 1, **hook) -> list[Child]:
    """main.py as `world_size` ranks of one job, without a launcher above them; rank r of several prints to
    OUTPUT.r

    `hook`: what disturbs or watches it, see tests/kits/programs/hooked_main.py.
    """
    variables = places(world_size) if world_size > 1 else [{}]
    return [Child(hooked_main.run, (argv, hook), environment(**more),
                  output if world_size == 1 else output.with_name(f"{output.name}.{rank}"))
            for rank, more in enumerate(variables)]


def now(folder: Path, rank: int = 0) -> tuple[str, int, int]:
    """(phase, update, pid) of a rank started with `now=FOLDER`; ("", -1, 0) before its first phase."""
    try:
        phase, update, pid = (folder / f"now-{rank}").read_text().split()
    except (OSError, ValueError):
        return "", -1, 0
    return phase, int(update), int(pid)


def result(folder: Path) -> dict:
    """What a finished run leaves: its last state and log.txt, without the times."""
    found = (re.fullmatch(r"checkpoint-(\d+)\.pth", path.name) for path in folder.glob("checkpoint-*.pth"))
    last = max(int(match[1]) for match in found if match)
    state = torch.load(folder / f"checkpoint-{last}.pth", weights_only=True)
    lines = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    log = [{key: value for key, value in line.items() if key not in TIMINGS and not key.endswith("_share")}
           for line in lines]
    return {key: value for key, value in state.items() if key not in ("args", "version")} | {"log": log}


def assert_equal_bits(one, other) -> None:
    """Dicts and lists of tensors and plain values equal to the last bit; of tensors NaN equals NaN."""
    def flat(tree) -> dict:
        leaves, _ = tree_flatten_with_path(tree, is_leaf=lambda value: not isinstance(value, torch.Tensor) and not value)
        return {keystr(path): value for path, value in leaves}

    ours, theirs = flat(one), flat(other)
    assert ours.keys() == theirs.keys()
    for place, a in ours.items():
        b = theirs[place]
        same = type(a) is type(b) and a == b
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            same = (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(
                a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
        assert same, f"{place}: {a} and {b}"
