"""What a checkpoint holds: format 2 (ours) and 1 (as published), and whether it belongs to the run at hand.

Keys of format 2: format, model, model_ema, optimizer, scaler, epoch (index of the last finished epoch), update
(global updates done), seed, global_batch, pictures (of the training set), best, classes, args, code_paths, threads,
version, scored, policy (counts of non-finite updates) and sums (of an unfinished epoch). Values are tensors and plain
Python only.
"""
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from dataclasses import fields as dataclass_fields
from typing import Any

import numpy as np
import torch

from common.errors import UserError
from config.options import Options

FORMAT = 2
BEST, BEST_EMA = "checkpoint-best.pth", "checkpoint-best-ema.pth"
_NOT_THE_RECIPE = {"epochs", "start_epoch", "weights", "allow_partial", "model_key", "model_prefix", "pretrained",
                   "finetune", "grad_checkpointing", "model_ema_eval"}
_ALSO = ("data_set", "nb_classes", "seed", "use_amp", "amp_dtype")


def snapshot(value: Any) -> Any:
    """A copy of a state on the CPU that shares no memory with it: tensors and plain values, nothing else.

    Views are copied at their own size (torch.save would write the whole storage behind them).
    """
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {snapshot(k): snapshot(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(snapshot(v) for v in value) if type(value) in (list, tuple) else [*map(snapshot, value)]
    if isinstance(value, np.generic):
        return value.item()
    return value if value is None or type(value) in (bool, int, float, str, bytes) else str(value)


def state_bytes(state: Any) -> int:
    """Bytes that the tensors of a state take on the disk."""
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size() + 128
    if isinstance(state, Mapping):
        return sum(state_bytes(v) + 32 for v in state.values())
    return sum(map(state_bytes, state)) if isinstance(state, (list, tuple)) else 0


def check_finite(state: Mapping[str, Any]) -> None:
    """Raise UserError naming the first tensor of the weights or their average that is not finite."""
    for part in ("model", "model_ema"):
        for name, tensor in (state.get(part) or {}).items():
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and not tensor.isfinite().all():
                raise UserError(f"the tensor {name} of {part} holds infinite or undefined values")


def upgrade(state: Any, path: str | os.PathLike) -> dict[str, Any]:
    """Bring a state of any readable format to the keys of format 2; entries a format lacks are None.

    Published training files (format 1) call the epoch of their best files "best" and count no updates.
    """
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, not the dictionary of a checkpoint.")
    number = state.get("format", 1)
    if not isinstance(number, int) or not 1 <= number <= FORMAT:
        raise UserError(f"{path} has checkpoint format {number!r}; this version reads 1 to {FORMAT}: update the code.")
    args = state.get("args") if isinstance(state.get("args"), dict) else {}
    defaults = {"format": number, "model_ema": None, "optimizer": None, "scaler": None, "epoch": None, "update": None,
                "seed": args.get("seed"), "global_batch": None, "pictures": None, "best": {}, "classes": None,
                "args": args, "code_paths": {}, "threads": None, "version": None, "scored": None}
    full = defaults | state | {"args": args}
    if not isinstance(full["epoch"], int):
        full["epoch"] = None
    if not isinstance(full["best"], dict):
        full["best"] = {}
    return full


def check_resumable(state: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Raise UserError when training cannot go on from a state: weights alone, a published best file, odd entries."""
    missing = [key for key in ("model", "optimizer", "epoch") if state.get(key) is None]
    if missing:
        raise UserError(f"{path} has no {' and no '.join(missing)}, so training cannot go on from it; start from its "
                        "weights with --finetune, or resume a numbered checkpoint.")
    wrong = [key for key, fits in _ENTRIES.items() if state.get(key) is not None and not fits(state[key])]
    if wrong:
        raise UserError(f"{path} is not a checkpoint of a training: its entry {' and its entry '.join(wrong)} holds "
                        "something else than such files have; resume another one, or start from its weights with "
                        "--finetune.")


def _count(lowest: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and value >= lowest


def _optimizer(value: Any) -> bool:
    groups = value.get("param_groups") if isinstance(value, dict) else None
    return isinstance(groups, list) and isinstance(value.get("state"), dict) and all(
        isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups)


def _numbers(value: Any) -> bool:
    return all(v is None or isinstance(v, (int, float)) for v in value)


# What a resumed run takes for granted about an entry that is there; a file from elsewhere may hold anything.
_ENTRIES: dict[str, Callable[[Any], bool]] = {
    "model": lambda v: isinstance(v, dict), "model_ema": lambda v: isinstance(v, (dict, list)), "optimizer": _optimizer,
    "epoch": _count(-1), "update": _count(0), "seed": _count(0), "global_batch": _count(1), "pictures": _count(1),
    "threads": _count(1),
    "best": lambda v: _numbers(v.values()), "code_paths": lambda v: isinstance(v, dict),
    "policy": lambda v: isinstance(v, dict) and _numbers(v.values()), "scaler": lambda v: isinstance(v, dict),
    "sums": lambda v: isinstance(v, list) and _numbers(v),
    "classes": lambda v: isinstance(v, list) and all(isinstance(name, str) for name in v)}


def differences(state: Mapping[str, Any], args: Mapping[str, Any]) -> list[str]:
    """Sentences such as `lr 0.004 there, 0.001 here` for each option that makes a run what it is."""
    names = [f.name for f in dataclass_fields(Options) if f.metadata["recipe"] and f.name not in _NOT_THE_RECIPE]
    old = state.get("args") or {}
    return [f"{name} {old[name]} there, {args[name]} here" for name in (*names, *_ALSO)
            if name in old and name in args and _value(old[name]) != _value(args[name])]


def _value(value: Any) -> Any:
    return [*value] if isinstance(value, (list, tuple)) else None if value == "" else value


def check_same_run(state: Mapping[str, Any], args: Mapping[str, Any], path: str | os.PathLike,
                   explicit: bool = False) -> list[str]:
    """Compare the run a checkpoint comes from with the one at hand, `args` being plain values by option name.

    Raises UserError naming the difference for another model, and for another recipe unless the checkpoint was
    named with --resume (`explicit`); then returns the differences, to be said once.
    """
    found = differences(state, args)
    if found and (not explicit or any(text.startswith(("model ", "nb_classes ")) for text in found)):
        raise UserError(f"{path} belongs to another run: {'; '.join(found)}. Give the same options, choose another "
                        "--output_dir, or start from its weights with --finetune.")
    return found


def finished(state: Mapping[str, Any], epochs: int) -> bool:
    """Whether a checkpoint is the end of a run of `epochs` epochs."""
    return state.get("epoch") is not None and state["epoch"] + 1 >= epochs


@dataclass
class Best:
    """The best top-1 (percent) so far of the weights and of their moving average, kept across resumptions."""
    acc1: float | None = None
    epoch: int | None = None
    ema_acc1: float | None = None
    ema_epoch: int | None = None

    @classmethod
    def restore(cls, saved: Mapping[str, Any] | None, on_disk: tuple[float, int | None] | None,
                ema_on_disk: tuple[float, int | None] | None) -> "Best":
        """From a checkpoint's `best` and (score, epoch) of the best files, which a crash may have left newer."""
        best = cls(**{k: v for k, v in (saved or {}).items() if k in cls.__dataclass_fields__})
        if on_disk is not None and (best.acc1 is None or on_disk[0] > best.acc1):
            best.acc1, best.epoch = on_disk
        if ema_on_disk is not None and (best.ema_acc1 is None or ema_on_disk[0] > best.ema_acc1):
            best.ema_acc1, best.ema_epoch = ema_on_disk
        return best

    def update(self, epoch: int, acc1: float | None, ema_acc1: float | None = None) -> dict[str, float]:
        """Take in an epoch's results; returns {file name: score} of the best files to save, for `save(best=…)`."""
        files = {}
        if acc1 is not None and (self.acc1 is None or acc1 > self.acc1):
            self.acc1, self.epoch, files[BEST] = acc1, epoch, acc1
        if ema_acc1 is not None and (self.ema_acc1 is None or ema_acc1 > self.ema_acc1):
            self.ema_acc1, self.ema_epoch, files[BEST_EMA] = ema_acc1, epoch, ema_acc1
        return files
