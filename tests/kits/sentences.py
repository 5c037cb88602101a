"""Every sentence that the product raises or logs, for a review as text.

`python -m tests.kits.sentences` writes tests/golden/sentences.txt: the code of a UserError or Failure, or the
level of a log line, and the sentence with `{placeholders}`.
"""
import ast
import re
from pathlib import Path

from tests.kits.docs import ROOT

GOLDEN = ROOT / "tests/golden/sentences.txt"
OTHER_FOLDERS = {"tests", "benchmarks", "examples", "build", "data", "runs"}


def written(node: ast.expr, filled: bool = False) -> str:
    """A string expression as a person reads it: literals, and `{name}` for what is filled in."""
    match node:
        case ast.Constant(value=text) if not filled:
            return str(text)
        case ast.JoinedStr(values=parts):
            return "".join(map(written, parts))
        case ast.BinOp(left=left, op=ast.Add(), right=right) if not filled:
            return written(left) + written(right)
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return f"{{{name}}}"
        case ast.FormattedValue(value=inner) | ast.Subscript(value=inner) | ast.Call(func=inner) | ast.IfExp(
                body=inner):
            return written(inner, filled=True)
    return "{...}"


def sentences(source: str) -> list[str]:
    """`kind: sentence` of each UserError, Failure and log line in a module's source, sorted."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(func=ast.Name(id="UserError" | "Failure"), args=[sentence, *codes], keywords=keywords):
                codes += [keyword.value for keyword in keywords if keyword.arg == "code"]
                found.add(f"{written(codes[0]) if codes else 'usage'}: {' '.join(written(sentence).split())}")
            case ast.Call(func=ast.Attribute(value=ast.Name(id="logger"), attr=level), args=[sentence, *values]) if (
                    level in ("info", "warning", "error", "exception")):
                text = " ".join(written(sentence).split())
                for value in values:
                    text = re.sub(r"%[-+0-9.]*[a-z]", written(value, filled=True), text, count=1)
                found.add(f"{level}: {text}")
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
