"""The fenced commands of README.md and TRAINING.md, for the tests that hold them to what they say.

Every ```bash block carries `run`, `dry-run` or `not-run: reason`, as an HTML comment above the fence or as a
comment in its first line.
"""
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from launch.run_with_submitit import split

ROOT = Path(__file__).resolve().parents[2]
_BLOCK = re.compile(r"(?:<!--\s*(?P<above>[^\n]*?)\s*-->\n)?```(?:bash|sh|shell|console)\n(?P<body>.*?)```",
                    re.DOTALL)
_SHELL = re.compile(r"\[|(done|do|fi|then)\b")
_MARK = re.compile(r"(run|dry-run|not-run)(?::\s*(.*))?$")


@dataclass(frozen=True)
class Command:
    """One command line: where it stands, how it is marked (`""`: not at all), and its words."""
    file: str
    mark: str
    reason: str
    text: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text, comments=True)

    @property
    def main_argv(self) -> list[str] | None:
        """The options for `main.py` in this command, None when it starts something else."""
        words = self.words
        if "main.py" in words:
            argv = words[words.index("main.py") + 1:]
            return argv[:next((i for i, word in enumerate(argv) if word.endswith(";")), len(argv))]
        if "launch.run_with_submitit" in words and not {"status", "--module"} & {*words}:
            return split(words[words.index("launch.run_with_submitit") + 1:])[1]
        return None


def commands(*names: str) -> list[Command]:
    """All commands of the named files (default README.md and TRAINING.md), continued lines joined."""
    found = []
    for name in names or ("README.md", "TRAINING.md"):
        path = ROOT / name
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        for block in _BLOCK.finditer(text):
            found += parse_block(name, block["above"] or "", block["body"])
    return found


def parse_block(name: str, above: str, body: str) -> list[Command]:
    """The commands of one fenced block."""
    lines = body.replace("\\\n", " ").splitlines()
    first = lines[0].lstrip("# ") if lines and lines[0].startswith("#") else ""
    mark = _MARK.match(above) or _MARK.match(first)
    texts = [re.sub(r"\s+", " ", re.sub(r"^\$ ", "", line)).strip() for line in lines]
    texts = [text for text in texts if text and not text.startswith("#") and not _SHELL.match(text)]
    texts = [re.sub(r";\s*do$", "", re.sub(r"^(until|while) ", "", text)) for text in texts]
    return [Command(name, mark[1] if mark else "", (mark[2] or "") if mark else "", text) for text in texts]
