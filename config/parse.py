"""From the command line and a recipe to checked options, each with its origin.

`parse` makes no file and reads only the recipe; it raises `UserError` for everything a person can mistype.
"""
import argparse
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from common.errors import UserError
from common.text import did_you_mean, plain, printable, quote
from config import rules
from config.options import COMMON, NO_EFFECT, OPTIONS, Option, Options, Value

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
_LARGEST_RECIPE = 2 ** 20  # bytes
_SOURCES = ("model", "finetune", "pretrained", "weights")
_DASHES = "-\u2013\u2014\u2212"
_PER_LAUNCH = ("config", "print_config", "dry_run")
_SEVERAL = tuple(f"--{name}=" for name, option in OPTIONS.items() if option.several)
_USAGE = """main.py [--config RECIPE] [--FLAG VALUE ...]

  python main.py --config recipes/quickstart.yaml
  python main.py --eval true --model hornet_tiny_7x7 --resume CHECKPOINT --data_path IMAGENET
  torchrun --nproc_per_node 8 main.py --config recipes/hornet_tiny_7x7.yaml --output_dir RUN"""


@dataclass(frozen=True)
class Recipe:
    """The options of one YAML file, converted and checked one by one. `name` is the path as given."""
    name: str
    values: dict[str, Value] = field(default_factory=dict)  # those of NO_EFFECT as text

    @property
    def global_batch(self) -> int | None:
        """Images per update that the recipe's learning rate belongs to, where the file fixes it."""
        value = self.values.get("global_batch")
        return value if isinstance(value, int) else None


