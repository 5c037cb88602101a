"""What a checkpoint holds, declared once: `TABLE`. Which formats are read, and to which run a file belongs.

A run is made of parts, each with `state_dict` and `load_state_dict`; a checkpoint has one entry per row of
the table: a part's whole state (`model`, `optimizer`), or one value of a part that is made of plain values
(`epoch`, `update`). A new value to save is one line: a field made with `saved`, or a row of the table for a
new part. An entry that a file lacks leaves its part as it began. Values are tensors and plain Python only;
beside them stand `format` and, in a best file, `scored`, the weights that earned it.
"""
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from common.errors import UserError
from common.log import logger
from common.text import plural
from config.options import RECIPE_GROUPS, Options

State = dict[str, Any]
Valid = Callable[[Any], bool]
FORMAT = 3  # 1: files of the published training code; 2: the number of images has another name
BEST, BEST_EMA = "checkpoint-best.pth", "checkpoint-best-ema.pth"
_MAY_DIFFER = {"epochs", "start_epoch", "weights", "allow_partial", "model_key", "model_prefix", "pretrained",
               "finetune", "grad_checkpointing", "model_ema_eval"}
_ALSO = ("data_set", "nb_classes", "seed", "use_amp", "amp_dtype")


Parts = Mapping[str, Any]  # objects with state_dict and load_state_dict; None where a run lacks the part


@dataclass(frozen=True)
class Row:
    """One entry of a checkpoint: whose it is, what it may hold (a file from elsewhere may hold anything), and
    whether nothing can be resumed without it."""
    part: str
    valid: Valid
    needed: bool = False


def saved(valid: Valid, default: object = None, needed: bool = False) -> Any:
    """A field of `Values` that checkpoints hold, with its value for a new run."""
    return field(default=default, metadata={"valid": valid, "needed": needed})


@dataclass
class Values:
    """A part made of plain values: the dataclass fields that were made with `saved`."""

    @classmethod
    def rows(cls, part: str) -> dict[str, Row]:
        """A row of the table for each saved field."""
        return {f.name: Row(part, **f.metadata) for f in fields(cls) if f.metadata}

    def state_dict(self) -> State:
        """The saved values by name."""
        return {name: getattr(self, name) for name in self.rows("")}

    def load_state_dict(self, state: State) -> None:
        """Take over the values that are there."""
        vars(self).update({name: state[name] for name in self.rows("") if state.get(name) is not None})


def _is(*kinds: type) -> Valid:
    return lambda value: type(value) in kinds


def _count(lowest: int) -> Valid:
    return lambda value: type(value) is int and value >= lowest


def _each(kind: type, valid: Valid) -> Valid:
    """A list or dict all of whose values are valid."""
    values = dict.values if kind is dict else iter
    return lambda value: isinstance(value, kind) and all(map(valid, values(value)))


_number, _tensors = _is(int, float, type(None)), _each(dict, torch.is_tensor)


def _optimizer(value: object) -> bool:
    """As torch's optimizers give it; whether it fits the model is found when it is loaded."""
    return isinstance(value, dict) and {"state", "param_groups"} <= value.keys()


@dataclass
class Position(Values):
    """Where a run stands. `epoch` is the last one finished (from 0; -1: none), `update` the number of global
    updates done, `sums` (engine.Progress.sums) those of an epoch that was begun and isn't finished."""
    updates_per_epoch: int
    epoch: int = saved(_count(-1), -1, needed=True)
    update: int = saved(_count(0), 0)
    sums: list[float] | None = saved(_each(list, _number))

    @property
    def begun(self) -> int:
        """The epoch under way, from 0."""
        return self.epoch + 1

    @property
    def update_in_epoch(self) -> int:
        """Updates done of the epoch under way."""
        return self.update - self.begun * self.updates_per_epoch

    def load_state_dict(self, state: State) -> None:
        """Take over a position. Raises UserError when it isn't one of this data: images came or went.

        A run stopped between an epoch's last update and its evaluation stands at that epoch's end, with sums.
        """
        finished = state.get("epoch", self.epoch) + 1
        super().load_state_dict({"update": finished * self.updates_per_epoch} | {
            name: value for name, value in state.items() if value is not None})
        longest = 0 if self.sums is None else self.updates_per_epoch  # within an epoch there are sums
        if not 0 <= self.update_in_epoch <= longest:
            raise UserError(
                f"the checkpoint stands at update {self.update}, finished epochs: {finished}; with these "
                f"images an epoch has {self.updates_per_epoch} updates, so the data set is not the one the "
                "run began with: restore it, or use --finetune to start from the weights elsewhere.",
                code="other_run")


