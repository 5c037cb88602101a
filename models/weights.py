"""Reading weights into a model: published files in both namings, other heads, other input sizes."""
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from timm.models import adapt_input_conv
from torch import Tensor, nn

from common.errors import UserError
from common.log import logger
from common.safe_load import safe_torch_load
from models.download import local_file
from models.gnconv import resize_filter
from models.hornet import CONFIGS
from models.zoo import synsets

MODEL_KEY = "model|module"  # the published default: the first of these entries that is there
ENOUGH = 0.95
StateDict = dict[str, Tensor]

_TO_OPENMMLAB = ((r"\.gnconv\.pws\.", ".gnconv.projs."), (r"\.(gamma[12])$", r".\1.weight"), (r"^norm\.", "norm3."))
_FROM_OPENMMLAB = ((r"\.gnconv\.projs\.", ".gnconv.pws."), (r"\.(gamma[12])\.weight$", r".\1"), (r"^norm3\.", "norm."))


@dataclass(frozen=True)
class LoadReport:
    """What was loaded: number of tensors, names left as they were, names without a place, the file's entry."""

    loaded: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    source_key: str

    def __str__(self) -> str:
        return (f"loaded {self.loaded}, missing {len(self.missing)}{_some(self.missing)}, "
                f"unexpected {len(self.unexpected)}{_some(self.unexpected)} tensors from '{self.source_key}'")


def load_for_model(model: nn.Module, path_or_url: str | os.PathLike, *, model_key: str = MODEL_KEY, prefix: str = "",
                   weights: str = "auto", allow_partial: bool = False, class_names: Sequence[str] | None = None,
                   new_head: bool = False) -> LoadReport:
    """Load a checkpoint file, local or at an https address, into a HorNet; the model keeps its device and dtype.

    Args:
        model_key: entries to look for, separated by "|"; anything but the default overrules `weights`.
        prefix: removed from the names of the file's tensors.
        weights: "model", "ema", or "auto" for those that scored (see `select_weights`).
        allow_partial: accept that less than 95 % of the model's tensors are in the file.
        class_names: the model's classes in logit order (ImageNet-1k's synsets for 1000 classes when None). Where
            the file's classes are known and hold these, the matching rows of its head are taken.
        new_head: for fine-tuning: leave the head as it is when the file's does not fit, instead of an error.

    Raises UserError when the file cannot be read or holds another model, another head or too little.
    """
    path = Path(local_file(path_or_url))
    checkpoint = safe_torch_load(path)
    state, source_key = select_weights(checkpoint, path.name, model_key=model_key, weights=weights, where=str(path))
    state = published_names(state, prefix)
    own_names = checkpoint.get("classes") if isinstance(checkpoint, dict) else None
    state = fit_to_model(state, model, str(path), own_names, class_names, new_head)
    report = _copy(state, model, str(path), source_key, allow_partial, new_head)
    (logger.warning if report.missing or report.unexpected else logger.info)("%s: %s", path, report)
    return report


def select_weights(checkpoint: object, file_name: str, *, model_key: str = MODEL_KEY, weights: str = "auto",
                   where: str = "the checkpoint") -> tuple[StateDict, str]:
    """The state dict to use in a loaded checkpoint, and the name of its entry.

    "auto" takes what the file's own `scored` entry names; in the authors' `checkpoint-best-ema.pth`, which has
    none, `model_ema`; otherwise the raw weights. A file may also be a bare state dict (entry name "").
    """
    if weights not in ("auto", "model", "ema"):
        raise UserError(f"weights {weights!r}: auto, model or ema is accepted.")
    if not isinstance(checkpoint, dict):
        raise UserError(f"{where} holds a {type(checkpoint).__name__}, not a checkpoint with model weights.")
    raw = [*model_key.split("|"), "state_dict"] if model_key == MODEL_KEY else model_key.split("|")
    scored = checkpoint.get("scored") or ("model_ema" if file_name == "checkpoint-best-ema.pth" else "model")
    if model_key == MODEL_KEY and (weights == "ema" or weights == "auto" and scored == "model_ema"):
        keys = ["model_ema"] if weights == "ema" else ["model_ema", *raw]
    else:
        keys = raw if weights == "model" or model_key != MODEL_KEY else [*raw, "model_ema"]
    for key in keys:
        if _is_state(checkpoint.get(key)):
            return checkpoint[key], key
    if weights != "ema" and model_key == MODEL_KEY and _is_state(checkpoint):
        return checkpoint, ""
    have = ", ".join(str(key) for key in list(checkpoint)[:8]) or "nothing"
    raise UserError(f"{where} has no weights under {' or '.join(keys)}; its entries are: {have}.")


def _is_state(value: object) -> bool:
    return isinstance(value, dict) and bool(value) and all(
        isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in value.items())


def published_names(state: StateDict, prefix: str = "") -> StateDict:
    """The same tensors under the published names: wrappers' prefixes removed, OpenMMLab's names translated."""
    strip = [re.escape(prefix)] if prefix else []
    pattern = re.compile("^(?:" + "|".join([*strip, r"module\.", r"_orig_mod\."]) + ")+")
    state = {pattern.sub("", key): value for key, value in state.items()}
    return from_openmmlab(state) if any(key.startswith("backbone.") for key in state) else state


def to_openmmlab(state: StateDict) -> StateDict:
    """A published state dict under OpenMMLab's names, in the same order; the tensors are not copied."""
    return {("head.fc." + key[5:] if key.startswith("head.") else "backbone." + _renamed(key, _TO_OPENMMLAB)): value
            for key, value in state.items()}


