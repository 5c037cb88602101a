"""From the command line and a recipe to checked options, each with its origin.

`parse` makes no file and reads only the recipe; it raises `UserError` for everything a person can mistype.
"""
import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from common.errors import UserError
from common.files import read_text
from common.text import did_you_mean, plain, quote
from config import rules
from config.options import COMMON, KINDS, NO_EFFECT, OPTIONS, RECIPE_GROUPS, Options, Value, table

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
# What a recipe cannot say: how this one run starts, and is looked at.
_SOURCES = ("model", "finetune", "pretrained", "weights")
_PER_LAUNCH = ("config", "print_config", "dry_run")
_DASHES = ("-", "\u2013", "\u2014", "\u2212")


@dataclass(frozen=True)
class Resolved:
    """Checked options; `origins[name]` is `default`, `recipe` or `flag`; rank 0 logs the `notices` once.

    `lr_batch` is the global batch that the learning rate belongs to: that of the recipe in use, else that of
    the model's published recipe, else None.
    """
    options: Options
    origins: dict[str, str]
    notices: list[str] = field(default_factory=list)
    lr_batch: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values (str, int, float, bool, None, lists of them) for checkpoints and JSON."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self.options).items()}

    def to_yaml(self) -> str:
        """The options as a recipe that `--config` reads back; comments have origins and published values."""
        different = differences(self.options)
        implied = "update_freq" if self.options.global_batch else "global_batch"
        skipped = (*_PER_LAUNCH, "resume", "eval", implied)
        lines = [f"{name}: {_yaml(value)}  # {self.origins[name]}"
                 + (f", published: {_yaml(different[name][1])}" if name in different else "")
                 for name, value in self.to_dict().items() if name in self.origins and name not in skipped]
        return "\n".join([*lines, ""])


def parse(argv: Sequence[str], kind: type[Options] = Options) -> Resolved:
    """Resolve `argv` (without the program's name): defaults of `kind`, then `--config`, then flags.

    Raises: UserError for every mistake; SystemExit(0) after `--help` or `--help all` has been written.
    """
    known = table(kind)
    try:
        found, others = _parser(kind).parse_known_args(argv)
    except argparse.ArgumentError as error:
        name = (error.argument_name or "").removeprefix("--")
        raise UserError(f"--{name} needs a value; {known[name].help}.", code="missing_value") from None
    flags = vars(found)
    if "help" in flags:
        sys.stdout.write(_parser(kind, flags["help"] == "all").format_help())
        raise SystemExit(0)
    if others:
        raise _unexpected(others[0], argv, kind)
    given = {name: known[name].convert([texts] if isinstance(texts, str) else texts, f"--{name}")
             for name, texts in flags.items() if name in known}
    recipe = {} if given.get("config") is None else read_recipe(str(given["config"]), kind)
    from_recipe = {name: v for name, v in recipe.items() if name in known and name not in _PER_LAUNCH}
    options = replace(kind(), **(from_recipe | given))
    origins = dict.fromkeys(known, "default")
    origins |= dict.fromkeys(from_recipe, "recipe") | dict.fromkeys(given, "flag")
    rules.check(options, origins)
    # Some launchers add --local_rank to every command.
    ignored = [f"--{name}" for name in NO_EFFECT if name in {*flags, *recipe} - {"local_rank"}]
    notices = [f"Without effect: {', '.join(ignored)}; the launcher says where processes run and meet, and "
               "each image is evaluated exactly once."] if ignored else []
    batch = recipe.get("global_batch") or published_recipe(options).get("global_batch")
    return Resolved(options, origins, notices, lr_batch=batch if isinstance(batch, int) else None)


def check_model(name: str, known: Sequence[str]) -> None:
    """Raise UserError (`unknown_model`) unless `name` is one of the `known` models."""
    if name not in known:
        hint = did_you_mean(name, known) or f"; known are {', '.join(known)}."
        raise UserError(f"--model {plain(name)} is not known{hint}", code="unknown_model")


# Flags

def _parser(kind: type[Options], everything: bool = False) -> argparse.ArgumentParser:
    """argparse for the table; values stay text. Help lists the options people use most, a command's own among
    them, or `everything`."""
    options = table(kind)
    more = "" if everything else f" `--help all` lists all {len(options)} options."
    parser = argparse.ArgumentParser(usage=kind.USAGE, add_help=False, allow_abbrev=False,
                                     exit_on_error=False, argument_default=argparse.SUPPRESS,
                                     formatter_class=partial(argparse.HelpFormatter, max_help_position=30),
                                     epilog=f"Switches take true or false; the flag alone means true.{more}")
    groups = {title: parser.add_argument_group(title) for title in {o.group: 0 for o in options.values()}}
    for name, option in options.items():
        words = f": {option.accepts.words}" if option.accepts and option.element is str else ""
        default = "none" if option.default in (None, "", ()) else _yaml(option.default)
        about = f"{option.help}{words} [{default}]".replace("%", "%%")
        groups[option.group].add_argument(
            f"--{name}", metavar=KINDS[option.element][0], const="true" if option.element is bool else None,
            nargs="?" if option.element is bool else "+" if option.several else None,
            help=about if everything or name in COMMON or name not in OPTIONS else argparse.SUPPRESS)
    parser.add_argument("-h", "--help", nargs="?", const="", help=argparse.SUPPRESS)
    for name in NO_EFFECT:
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", nargs="?", const="true",
                            help=argparse.SUPPRESS)
    return parser