@dataclass
class Setup(Values):
    """What a run is made on and with: its images, their order (a digest) and classes, options, fast paths,
    CPU threads, kernels, version of the code. `other_images`: how the images differ from the checkpoint's."""
    global_batch: int = saved(_count(1))
    images: int = saved(_count(1))
    order: str = saved(_is(str))
    classes: list[str] = saved(_each(list, _is(str)))
    args: State = saved(_is(dict))
    code_paths: dict[str, str] = saved(_each(dict, _is(str)))
    threads: int = saved(_count(1))
    kernels: str = saved(_is(str))
    version: str = saved(_is(str))
    other_images: str = ""

    def load_state_dict(self, state: State) -> None:
        """Use the run's own number of threads, and report what is different now. All else was taken over
        before the data and the model were built."""
        then = self.state_dict() | {name: value for name, value in state.items() if value}
        here, there = (plural(each["images"], "image")
                       + (f" in order {each['order'][:8]}" if each["order"] else "")
                       for each in (self.state_dict(), then))
        if here != there:
            # Too few came or went to change the updates of an epoch, but every epoch's order is another one.
            self.other_images = (
                f"The training set has {here} and had {there} when the checkpoint was saved: the run is "
                "resumed, but not as an undisturbed one would continue; restore the data set to have that.")
        for level, name, more in ((logging.INFO, "threads", "those so far are used, for equal bits"),
                                  (logging.INFO, "version", "of the code"),
                                  (logging.WARNING, "kernels", "equal up to rounding, but not bit for bit")):
            if then[name] != getattr(self, name):  # a warning comes from any rank
                logger.log(level, "%s so far: %s, here: %s (%s)", name, then[name], getattr(self, name), more)
        # Sums are split by thread, so another number of threads would give other last bits.
        self.threads = then["threads"]
        torch.set_num_threads(self.threads)


TABLE: dict[str, Row] = {
    "model": Row("model", _tensors, needed=True),
    "model_ema": Row("model_ema", lambda value: value == [] or _tensors(value)),  # [] in published files
    "optimizer": Row("optimizer", _optimizer, needed=True),
    "scaler": Row("scaler", _each(dict, _number)),
    "policy": Row("policy", _each(dict, _count(0))),
    **Position.rows("position"),
    **Setup.rows("setup"),
}


def collect(parts: Parts) -> State:
    """The state of a run made of `parts`: an entry per row of the table; None for a part that it lacks."""
    states = {name: part.state_dict() for name, part in parts.items() if part is not None}
    return {"format": FORMAT} | {
        name: states.get(name) if name in parts else states[row.part][name] for name, row in TABLE.items()}


def restore(state: State, parts: Parts) -> None:
    """Give each part its entries of `state`; the inverse of `collect`."""
    for name, part in parts.items():
        entries = {entry: state.get(entry) for entry, row in TABLE.items() if row.part == name}
        found = entries.get(name, entries)
        if part is not None and found:
            part.load_state_dict(found)


def upgrade(state: object, path: str | os.PathLike) -> State:
    """Bring a state of any readable format to the entries of `TABLE`; those that a file lacks are None.

    Published training files (format 1) call the epoch of their best files "best" and count no updates.
    """
    number = state.get("format", 1) if isinstance(state, dict) else type(state).__name__
    if not isinstance(state, dict) or not isinstance(number, int) or not 1 <= number <= FORMAT:
        raise UserError(f"{path} has checkpoint format {number!r}; this version reads 1 to {FORMAT}: update "
                        "the code, or name a checkpoint of a training.", code="invalid_checkpoint")
    full = dict.fromkeys(TABLE) | state | {"format": number}
    if number == 2:
        full["images"] = state.get("pictures")
    if number == 1:
        full |= {name: None for name, row in TABLE.items() if not row.valid(full[name])}
    return full


def check_resumable(state: State, path: str | os.PathLike) -> None:
    """Raise UserError when training cannot resume from a state: weights alone, a published best file, odd
    entries."""
    odd = [name for name, row in TABLE.items()
           if (row.needed if state.get(name) is None else not row.valid(state[name]))]
    if odd:
        raise UserError(f"{path}: its entry {' and its entry '.join(odd)} is missing or unexpected: training "
                        "cannot be resumed from it; resume a numbered checkpoint, or start from its weights "
                        "with --finetune.", code="not_resumable")


def check_same_run(state: State, args: State, path: str | os.PathLike,
                   explicit: bool = False, kind: type[Options] = Options) -> list[str]:
    """Compare the run a checkpoint comes from with the one at hand, `args` being plain values by the names of
    a `kind` of options.

    Returns sentences such as `lr 0.004 there, 0.001 here` for each option that makes a run what it is. Raises
    UserError instead for another model or number of classes, and for any of them unless the checkpoint was
    named with --resume (`explicit`).
    """
    names = [f.name for f in fields(kind)
             if f.metadata.get("group") in RECIPE_GROUPS and f.name not in _MAY_DIFFER]
    plain = lambda value: [*value] if isinstance(value, (list, tuple)) else None if value == "" else value
    old = state.get("args") or {}
    found = [f"{name} {old[name]} there, {args[name]} here" for name in (*names, *_ALSO)
             if name in old and name in args and plain(old[name]) != plain(args[name])]
    if found and (not explicit or any(text.startswith(("model ", "nb_classes ")) for text in found)):
        raise UserError(f"{path} belongs to another run: {'; '.join(found)}. Give the same options, choose "
                        "another --output_dir, or start from its weights with --finetune.", code="other_run")
    return found


def finished(state: State, epochs: int) -> bool:
    """Whether a checkpoint is the end of a run of `epochs` epochs."""
    return state.get("epoch") is not None and state["epoch"] + 1 >= epochs
