"""From the command line and a recipe to checked options, each with its origin.

`parse` makes no file and reads only the recipe; it raises `UserError` for everything a person can mistype.
"""
import argparse
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
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
    values: dict[str, Value] = field(default_factory=dict)
    no_effect: dict[str, str] = field(default_factory=dict)

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
        """The options as a recipe that `--config` reads back, with the origin of each value as a comment."""
        implied = "update_freq" if self.options.global_batch else "global_batch"
        skipped = (*_PER_LAUNCH, "resume", "eval", implied)
        return "".join(f"{name}: {_yaml(value)}  # {self.origins[name]}\n"
                       for name, value in self.to_dict().items() if name not in skipped)

    def describe(self) -> str:
        """Every value with its origin and its difference from the published recipe, for `--print_config`."""
        different, lines, title = self.differences(), [], ""
        for name, option in OPTIONS.items():
            lines += ["", option.group] if option.group != title else []
            title, origin = option.group, self.origins[name]
            origin = f"{origin} ({self.recipe.name})" if origin == "recipe" and self.recipe else origin
            note = f"   published: {_shown(different[name][1])}" if name in different else ""
            lines.append(f"  {name:30s} {_shown(getattr(self.options, name)):32s} {origin}{note}")
        if self.published is None:
            last = f"{self.options.model} has no published recipe to compare with."
        else:
            count = f"{len(different)} value(s) differ from" if different else "All values are those of"
            last = (f"{count} the published recipe {self.published.name}; its global batch is "
                    f"{self.published.global_batch}.")
        return "\n".join([*lines[1:], "", last])


def parse(argv: Sequence[str], model_names: Sequence[str] = ()) -> Resolved:
    """Resolve `argv` (without the program's name): defaults, then `--config`, then flags.

    Args: model_names: the names `--model` accepts; empty: not checked.
    Raises: UserError for every mistake; SystemExit(0) after `--help` or `--help all` has been written.
    """
    flags = _flags(list(argv))
    given = {name: _convert_flag(OPTIONS[name], texts) for name, texts in flags.items() if name in OPTIONS}
    config = given.get("config")
    recipe = read_recipe(config) if isinstance(config, str) else None
    from_recipe = {n: v for n, v in recipe.values.items() if n not in _PER_LAUNCH} if recipe else {}
    options = replace(Options(), **(from_recipe | given))
    origins = dict.fromkeys(OPTIONS, "default")
    origins |= dict.fromkeys(from_recipe, "recipe") | dict.fromkeys(given, "flag")
    if model_names:
        check_model(options.model, model_names)
    ignored = (recipe.no_effect if recipe else {}) | {n: t[0] for n, t in flags.items() if n in NO_EFFECT}
    notices = [f"--{name} has no effect: {NO_EFFECT[name][1]}." for name, text in ignored.items()
               if NO_EFFECT[name][1] and text.lower() != NO_EFFECT[name][0]]
    notices += rules.settle(options, origins)
    rules.check(options)
    return Resolved(options, origins, notices, recipe, published_recipe(options.model, asdict(options)))


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
            raise UserError("a stray backslash: a line of the command ends in a backslash followed by a "
                            "space, so the next line became a command of its own; let the backslash be the "
                            "line's last character.", code="stray_backslash")
        if token == "--":
            raise UserError("`--` alone is not accepted; every value follows its flag, such as --lr 4e-3.",
                            code="unknown_flag")
    argv = [word for token in argv
            for word in (token.split("=", 1) if token.startswith(_SEVERAL) else [token])]
    try:
        found, others = _parser().parse_known_args(argv)
    except argparse.ArgumentError as error:
        name = (error.argument_name or "").removeprefix("--").partition("/")[0]
        raise UserError(f"--{name} needs a value; {OPTIONS[name].help}." if name in OPTIONS else f"{error}.",
                        code="missing_value") from None
    if others:
        before = [word for word, after in zip(argv, argv[1:]) if after == others[0]]
        raise _unexpected(others[0], before)
    return {name: text if isinstance(text, list) else [text] for name, text in vars(found).items()}


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
    """The sentence for a word that is neither a known flag nor the value of one; `before`: what stands before it."""
    name = token.lstrip("-\u2013\u2014\u2212").partition("=")[0]
    if token.startswith("--"):
        hint = did_you_mean(name.replace("-", "_"), OPTIONS, "--{}") or "; `--help all` lists every flag."
        part = name and any(flag.startswith(name) for flag in OPTIONS)
        short = " (flags are not abbreviated)" if part else ""
        return UserError(f"unknown flag --{name[:60]}{short}{hint}", code="unknown_flag")
    joined = next(filter(None, map(_joined, [*before, token])), None)
    if joined is None and token[:1] in ("-", "\u2013", "\u2014", "\u2212"):
        hint = did_you_mean(name, OPTIONS, "--{}") or "; write --name value."
        return UserError(f"{quote(token)} does not begin with two hyphens as flags do{hint}",
                         code="unknown_flag")
    return joined or UserError(f"{quote(token)} belongs to no flag; write --name value, such as --lr 4e-3.",
                               code="stray_value")


