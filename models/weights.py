"""Reading weights into a model: published files in both namings, other heads, other input sizes."""
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

from timm.models import adapt_input_conv
from torch import Tensor

from common.errors import UserError
from common.log import logger
from common.safe_load import safe_torch_load
from models.gnconv import resize_filter
from models.hornet import HorNet
from models.zoo import VARIANTS, synsets

MODEL_KEY = "model|module"  # the published default: the first of these entries that is there
ENOUGH = 0.95  # of a model's tensors have to be in a file that is taken for one of this model
StateDict = dict[str, Tensor]
Names = Sequence[str] | None


class LoadReport(NamedTuple):
    """What was loaded: number of tensors, names not in the file, names without a place, the file's entry."""

    loaded: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    source_key: str

    def __str__(self) -> str:
        missing, unexpected = (f"{len(some)} ({', '.join((*some[:2], '...')[:len(some)])})" if some else "0"
                               for some in (self.missing, self.unexpected))
        return (f"loaded {self.loaded}, missing {missing}, unexpected {unexpected} tensors "
                f"from '{self.source_key}'")


def load_for_model(model: HorNet, path: str | os.PathLike, *, model_key: str = MODEL_KEY, prefix: str = "",
                   weights: str = "auto", allow_partial: bool = False, class_names: Names = None,
                   new_head: bool = False, checkpoint: object = None) -> LoadReport:
    """Load a checkpoint file into a HorNet, which keeps its device and dtype.

    Args:
        model_key: entries to look for, separated by "|"; anything but the default overrules `weights`.
        prefix: removed from the names of the file's tensors.
        weights: "model", "ema", or "auto" for those that scored (see `select_weights`).
        allow_partial: accept that less than 95 % of the model's tensors are in the file.
        class_names: the model's classes in logit order (ImageNet-1k's synsets for 1000 classes when None).
            Where the file's classes are known and hold these, the matching rows of its head are taken.
        new_head: for fine-tuning: leave the head as it is when the file's does not fit, instead of an error.
        checkpoint: the file's content where it has been read already.

    Raises UserError (`missing_weights`, `other_model`, `other_classes`, `nonfinite_weights`, and those of
    `safe_torch_load`).
    """
    path = str(path)
    checkpoint = safe_torch_load(path) if checkpoint is None else checkpoint
    state, key = select_weights(checkpoint, path, model_key=model_key, weights=weights)
    own_names = checkpoint.get("classes") if isinstance(checkpoint, dict) else None
    state = fit_to_model(published_names(state, prefix), model, path, own_names, class_names, new_head)
    target = model.state_dict()
    fitting = {name: value for name, value in state.items()
               if name in target and value.shape == target[name].shape}
    report = LoadReport(len(fitting), tuple(name for name in target if name not in fitting),
                        tuple(name for name in state if name not in fitting), key)
    if not allow_partial:
        _check_complete(report, model, path, new_head, identify(state))
    broken = next((name for name, value in fitting.items() if not value.isfinite().all()), None)
    if broken is not None:
        raise UserError(f"{path} holds infinite or undefined values in {broken}: it comes from a training "
                        "that diverged; take an earlier checkpoint.", code="nonfinite_weights")
    model.load_state_dict(fitting, strict=False)
    (logger.warning if report.missing or report.unexpected else logger.info)("%s: %s", path, report)
    return report


def select_weights(checkpoint: object, where: str, *, model_key: str = MODEL_KEY,
                   weights: str = "auto") -> tuple[StateDict, str]:
    """The state dict to use in a loaded checkpoint, and the name of its entry; `where` is the file's path.

    "auto" takes what the file's own `scored` entry names; in the authors' `checkpoint-best-ema.pth`, which
    has none, `model_ema`; otherwise the raw weights. A file may also be a bare state dict (entry name "").
    """
    if weights not in ("auto", "model", "ema"):
        raise UserError(f"weights {weights!r}: auto, model or ema is accepted.", code="invalid_value")
    entries = checkpoint if isinstance(checkpoint, dict) else {}
    keys, default = model_key.split("|"), model_key == MODEL_KEY
    if default:
        raw, ema = [*keys, "state_dict"], ["model_ema"]
        authors = "model_ema" if os.path.basename(where) == "checkpoint-best-ema.pth" else "model"
        ema_scored = (entries.get("scored") or authors) == "model_ema"
        keys = {"ema": ema, "model": raw, "auto": ema + raw if ema_scored else raw + ema}[weights]
    for key in keys:
        if _is_state(entries.get(key)):
            return entries[key], key
    if default and weights != "ema" and _is_state(entries):
        return entries, ""
    have = ", ".join(map(str, list(entries)[:8])) or f"an empty or bare {type(checkpoint).__name__}"
    raise UserError(f"{where} has no weights under {' or '.join(keys)}; it holds {have}.",
                    code="missing_weights")


def _is_state(value: object) -> bool:
    return isinstance(value, dict) and bool(value) and all(
        isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in value.items())


# Patterns and what takes their place, applied in this order: the published names and OpenMMLab's.
_TO_OPENMMLAB = ((r"^head\.", "head.fc."), (r"^norm\.", "norm3."), (r"\.gnconv\.pws\.", ".gnconv.projs."),
                 (r"\.(gamma[12])$", r".\1.weight"), (r"^(?!head\.)", "backbone."))