def from_openmmlab(state: StateDict) -> StateDict:
    """The inverse of `to_openmmlab`."""
    return {("head." + key[8:] if key.startswith("head.fc.")
             else _renamed(key.removeprefix("backbone."), _FROM_OPENMMLAB)): value for key, value in state.items()}


def _renamed(key: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def fit_to_model(state: StateDict, model: nn.Module, where: str = "the checkpoint",
                 source_classes: Sequence[str] | None = None, class_names: Sequence[str] | None = None,
                 new_head: bool = False) -> StateDict:
    """A copy of a published state dict whose head, filters and (for fine-tuning) first layer fit `model`."""
    target = model.state_dict()
    state = dict(state)
    for key in [key for key in state if key.endswith(".complex_weight") and key in target]:
        if state[key].ndim == 4 and state[key].shape[0] == target[key].shape[0]:
            state[key] = resize_filter(state[key].float(), tuple(target[key].shape[1:3]))
    if model.num_classes == 0:
        state = {key: value for key, value in state.items() if not key.startswith("head.")}
    elif _has_head(state):
        source = state["head.weight"].shape[0]
        rows = _head_rows(source, model.num_classes, source_classes, class_names, where, new_head)
        for key in ("head.weight", "head.bias"):
            if rows is None:
                del state[key]
            elif rows != list(range(len(state[key]))):
                state[key] = state[key][rows]
    stem = "downsample_layers.0.0.weight"
    if new_head and stem in state and state[stem].ndim == 4 and state[stem].shape[1] == 3 != model.in_chans:
        state[stem] = adapt_input_conv(model.in_chans, state[stem])
    return state


def _has_head(state: StateDict) -> bool:
    return all(key in state and state[key].ndim == ndim for key, ndim in (("head.weight", 2), ("head.bias", 1)))


def _head_rows(source: int, target: int, source_classes: Sequence[str] | None, class_names: Sequence[str] | None,
               where: str, new_head: bool) -> list[int] | None:
    """Which of the file's `source` head rows make the model's `target` ones; None: none, start with a new head."""
    have = list(source_classes) if source_classes and len(source_classes) == source else synsets(source)
    want = list(class_names) if class_names and len(class_names) == target else synsets(target)
    place = {name: row for row, name in enumerate(have or ())}
    if have and want and all(name in place for name in want):
        if source != target:
            logger.info("The head's rows of %d of its %d classes are taken by their names", target, source)
        return [place[name] for name in want]
    named = source_classes and class_names  # lists that only stand for a count are no reason to refuse
    if source == target and not (have and want and named):
        return list(range(source))
    if new_head:
        logger.info("%s is for %d classes, not these %d: the head starts anew", where, source, target)
        return None
    if source == target:
        strange = [name for name in want if name not in place]
        raise UserError(f"{where} was trained on other classes: {', '.join(strange[:3])} of the data are unknown to "
                        "it; fine-tune it on these data, or evaluate on the classes it knows.")
    raise UserError(f"{where} has a head for {source} classes, and the model has one for {target}; "
                    f"use --nb_classes {source}, or fine-tune with --finetune to train a new head.")


def _copy(state: StateDict, model: nn.Module, where: str, source_key: str, allow_partial: bool,
          new_head: bool) -> LoadReport:
    target = model.state_dict()
    fitting = {key: value for key, value in state.items() if key in target and value.shape == target[key].shape}
    missing = tuple(key for key in target if key not in fitting)
    unexpected = tuple(key for key in state if key not in fitting)
    report = LoadReport(len(fitting), missing, unexpected, source_key)
    expected = [key for key in target if not (new_head and key.startswith("head."))]
    found = sum(key in fitting for key in expected)
    if not allow_partial and found < ENOUGH * len(expected):
        looks = identify(state)
        hint = f"it looks like {looks}" if looks else "its tensors are not those of a HorNet"
        raise UserError(f"{where} does not hold this model, {hint}: {report}; name the model it was made with, "
                        "or use --allow_partial true.")
    if not allow_partial and not new_head and model.num_classes and any(key.startswith("head.") for key in missing):
        raise UserError(f"{where} has no head that fits the model's {model.num_classes} classes; "
                        "fine-tune with --finetune to train a new one, or use --allow_partial true.")
    broken = next((key for key, value in fitting.items() if not value.isfinite().all()), None)
    if broken is not None:
        raise UserError(f"{where} holds infinite or undefined values in {broken}: it comes from a training that "
                        "diverged; take an earlier checkpoint.")
    model.load_state_dict(fitting, strict=False)
    return report


def identify(state: StateDict) -> str | None:
    """The name of the registered architecture that a published state dict is of, by width, depths and filters."""
    stem = state.get("downsample_layers.0.0.weight")
    if stem is None or stem.ndim != 4:
        return None
    blocks = {tuple(map(int, match.groups())) for key in state if (match := re.match(r"stages\.(\d+)\.(\d+)\.", key))}
    depths = tuple(sum(stage == i for stage, _ in blocks) for i in range(4))
    grid = state.get("stages.2.0.gnconv.dwconv.complex_weight")
    kind = "conv" if grid is None else tuple(grid.shape[1:3])
    for name, cfg in CONFIGS.items():
        if (cfg.width, cfg.depths, cfg.filters[2]) == (stem.shape[0], depths, kind):
            return name
    return None


def _some(names: tuple[str, ...]) -> str:
    return f" ({', '.join(names[:2])}{', ...' if len(names) > 2 else ''})" if names else ""
