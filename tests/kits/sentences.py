"""Every sentence that the product raises or logs, for a review as text.

`python -m tests.kits.sentences` writes tests/golden/sentences.txt: the code of a UserError or Failure, or the
level of a log line, and the sentence with `{placeholders}`.
"""
import ast
import re
from pathlib import Path

from tests.kits.docs import ROOT

GOLDEN = ROOT / "tests/golden/sentences.txt"
LEVELS = ("debug", "info", "warning", "error", "exception", "critical")
OTHER_FOLDERS = {"tests", "benchmarks", "examples", "build", "data", "runs"}


def written(node: ast.expr) -> str:
    """A string expression as a person reads it: literals with `{name}` for what is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(written, node.values))
    if isinstance(node, ast.FormattedValue):
        inner = node.value
        return written(inner) if isinstance(inner, ast.Constant | ast.JoinedStr) else f"{{{name(inner)}}}"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return written(node.left) + written(node.right)
    return f"{{{name(node)}}}"


def name(node: ast.expr) -> str:
    """A short name for what an expression gives."""
    match node:
        case ast.Name(id=found) | ast.Attribute(attr=found):
            return found
        case ast.Call(func=inner) | ast.Subscript(value=inner) | ast.IfExp(body=inner):
            return name(inner)
    return "..."


def sentences(source: str) -> list[str]:
    """`kind: sentence` of each UserError, Failure and log line in a module's source, sorted."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        called, owner = name(node.func), name(node.func.value) if isinstance(node.func, ast.Attribute) else ""
        text = " ".join(written(node.args[0]).split())
        if called in ("UserError", "Failure"):
            codes = [keyword.value for keyword in node.keywords if keyword.arg == "code"] + node.args[1:2]
            found.add(f"{written(codes[0]) if codes else 'usage'}: {text}")
        elif owner == "logger" and called in LEVELS:
            for argument in node.args[1:]:
                text = re.sub(r"%[-+0-9.]*[a-z]", "{" + name(argument) + "}", text, count=1)
            found.add(f"{called}: {text}")
    return sorted(found)


def everything() -> str:
    """The whole golden file."""
    files = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))
    parts = []
    for path in files:
        if path.parts[0].startswith(".") or path.parts[0] in OTHER_FOLDERS:
            continue
        found = sentences((ROOT / path).read_text(encoding="utf-8"))
        parts += [f"{path}\n" + "".join(f"  {line}\n" for line in found)] if found else []
    return "\n".join(parts)


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    Path(GOLDEN).write_text(everything(), encoding="utf-8")