_FROM_OPENMMLAB = ((r"^head\.fc\.", "head."), (r"^backbone\.", ""), (r"^norm3\.", "norm."),
                   (r"\.gnconv\.projs\.", ".gnconv.pws."), (r"\.(gamma[12])\.weight$", r".\1"))


def to_openmmlab(state: StateDict) -> StateDict:
    """A published state dict under OpenMMLab's names, in the same order; the tensors are not copied."""
    return _renamed(state, _TO_OPENMMLAB)


def published_names(state: StateDict, prefix: str = "") -> StateDict:
    """The same tensors under the published names: without wrappers' prefixes, translated from OpenMMLab's."""
    wrappers = "|".join(map(re.escape, filter(None, (prefix, "module.", "_orig_mod."))))
    return _renamed(state, ((f"^(?:{wrappers})+", ""), *_FROM_OPENMMLAB))


def _renamed(state: StateDict, rules: Sequence[tuple[str, str]]) -> StateDict:
    names = list(state)
    for pattern, new in rules:
        names = [re.sub(pattern, new, name) for name in names]
    return dict(zip(names, state.values()))


def fit_to_model(state: StateDict, model: HorNet, where: str = "the checkpoint", source_classes: Names = None,
                 class_names: Names = None, new_head: bool = False) -> StateDict:
    """A copy of a published state dict whose head, filters and (for fine-tuning) first layer fit `model`."""
    target, state = model.state_dict(), dict(state)
    for key, value in state.items():
        wanted = target.get(key)
        if key.endswith(".complex_weight") and wanted is not None and value.shape[::3] == wanted.shape[::3]:
            state[key] = resize_filter(value.float(), (wanted.shape[1], wanted.shape[2]))
    head = {key: state.pop(key) for key in ("head.weight", "head.bias") if key in state}
    if model.num_classes and [value.ndim for value in head.values()] == [2, 1]:
        rows = _head_rows(len(head["head.weight"]), model.num_classes, where, source_classes, class_names,
                          new_head)
        state |= {} if rows is None else {key: value[rows] for key, value in head.items()}
    stem = state.get("downsample_layers.0.0.weight")
    if new_head and stem is not None and stem.ndim == 4 and stem.shape[1] == 3 != model.in_chans:
        state["downsample_layers.0.0.weight"] = adapt_input_conv(model.in_chans, stem)
    return state


def _head_rows(source: int, target: int, where: str, source_classes: Names, class_names: Names,
               new_head: bool) -> list[int] | None:
    """Which of the file's `source` head rows make the model's `target` ones; None: none, it is a new head."""
    have = source_classes if source_classes and len(source_classes) == source else synsets(source)
    want = class_names if class_names and len(class_names) == target else synsets(target)
    row = {name: number for number, name in enumerate(have or ())}
    unknown = [name for name in want or () if name not in row]
    if have and want and not unknown:
        if source != target:
            logger.info("%d of the head's %d classes are taken, by their names", target, source)
        return [row[name] for name in want]
    if source == target and not (have and unknown and source_classes and class_names):
        return list(range(source))  # a list of names that only stands for a count refuses nothing
    if new_head:
        logger.info("%s is for %d classes, not these %d: the head starts from scratch", where, source, target)
        return None
    such = f", such as {', '.join(unknown[:3])}" if have and unknown else ""
    raise UserError(f"{where} has a head for {source} classes, which are not the model's {target}{such}; "
                    f"train a new head with --finetune, or evaluate on its own (--nb_classes {source}).",
                    code="other_classes")


def _check_complete(report: LoadReport, model: HorNet, where: str, new_head: bool, looks: str | None) -> None:
    """Raise UserError where the file holds too little of the model, or no head for it; `looks`: its name."""
    missing = [name for name in report.missing if not (new_head and name.startswith("head."))]
    if report.loaded < ENOUGH * (report.loaded + len(missing)):
        hint = f"it looks like {looks}" if looks else "its tensors are not those of a HorNet"
        raise UserError(f"{where} does not hold this model, {hint}: {report}; name the model it was made "
                        "with, or use --allow_partial true.", code="other_model")
    if any(name.startswith("head.") for name in missing):
        raise UserError(f"{where} has no head that fits the model's {model.num_classes} classes; use "
                        "--finetune to train a new one, or --allow_partial true.", code="other_classes")


def identify(state: StateDict) -> str | None:
    """The name of the architecture that a published state dict is of, by width, depths and filters."""
    stem = state.get("downsample_layers.0.0.weight")
    if stem is None or stem.ndim != 4:
        return None
    blocks = re.findall(r"^stages\.(\d)\.\d+\.norm1\.weight$", "\n".join(state), re.MULTILINE)
    depths = tuple(map(blocks.count, "0123"))
    grid = state.get("stages.2.0.gnconv.dwconv.complex_weight")
    kind = "conv" if grid is None else tuple(grid.shape[1:3])
    return next((name for name, variant in VARIANTS.items() if kind == variant.config.filters[2]
                 and (len(stem), depths) == (variant.config.width, variant.config.depths)), None)