def _joined(value: str) -> UserError | None:
    """The error for `5--batch_size`: a line ending in `5\\` makes the shell join the next flag to it."""
    match = re.fullmatch(r"(.+?)\\?\s*--([a-z_]+)(=.*)?", value, re.DOTALL)
    if match is None or match[2] not in OPTIONS:
        return None
    return UserError(f"{quote(value)} is a value and the flag --{match[2]} joined by a stray backslash: put "
                     f"a space before the backslash that ends the line, as in `{match[1].strip()[-40:]} \\`.",
                     code="stray_backslash")


def _convert_flag(option: Option, texts: list[str]) -> Value:
    joined = None if option.element is str else next(filter(None, map(_joined, texts)), None)
    if joined:
        raise joined
    return option.convert(texts, f"--{option.name}")


def _shown(value: Value) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_shown, value)) or "none"
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return "''" if value == "" else f"{value:g}" if isinstance(value, float) else str(value)


# Recipes

def read_recipe(path: str) -> Recipe:
    """Read a recipe: a flat mapping of option names to values or lists of values.

    PyYAML's BaseLoader leaves every scalar a string, so that flags and recipes share one conversion and
    YAML 1.1's traps (4e-3 is a string, 0123 octal, 1:30 a number, `on` a boolean) do not arise.
    """
    name = printable(path)
    try:
        loaded = yaml.load(_text(path), Loader=_StrictLoader)
    except UserError:
        raise
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f" in line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or "the file is not valid YAML"
        raise UserError(f"recipe {name} cannot be read{place}: {reason}.", code="invalid_recipe") from None
    if not isinstance(loaded or {}, dict):
        raise UserError(f"recipe {name} must be lines of the form `name: value`, such as `lr: 4e-3`.",
                        code="invalid_recipe")
    texts = {str(key): _texts(name, str(key), value) for key, value in (loaded or {}).items()}
    values = {key: OPTIONS[key].convert(words, f"recipe {name}: {key}") for key, words in texts.items()
              if key in OPTIONS}
    return Recipe(path, values, {key: words[0] for key, words in texts.items() if key in NO_EFFECT})


def _texts(recipe: str, key: str, value: Any) -> list[str]:
    if key not in OPTIONS and key not in NO_EFFECT:
        hint = did_you_mean(key.replace("-", "_"), OPTIONS) or "; `--help all` lists every option."
        raise UserError(f"recipe {recipe} has an unknown key {quote(key)}{hint}", code="unknown_key")
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"recipe {recipe}: {key} must be a plain value or a list of plain values.",
                        code="invalid_recipe")
    return texts or [""]


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


class _StrictLoader(yaml.BaseLoader):
    """Strings only, and a key given twice is an error instead of the last one winning silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            problem = None if isinstance(key, yaml.ScalarNode) else "a key is not a plain word"
            if problem is None and key.value in seen:
                problem = f"the key {key.value!r} is given twice; keep one"
            if problem:
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _yaml(value: Any) -> str:
    style = '"' if isinstance(value, str) else None
    text = yaml.safe_dump(value, default_flow_style=True, default_style=style, width=2 ** 31)
    return text.removesuffix("...\n").rstrip("\n")


def published_recipe(model: str, values: Mapping[str, Any]) -> Recipe | None:
    """The published recipe of `model` given the other option `values`, or None.

    The large models have two, ImageNet-22k pre-training and 384-pixel fine-tuning, told apart by the start
    and the input size.
    """
    endings = ["_ft1k_384"] if values["finetune"] else ["", "_in22k", "_ft1k_384"]
    if values["input_size"] >= 384:
        endings.reverse()
    known = _recipes()
    for ending in endings:
        name = f"{model.removesuffix('_img384') if ending == '_ft1k_384' else model}{ending}"
        if name in known:
            return replace(read_recipe(str(known[name])), name=f"recipes/{name}.yaml")
    return None
