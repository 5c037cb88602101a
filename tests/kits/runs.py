"""The real program on a few pictures: started within 0.1 s from a server that has PyTorch loaded, watched, compared."""
import atexit
import json
import os
import re
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from launch.processes import alive
from tests.kits.processes import FORKS, environment, wait_for
from tests.kits.programs import hooked_main

TRAIN_IMAGES, VAL_IMAGES, GLOBAL_BATCH, EPOCHS = 52, 14, 8, 3
UPDATES = TRAIN_IMAGES // GLOBAL_BATCH  # per epoch; four pictures are left over
TIMINGS = ("train_images_per_second", "train_data_wait", "seconds")
# Layer scale and learning rate are large, so that every draw of the recipe leaves its mark on the weights at once.
OPTIONS = {
    "model": "hornet_pico_7x7", "device": "cpu", "input_size": 32, "epochs": EPOCHS, "batch_size": 4, "update_freq": 2,
    "lr": 0.01, "warmup_epochs": 1, "weight_decay_end": 0.1, "clip_grad": 0.5, "drop_path": 0.3,
    "layer_scale_init_value": 0.5, "mixup": 0.8, "cutmix": 1.0, "reprob": 0.5, "aa": "rand-m9-mstd0.5-inc1",
    "model_ema": "true", "model_ema_eval": "true", "model_ema_decay": 0.9, "num_workers": 0, "print_freq": 2, "seed": 5}


def write_images(folder: Path, train: int = TRAIN_IMAGES) -> Path:
    """Pictures of noise in three classes, train/ and val/."""
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("val", VAL_IMAGES)):
        for index in range(count):
            path = folder / part / f"class{index % 3}" / f"{index:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(path)
    return folder


def arguments(data: Path, output: Path, **changes) -> list[str]:
    """main.py's command line for the small recipe; None leaves an option out."""
    values = {**OPTIONS, "data_path": data, "output_dir": output, "index_cache": data / "cache", **changes}
    return [word for name, value in values.items() if value is not None for word in (f"--{name}", str(value))]


class Started:
    """A running main.py (one rank of it); `end()` gives its exit code, negative for a signal."""

    def __init__(self, argv: list[str], output: Path, hook: dict | None = None, place: dict | None = None):
        self.output = output
        self.process = FORKS.Process(target=_child, args=(argv, str(output), hook or {}, place or {}))
        self.process.start()
        atexit.register(self.kill)

    @property
    def pid(self) -> int:
        return self.process.pid

    def end(self, seconds: float = 120) -> int:
        """Wait for the end; AssertionError (and kill -9) when there is none within `seconds`."""
        self.process.join(seconds)
        code = self.process.exitcode
        if code is None:
            self.kill()
        assert code is not None, f"no end within {seconds} s:\n{self.text()}"
        return code

    def kill(self) -> None:
        """SIGKILL, if it still runs."""
        if self.process.is_alive():
            self.process.kill()
            self.process.join(10)

    def text(self) -> str:
        """What it has printed so far."""
        return self.output.read_text() if self.output.exists() else ""


def _child(argv: list[str], output: str, hook: dict, place: dict) -> None:
    file = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.clear()
    os.environ.update(environment(**place))
    torch.set_num_threads(1)
    try:
        code = hooked_main.run(argv, hook)
    finally:
        atexit._run_exitfuncs()  # as at the end of a program; multiprocessing's children leave this out
        sys.stdout.flush()
    sys.exit(code)


def start(argv: list[str], output: Path, world_size: int = 1, **hook) -> list[Started]:
    """`world_size` ranks of one job, without a launcher above them; rank r prints to OUTPUT.r"""
    if world_size == 1:
        return [Started(argv, output, hook)]
    return [Started(argv, output.with_name(f"{output.name}.{rank}"), hook, place)
            for rank, place in enumerate(places(world_size))]


def places(world_size: int) -> list[dict[str, str]]:
    """The environments of the ranks of a new job on this machine, as a launcher without rendezvous gives them."""
    job = uuid.uuid4().hex
    return [dict(SUBMITIT_EXECUTOR="local", SUBMITIT_LOCAL_JOB_ID=job, SUBMITIT_LOCAL_GLOBALID=str(rank),
                 SUBMITIT_LOCAL_LOCALID=str(rank), SUBMITIT_LOCAL_NTASKS=str(world_size)) for rank in range(world_size)]


def codes(ranks: list[Started], seconds: float = 120) -> list[int]:
    """The exit codes of all ranks; none outlives this call."""
    try:
        deadline = time.monotonic() + seconds
        return [rank.end(max(0.1, deadline - time.monotonic())) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


def now(folder: Path, rank: int = 0) -> tuple[str, int, int]:
    """(phase, update, pid) of a rank started with `now=FOLDER`; ("", -1, 0) before its first phase."""
    try:
        phase, update, pid = (folder / f"now-{rank}").read_text().split()
    except (OSError, ValueError):
        return "", -1, 0
    return phase, int(update), int(pid)


def descendants(pid: int) -> list[int]:
    """The running processes below `pid`: loader workers, ranks below a launcher."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(child) for child in task.read_text().split()]
        except OSError:
            continue
        found += [p for child in children for p in (child, *descendants(child))]
    return [p for p in found if alive(p)]


def assert_gone(pids: list[int], seconds: float = 10) -> None:
    """No process of `pids` is left after `seconds`."""
    wait_for(lambda: not any(map(alive, pids)), seconds)


def result(folder: Path) -> dict:
    """What a finished run leaves: its last state and log.txt, without the times."""
    found = (re.fullmatch(r"checkpoint-(\d+)\.pth", path.name) for path in folder.glob("checkpoint-*.pth"))
    last = max(int(match[1]) for match in found if match)
    state = torch.load(folder / f"checkpoint-{last}.pth", weights_only=True)
    lines = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    log = [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]
    return {key: value for key, value in state.items() if key not in ("args", "version")} | {"log": log}


def assert_equal_bits(one, other, where: str = "") -> None:
    """Tensors, dicts and lists equal to the last bit; NaN equals NaN."""
    assert type(one) is type(other), f"{where}: {one} and {other}"
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one.view(torch.uint8) if one.ndim else one,
                                                        other.view(torch.uint8) if one.ndim else other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal_bits(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for index, (a, b) in enumerate(zip(one, other)):
            assert_equal_bits(a, b, f"{where}/{index}")
    else:
        assert one == other, f"{where}: {one} and {other}"