@dataclass(frozen=True)
class Resolved:
    """Checked options; `origins[name]` is `default`, `recipe` or `flag`; rank 0 logs the `notices` once."""
    options: Options
    origins: dict[str, str]
    notices: list[str] = field(default_factory=list)
    recipe: Recipe | None = None
    published: Recipe | None = None

    @property
    def reference(self) -> Recipe | None:
        """The recipe whose global batch the learning rate is for: the one in use, else the published one."""
        return next((r for r in (self.recipe, self.published) if r and r.global_batch), None)

    def differences(self) -> dict[str, tuple[Value, Value]]:
        """name -> (value here, published value) for the options of a recipe; empty without such."""
        if self.published is None:
            return {}
        standard, here = asdict(Options()) | self.published.values, asdict(self.options)
        names = [name for name, option in OPTIONS.items() if option.recipe and name not in _SOURCES]
        return {name: (here[name], standard[name]) for name in names if here[name] != standard[name]}

    def to_dict(self) -> dict[str, Any]:
        """Plain values (str, int, float, bool, None, lists of them) for checkpoints and JSON."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self.options).items()}

    def to_yaml(self) -> str:
        """The options as a recipe that `--config` reads back; comments have origins and published values."""
        different = self.differences()
        implied = "update_freq" if self.options.global_batch else "global_batch"
        skipped = (*_PER_LAUNCH, "resume", "eval", implied)
        lines = [f"{name}: {_yaml(value)}  # {self.origins[name]}"
                 + (f", published: {_shown(different[name][1])}" if name in different else "")
                 for name, value in self.to_dict().items() if name not in skipped]
        return "\n".join([*lines, ""])


def parse(argv: Sequence[str], model_names: Sequence[str] = ()) -> Resolved:
    """Resolve `argv` (without the program's name): defaults, then `--config`, then flags.

    Args: model_names: the names `--model` accepts; empty: not checked.
    Raises: UserError for every mistake; SystemExit(0) after `--help` or `--help all` has been written.
    """
    flags = _flags(list(argv))
    given = {name: OPTIONS[name].convert(t, f"--{name}") for name, t in flags.items() if name in OPTIONS}
    config = given.get("config")
    recipe = read_recipe(config) if isinstance(config, str) else None
    listed = recipe.values if recipe else {}
    from_recipe = {name: v for name, v in listed.items() if name in OPTIONS and name not in _PER_LAUNCH}
    options = replace(Options(), **(from_recipe | given))
    origins = dict.fromkeys(OPTIONS, "default")
    origins |= dict.fromkeys(from_recipe, "recipe") | dict.fromkeys(given, "flag")
    if model_names:
        check_model(options.model, model_names)
    ignored = listed | {name: texts[0] for name, texts in flags.items()}
    notices = [f"--{name} has no effect: {reason}." for name, (default, reason) in NO_EFFECT.items()
               if reason and str(ignored.get(name, default)).lower() != default]
    notices += rules.settle(options, origins)
    rules.check(options)
    return Resolved(options, origins, notices, recipe, published_recipe(options))


def check_model(name: str, known: Sequence[str]) -> None:
    """Raise UserError (`unknown_model`) unless `name` is one of the `known` models."""
    if name not in known:
        hint = did_you_mean(name, known) or f"; known are {', '.join(known)}."
        raise UserError(f"--model {plain(name)} is not known{hint}", code="unknown_model")


# Flags

def _flags(argv: list[str]) -> dict[str, list[str]]:
    """Flag name -> its values as text, the last of two equal flags winning; help ends here."""
    for position, token in enumerate(argv):
        if token in ("-h", "--help", "--help=all"):
            everything = token == "--help=all" or argv[position + 1:position + 2] == ["all"]
            sys.stdout.write(help_text(everything))
            raise SystemExit(0)
        if token and not token.strip(" \t\r\n\\"):
            raise UserError("a stray backslash: a line of the command ends in a backslash and a space; let "
                            "the backslash be its last character.", code="stray_backslash")
        if token == "--":
            raise _unexpected(token, [])
    argv = [word for token in argv
            for word in (token.split("=", 1) if token.startswith(_SEVERAL) else [token])]
    try:
        found, others = _parser().parse_known_args(argv)
    except argparse.ArgumentError as error:
        name = (error.argument_name or "").removeprefix("--")
        raise UserError(f"--{name} needs a value; {OPTIONS[name].help}.", code="missing_value") from None
    if others:
        before = [word for word, after in zip(argv, argv[1:]) if after == others[0]]
        raise _unexpected(others[0], before)
    values = {name: text if isinstance(text, list) else [text] for name, text in vars(found).items()}
    for name, texts in values.items():  # a path may hold two hyphens
        joined = next(filter(None, map(_joined, texts)), None)
        if joined and name in OPTIONS and OPTIONS[name].element is not str:
            raise joined
    return values


def _parser(shown: Sequence[str] = ()) -> argparse.ArgumentParser:
    """argparse for the table; values stay text. Help lists the options in `shown`."""
    width = min(shutil.get_terminal_size((110, 24)).columns, 120)
    parser = argparse.ArgumentParser(
        usage=_USAGE, add_help=False, allow_abbrev=False, exit_on_error=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=width))
    groups: dict[str, argparse._ArgumentGroup] = {}
    for name, option in OPTIONS.items():
        group = groups[option.group] = groups.get(option.group) or parser.add_argument_group(option.group)
        metavar = {bool: "true|false", int: "N", float: "X", str: "TEXT"}[option.element]
        text = _help(option) if name in shown else argparse.SUPPRESS
        if option.element is bool:
            group.add_argument(f"--{name}", nargs="?", const="true", metavar=metavar, help=text)
        else:
            group.add_argument(f"--{name}", nargs="+" if option.several else None, metavar=metavar, help=text)
    for name in NO_EFFECT:
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", nargs="?", const="true",
                            help=argparse.SUPPRESS)
    return parser


def _help(option: Option) -> str:
    accepts = option.accepts
    words = f": {accepts.words}" if accepts and option.element is str and option.name != "data_set" else ""
    return f"{option.help}{words} [{_shown(option.default)}]".replace("%", "%%")


def help_text(everything: bool = False) -> str:
    """The options people use most, or all of them, by group."""
    more = "" if everything else f"\n`--help all` lists all {len(OPTIONS)} options."
    return (_parser(list(OPTIONS) if everything else COMMON).format_help()
            + f"{more}\nSwitches take true or false; the flag alone means true.\n")


def _unexpected(token: str, before: list[str]) -> UserError:
    """The sentence for a word that is no known flag nor the value of one; `before`: words it stands after."""
    joined = next(filter(None, map(_joined, [*before, token])), None)
    if token[:1] in _DASHES and token and not joined:
        name = token.lstrip(_DASHES).partition("=")[0]
        hint = did_you_mean(name.replace("-", "_"), OPTIONS, "--{}") or "; `--help all` lists every flag."
        return UserError(f"unknown flag {plain(token)}{hint}", code="unknown_flag")
    return joined or UserError(f"{quote(token)} belongs to no flag; write --name value, such as --lr 4e-3.",
                               code="stray_value")


def _joined(value: str) -> UserError | None:
    """The error for `5--batch_size`: a line ending in `5\\` makes the shell join the next flag to it."""
    match = re.fullmatch(r".+?\\?\s*--([a-z_]+)(=.*)?", value, re.DOTALL)
    if match is None or match[1] not in OPTIONS:
        return None
    return UserError(f"{quote(value)} joins a value and the flag --{match[1]} by a stray backslash: put a "
                     "space before the backslash that ends the line.", code="stray_backslash")


def _shown(value: Value) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_shown, value)) or "none"
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return "''" if value == "" else f"{value:g}" if isinstance(value, float) else str(value)


# Recipes

def read_recipe(path: str) -> Recipe:
    """Read a recipe: a flat mapping of option names to values or lists of values.

    YAML's nodes leave every scalar a string, so that flags and recipes share one conversion, YAML 1.1's traps
    (4e-3 is a string, 0123 octal, 1:30 a number, `on` a boolean) do not arise, and a key given twice is seen.
    """
    name, values = printable(path), {}
    try:
        node = yaml.compose(_text(path), Loader=yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise _invalid(name, getattr(error, "problem", None) or "is not valid YAML",
                       getattr(error, "problem_mark", None)) from None
    if node is not None and not isinstance(node, yaml.MappingNode):
        raise _invalid(name, "lines such as `lr: 4e-3` are accepted", node.start_mark)
    for key, value in node.value if node else ():
        nodes = value.value if isinstance(value, yaml.SequenceNode) else [value]
        texts = [node.value for node in nodes] or [""]
        if not all(isinstance(text, str) for text in (key.value, *texts)):
            raise _invalid(name, "a plain name with plain values is accepted", key.start_mark)
        if key.value in values:
            raise _invalid(name, f"the key {quote(key.value)} is given twice; keep one", key.start_mark)
        if key.value not in OPTIONS and key.value not in NO_EFFECT:
            hint = did_you_mean(key.value.replace("-", "_"), OPTIONS) or "; `--help all` lists all options."
            raise UserError(f"recipe {name} has an unknown key {quote(key.value)}{hint}", code="unknown_key")
        values[key.value] = (OPTIONS[key.value].convert(texts, f"recipe {name}: {key.value}")
                             if key.value in OPTIONS else texts[0])
    return Recipe(path, values)


def _invalid(recipe: str, problem: str, mark: yaml.Mark | None) -> UserError:
    place = f", line {mark.line + 1}" if mark else ""
    return UserError(f"recipe {recipe}{place}: {problem}.", code="invalid_recipe")


def _text(path: str) -> str:
    name = plain(path) if len(path) > 200 else printable(path)
    try:
        with open(path, "rb") as file:
            raw = file.read(_LARGEST_RECIPE + 1)
        if len(raw) > _LARGEST_RECIPE:
            raise ValueError("it is larger than a recipe can be")
        return raw.decode()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        reason = "it is not a text file" if isinstance(error, UnicodeDecodeError) else reason
        # The whole path where needed: from another working folder the short one would be no help.
        folder = RECIPES.relative_to(Path.cwd()) if RECIPES.is_relative_to(Path.cwd()) else RECIPES
        hint = did_you_mean(Path(path).stem, _recipes(), f"{folder}/{{}}.yaml")
        hint = hint or f"; recipes are in {folder}/."
        raise UserError(f"--config {name} cannot be read ({reason}){hint}", code="missing_recipe") from None


def _recipes() -> dict[str, Path]:
    return {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}


def _yaml(value: object) -> str:
    style = '"' if isinstance(value, str) else None
    text = yaml.safe_dump(value, default_flow_style=True, default_style=style, width=2 ** 31)
    return text.removesuffix("...\n").rstrip("\n")


def published_recipe(options: Options) -> Recipe | None:
    """The published recipe of a run's model, or None.

    The large models have two, ImageNet-22k pre-training and 384-pixel fine-tuning: the start and the input
    size decide.
    """
    endings = ["_ft1k_384"] if options.finetune else ["", "_in22k", "_ft1k_384"]
    if options.input_size >= 384:
        endings.reverse()
    known, model = _recipes(), options.model
    names = [(model.removesuffix("_img384") if "384" in ending else model) + ending for ending in endings]
    path = next((known[name] for name in names if name in known), None)
    return path and replace(read_recipe(str(path)), name=f"recipes/{path.name}")
