"""Recipes: YAML files with options, read safely and strictly, and the published recipe of each model."""
import difflib
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from common.errors import UserError
from config.options import Options, finite

FOLDER = Path(__file__).resolve().parent.parent / "recipes"
FIELDS = {f.name: f for f in fields(Options)}
_TYPES = get_type_hints(Options)
_TRUE, _FALSE = {"true", "yes", "y", "t", "1", "on"}, {"false", "no", "n", "f", "0", "off"}
_NONE = {"none", "null", "~"}
_LARGEST_FILE = 2 ** 20


@dataclass(frozen=True)
class Recipe:
    """The options of one YAML file, converted and checked one by one. `name` is the path as given."""
    name: str
    values: dict[str, Any] = field(default_factory=dict)

    @property
    def global_batch(self) -> int | None:
        """Pictures per update that the recipe's learning rate belongs to, where the file fixes it."""
        return self.values.get("global_batch")


def suggest(word: str, words: Any) -> str:
    """`; did you mean ...?` for a misspelt `word`, or nothing."""
    near = difflib.get_close_matches(word.lower(), list(words), n=1, cutoff=0.6)
    near = near or [w for w in words if len(word) > 2 and w.startswith(word.lower())][:1]
    return f"; did you mean {near[0]}?" if near else ""


def quote(text: str) -> str:
    """`text` for a one-line sentence: in quotes, without control characters, at most 80 characters of it."""
    return repr(text if len(text) <= 80 else text[:77] + "...")


def kind(name: str) -> tuple[type, bool, bool]:
    """(element type, may be none, takes several values) of the option `name`."""
    hint = _TYPES[name]
    arguments = get_args(hint)
    optional = type(None) in arguments
    inner = next((a for a in arguments if a is not type(None)), hint) if optional else hint
    several = getattr(inner, "__origin__", None) is tuple
    return (get_args(inner)[0] if several else inner), optional, several


def convert(name: str, texts: list[str], label: str) -> Any:
    """The value of option `name` written as `texts`; `label` names it in errors (`--lr` or a YAML key).

    Raises `UserError` for a wrong type, NaN, infinity, a wrong number of values and values out of range.
    """
    element, optional, several = kind(name)
    accepts = FIELDS[name].metadata["accepts"]
    if any("\0" in text for text in texts):
        raise UserError(f"{label} holds a NUL character; remove it.")
    if (optional or several) and len(texts) == 1 and texts[0].strip().lower() in _NONE | ({""} if several else set()):
        value = None if optional else ()
    elif several:
        value = tuple(_scalar(text, element, label, accepts) for text in texts)
    elif len(texts) != 1:
        raise UserError(f"{label} takes one value, {len(texts)} were given: {quote(' '.join(texts))}.")
    else:
        value = _scalar(texts[0], element, label, accepts)
    if value is not None and (not finite(value) or accepts is not None and not accepts.test(value)):
        shown = " ".join(texts)
        shown = shown if shown.isprintable() and len(shown) <= 80 else quote(shown)
        raise UserError(f"{label} {shown} is out of range; it takes {_accepted(element, accepts, optional)}.")
    return value


def _scalar(text: str, element: type, label: str, accepts: Any) -> Any:
    word = text.strip()
    try:
        if element is bool:
            if word.lower() not in _TRUE | _FALSE:
                raise ValueError
            return word.lower() in _TRUE
        if element is str:  # the shell leaves the tilde alone in --name=~/folder, and so does YAML
            return os.path.expanduser(text) if text.startswith("~/") else text
        return element(word)
    except ValueError:
        wanted = _accepted(element, accepts, False)
        raise UserError(f"{label} {quote(text)} is not accepted; it takes {wanted}.") from None


def _accepted(element: type, accepts: Any, optional: bool) -> str:
    noun = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[element]
    words = noun if accepts is None else f"{noun} {accepts.words}" if element is not str else accepts.words
    return words + (", or none" if optional and "none" not in words else "")


def read(path: str) -> Recipe:
    """Read a recipe: a flat mapping of option names to values or lists of values.

    PyYAML's BaseLoader leaves every scalar a string, so that flags and recipes share one conversion and
    YAML 1.1's traps (4e-3 is a string, 0123 octal, 1:30 a number, `on` a boolean) do not arise.
    """
    text = _text(path)
    try:
        loaded = yaml.load(text, Loader=_StrictLoader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f" in line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or "the file is not valid YAML"
        raise UserError(f"recipe {path} cannot be read{place}: {reason}.") from None
    if loaded is None or loaded == "":
        return Recipe(path)
    if not isinstance(loaded, dict):
        raise UserError(f"recipe {path} must be lines of the form `name: value`, such as `lr: 4e-3`.")
    return Recipe(path, {str(name): _recipe_value(path, str(name), value) for name, value in loaded.items()})


def _recipe_value(path: str, name: str, value: Any) -> Any:
    if name not in FIELDS:
        hint = suggest(name.replace("-", "_"), FIELDS)
        raise UserError(f"recipe {path} has an unknown key {quote(name)}{hint or '; `--help all` lists every option.'}")
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"recipe {path}: {name} must be a plain value or a list of plain values.")
    if not texts:
        texts = [""]
    return convert(name, texts, f"recipe {path}: {name}")


def _text(path: str) -> str:
    if not path or "\0" in path:
        raise UserError("--config needs the path of a recipe, such as recipes/quickstart.yaml.")
    try:
        if os.path.isdir(path):
            raise UserError(f"--config {path} is a folder; give a recipe file such as recipes/quickstart.yaml.")
        if os.path.getsize(path) > _LARGEST_FILE:
            raise UserError(f"--config {path} is larger than a recipe can be; give a YAML file with options.")
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        if isinstance(error, UnicodeDecodeError):
            raise UserError(f"--config {path} is not a text file; give a YAML file with options.") from None
        hint = suggest(Path(path).stem, [p.stem for p in FOLDER.glob("*.yaml")])
        hint = hint.replace("mean ", "mean recipes/").replace("?", ".yaml?")
        reason = getattr(error, "strerror", None) or str(error)
        path = path if path.isprintable() and len(path) <= 200 else quote(path)
        raise UserError(f"--config {path} cannot be opened ({reason})"
                        f"{hint or '; recipes are in recipes/.'}") from None


class _StrictLoader(yaml.BaseLoader):
    """Strings only, and a key given twice is an error instead of the last one winning silently."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key is not a plain word", key_node.start_mark)
            if key_node.value in seen:
                problem = f"the key {key_node.value!r} is given twice; keep one"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def published_recipe(model: str, values: Any) -> Recipe | None:
    """The published recipe of `model` given the other option `values` (a mapping), or None.

    The large models have two, ImageNet-22k pre-training and 384-pixel fine-tuning, told apart by the start
    and the input size.
    """
    endings = ["_ft1k_384"] if values["finetune"] else ["", "_in22k", "_ft1k_384"]
    if values["input_size"] >= 384:
        endings.reverse()
    for ending in endings:
        path = FOLDER / f"{model.removesuffix('_img384') if ending == '_ft1k_384' else model}{ending}.yaml"
        if model and "/" not in model and path.is_file():
            return Recipe(f"recipes/{path.name}", read(str(path)).values)
    return None
