"""From the command line and a recipe to checked options, each with its origin.

`parse` makes no file and reads only the recipe; it raises `UserError` for everything a person can mistype.
"""
import re
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import yaml

from common.errors import UserError
from config import rules as checks
from config.options import Options
from config.recipe import FIELDS, Recipe, convert, kind, published_recipe, quote, read, suggest

__all__ = ["Options", "Resolved", "parse", "help_text", "validate_after_index", "plan_batch"]
validate_after_index, plan_batch = checks.validate_after_index, checks.plan_batch

_PER_LAUNCH = ("config", "print_config", "dry_run", "local_rank")


@dataclass
class Resolved:
    """Checked options; `origins[name]` is `default`, `recipe` or `flag`; `notices` are for rank 0 to say once."""
    options: Options
    origins: dict[str, str]
    notices: list[str] = field(default_factory=list)
    recipe: Recipe | None = None
    published: Recipe | None = None

    @property
    def reference_batch(self) -> int | None:
        """The global batch that the learning rate belongs to: the recipe's in use, else the published one."""
        return next((r.global_batch for r in (self.recipe, self.published) if r and r.global_batch), None)

    def differences(self) -> dict[str, tuple[Any, Any]]:
        """name -> (value here, published value) for the options that make a recipe; empty without a published one."""
        if self.published is None:
            return {}
        standard = asdict(Options()) | self.published.values
        here = asdict(self.options)
        return {name: (here[name], standard[name]) for name, f in FIELDS.items() if f.metadata["recipe"]
                and here[name] != standard[name] and name not in ("model", "finetune", "pretrained", "weights")}

    def to_dict(self) -> dict[str, Any]:
        """Plain values (str, int, float, bool, None, lists of them) for checkpoints and JSON."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self.options).items()}

    def to_yaml(self) -> str:
        """The options as a recipe that `--config` reads back, with the origin of each value as a comment."""
        left_out = (*_PER_LAUNCH, "resume", "eval", "update_freq" if self.options.global_batch else "global_batch")
        lines = [f"{name}: {_yaml(getattr(self.options, name))}  # {self.origins[name]}"
                 for name in FIELDS if name not in left_out]
        return "\n".join(lines) + "\n"

    def describe(self) -> str:
        """Every value with its origin and its difference from the published recipe, for `--print_config`."""
        different = self.differences()
        lines, group = [], ""
        for name, f in FIELDS.items():
            if f.metadata["group"] != group:
                group = f.metadata["group"]
                lines += ["", group]
            origin = self.origins[name]
            origin = f"{origin} ({self.recipe.name})" if origin == "recipe" and self.recipe else origin
            note = f"   published: {_shown(different[name][1])}" if name in different else ""
            lines.append(f"  {name:30s} {_shown(getattr(self.options, name)):32s} {origin}{note}")
        return "\n".join(lines[1:] + ["", self._summary(len(different))])

    def _summary(self, count: int) -> str:
        if self.published is None:
            return f"{self.options.model} has no published recipe to compare with."
        batch = f"{self.published.name}; its global batch is {self.published.global_batch}"
        if not count:
            return f"All values are those of the published recipe {batch}."
        return f"{count} value(s) depart from the published recipe {batch}."


def parse(argv: Sequence[str], model_names: Sequence[str] = ()) -> Resolved:
    """Resolve `argv` (without the program's name): defaults, then `--config`, then flags.

    Args: model_names: the names `--model` accepts; empty: not checked.
    Raises: UserError for every mistake; SystemExit(0) after `--help` or `--help all` has been written.
    """
    flags = _convert_flags(_split(list(argv)))
    recipe = read(flags["config"]) if flags.get("config") is not None else None
    from_recipe = {n: v for n, v in recipe.values.items() if n not in _PER_LAUNCH} if recipe else {}
    options = Options(**(from_recipe | flags))
    origins = {name: "flag" if name in flags else "recipe" if name in from_recipe else "default" for name in FIELDS}
    if model_names and options.model not in model_names:
        known = suggest(options.model, model_names) or f"; known are {', '.join(model_names)}"
        raise UserError(f"--model {options.model} is not known{known if known[-1] == '?' else known + '.'}")
    published = published_recipe(options.model, asdict(options))
    notices = checks.settle(options, origins)
    checks.check(options, origins)
    return Resolved(options, origins, notices, recipe, published)


def _split(argv: list[str]) -> dict[str, list[str]]:
    """Flag name -> its values as text, with the last one winning; help ends here."""
    given: dict[str, list[str]] = {}
    name = None
    for position, token in enumerate(argv):
        if token in ("-h", "--help", "--help=all"):
            everything = token == "--help=all" or argv[position + 1:position + 2] == ["all"]
            sys.stdout.write(help_text(everything) + "\n")
            raise SystemExit(0)
        if token and not token.strip(" \t\r\n\\"):
            raise UserError("a stray backslash: a line of the command ends in a backslash followed by a space, so the "
                            "next line became a command of its own; let the backslash be the line's last character.")
        if token.startswith("--"):
            name, equals, value = token[2:].partition("=")
            name = _known(name, token)
            given[name] = [value] if equals else []
            if equals and not kind(name)[2]:
                name = None
            continue
        if name is None:
            raise _stray(token, argv[:position])
        given[name].append(token)
        if not kind(name)[2]:
            name = None
    return given


def _known(name: str, token: str) -> str:
    name = "local_rank" if name == "local-rank" else name
    if name in FIELDS:
        return name
    if token == "--":
        raise UserError("`--` alone is not accepted; every value follows its flag, such as --lr 4e-3.")
    hint = suggest(name.replace("-", "_"), FIELDS)
    hint = hint.replace("mean ", "mean --") if hint else "; `--help all` lists every flag"
    short = any(flag.startswith(name) for flag in FIELDS) and bool(name)
    raise UserError(f"unknown flag --{name[:60]}{' (flags are not abbreviated)' if short else ''}{hint}"
                    f"{'' if hint.endswith('?') else '.'}")


def _stray(token: str, before: list[str]) -> UserError:
    joined = _joined(before[-1]) if before else None
    if joined:
        return joined
    if token[0:1] in "-\u2013\u2014\u2212" and token:
        name = token.lstrip("-\u2013\u2014\u2212").partition("=")[0]
        hint = suggest(name, FIELDS).replace("mean ", "mean --")
        return UserError(f"{quote(token)} does not begin with two hyphens as flags do{hint or '; write --name value'}"
                         f"{'' if hint else '.'}")
    return _joined(token) or UserError(f"{quote(token)} belongs to no flag; write --name value, such as --lr 4e-3.")


def _joined(value: str) -> UserError | None:
    """The error for `5--batch_size`: a line ending in `5\\` makes the shell join the next line's flag to it."""
    match = re.fullmatch(r"(.+?)\\?\s*--([a-z_]+)(=.*)?", value, re.DOTALL)
    if match is None or match[2] not in FIELDS:
        return None
    return UserError(f"{quote(value)} is a value and the flag --{match[2]} joined by a stray backslash: put a space "
                     f"before the backslash that ends the line, as in `{match[1].strip()[-40:]} \\`.")


def _convert_flags(given: Mapping[str, list[str]]) -> dict[str, Any]:
    converted = {}
    for name, texts in given.items():
        element = kind(name)[0]
        if not texts and element is not bool:
            raise UserError(f"--{name} needs a value; {FIELDS[name].metadata['help']}.")
        if element is not str:
            for text in texts:
                joined = _joined(text)
                if joined:
                    raise joined
        converted[name] = convert(name, texts or ["true"], f"--{name}")
    return converted


def help_text(everything: bool = False) -> str:
    """The options people use most, or all of them by group."""
    width = min(shutil.get_terminal_size((110, 24)).columns, 120)
    lines = ["Train and evaluate HorNet on ImageNet or on one's own pictures.", "",
             "  python main.py --config recipes/quickstart.yaml",
             "  python main.py --eval true --model hornet_tiny_7x7 --resume CHECKPOINT --data_path IMAGENET",
             "  torchrun --nproc_per_node 8 main.py --config recipes/hornet_tiny_7x7.yaml --data_path IMAGENET "
             "--output_dir RUN", "",
             "Values follow their flag; switches take true or false, and the flag alone means true."]
    group = ""
    for name, f in FIELDS.items():
        if not (everything or f.metadata["common"]):
            continue
        if everything and f.metadata["group"] != group:
            group = f.metadata["group"]
            lines += ["", group]
        elif not everything and not group:
            group = "Options"
            lines += ["", "Options"]
        lines += _help_entry(name, f, width)
    if not everything:
        lines += ["", f"`--help all` lists all {len(FIELDS)} options."]
    return "\n".join(lines)


def _help_entry(name: str, f: Any, width: int) -> list[str]:
    accepts = f.metadata["accepts"]
    text = f"{f.metadata['help']}"
    if f.metadata["no_effect"]:
        text += f", without effect: {f.metadata['no_effect']}"
    elif accepts is not None and kind(name)[0] is str and accepts.words not in text and "SAMPLE" not in accepts.words:
        text += f": {accepts.words}"
    text += f" [{_shown(f.default)}]"
    body = textwrap.wrap(text, max(width - 28, 40))
    head = f"  --{name}"
    if len(head) > 26:
        return [head] + [" " * 28 + line for line in body]
    return [f"{head:28s}{body[0]}"] + [" " * 28 + line for line in body[1:]]


def _shown(value: Any) -> str:
    if value is None or value == ():
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return " ".join(map(_shown, value))
    return "''" if value == "" else f"{value:g}" if isinstance(value, float) else str(value)


def _yaml(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    if isinstance(value, str):
        return yaml.safe_dump(value, default_style='"', width=float("inf")).rstrip("\n")
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