def _unexpected(token: str, argv: Sequence[str], kind: type[Options]) -> UserError:
    """The sentence for a word that is no known flag nor the value of one."""
    known = table(kind)
    if token.startswith(_DASHES):
        name = token.lstrip("".join(_DASHES)).partition("=")[0]
        hint = did_you_mean(name.replace("-", "_"), known, "--{}") or "; `--help all` lists every flag."
        return UserError(f"unknown flag {plain(token)}{hint}", code="unknown_flag")
    # A line ending in `5\` makes the shell join the next flag to the value: `5--batch_size 128`.
    after = "".join(f" after {quote(word)}" for word, following in zip(argv, argv[1:]) if following == token)
    return UserError(f"{quote(token)}{after[:100]} belongs to no flag; write --name value, and a space "
                     "before a backslash that ends a line.", code="stray_value")


# Recipes

def read_recipe(path: str, kind: type[Options] | None = Options) -> dict[str, Value]:
    """Read a recipe: a flat mapping of option names to values or lists of values; without a `kind` of options
    names and values that main.py does not know stay texts.

    YAML's nodes leave every scalar a string, so that flags and recipes share one conversion, YAML 1.1's traps
    (4e-3 is a string, 0123 octal, 1:30 a number, `on` a boolean) do not arise, and a key given twice is seen.
    """
    name, values, known = plain(path, 300), {}, table(kind or Options)
    try:
        node = yaml.compose(read_text(path, max_bytes=2 ** 20), Loader=yaml.BaseLoader)
    except FileNotFoundError:
        folder = f"{os.path.relpath(RECIPES)}/"
        hint = did_you_mean(Path(path).stem, _recipes(), folder + "{}.yaml") or f"; recipes are in {folder}."
        raise UserError(f"--config {name} does not exist{hint}", code="missing_recipe") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise _invalid(name, getattr(error, "problem", None) or "this is not valid YAML",
                       getattr(error, "problem_mark", None)) from None
    if node is not None and not isinstance(node, yaml.MappingNode):
        raise _invalid(name, "expected are lines such as `lr: 4e-3`", node.start_mark)
    for key, value in node.value if node else ():
        nodes = value.value if isinstance(value, yaml.SequenceNode) else [value]
        texts = [node.value for node in nodes] or [""]
        if not all(isinstance(text, str) for text in (key.value, *texts)) or key.value in values:
            raise _invalid(name, "expected is each option once, with plain values", key.start_mark)
        if kind and key.value not in known and key.value not in NO_EFFECT:
            hint = did_you_mean(key.value.replace("-", "_"), known) or "; `--help all` lists all options."
            raise UserError(f"recipe {name} has an unknown key {quote(key.value)}{hint}", code="unknown_key")
        try:
            values[key.value] = known[key.value].convert(texts, f"recipe {name}: {key.value}")
        except (KeyError, UserError):
            if kind and key.value in known:
                raise
            values[key.value] = texts[0]
    return values


def _invalid(recipe: str, problem: str, mark: yaml.Mark | None) -> UserError:
    place = f", line {mark.line + 1}" if mark else ""
    return UserError(f"recipe {recipe}{place}: {problem}.", code="invalid_recipe")


def _recipes() -> dict[str, Path]:
    return {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}


def _yaml(value: object) -> str:
    style = '"' if isinstance(value, str) else None
    text = yaml.safe_dump(value, default_flow_style=True, default_style=style, width=2 ** 31)
    return text.removesuffix("...\n").rstrip("\n")


def published_recipe(options: Options) -> dict[str, Value]:
    """The values of the published recipe of a run's model; empty where none is published.

    The large models have two, ImageNet-22k pre-training and 384-pixel fine-tuning: the start and the input
    size decide.
    """
    if type(options) is not Options:
        return {}
    endings = ["_ft1k_384"] if options.finetune else ["", "_in22k", "_ft1k_384"]
    if options.input_size >= 384:
        endings.reverse()
    known, model = _recipes(), options.model
    names = [(model.removesuffix("_img384") if "384" in ending else model) + ending for ending in endings]
    return next((read_recipe(str(known[name])) for name in names if name in known), {})


def differences(options: Options) -> dict[str, tuple[Value, Value]]:
    """name -> (value here, published value) where they differ; empty without a published recipe."""
    published = published_recipe(options)
    standard, here = asdict(Options()) | published, asdict(options)
    names = [name for name, option in table(Options).items()
             if published and option.group in RECIPE_GROUPS and name not in _SOURCES]
    return {name: (here[name], standard[name]) for name in names if here[name] != standard[name]}
