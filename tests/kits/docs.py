"""The fenced commands of README.md and TRAINING.md, for the tests that hold them to what they say.

Every ```bash block carries `run`, `dry-run` or `not-run: reason` as an HTML comment above the fence.
"""
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from launch.run_with_submitit import split

ROOT = Path(__file__).resolve().parents[2]
_BLOCK = re.compile(r"(?:<!-- (run|dry-run|not-run)(?:: ([^\n]*))? -->\n)?```(?:bash|sh|shell|console)\n(.*?)```", re.DOTALL)


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
            return words[words.index("main.py") + 1:]
        if "launch.run_with_submitit" in words and not {"status", "--module"} & {*words}:
            return split(words[words.index("launch.run_with_submitit") + 1:])[1]
        return None


def commands() -> list[Command]:
    """All commands of both files, continued lines joined."""
    found = []
    for name in ("README.md", "TRAINING.md"):
        for mark, reason, body in _BLOCK.findall((ROOT / name).read_text(encoding="utf-8")):
            for line in body.replace("\\\n", " ").splitlines():
                # Of a loop, the command that it repeats.
                text = " ".join(line.split()).removeprefix("until ").removesuffix("; do")
                if text and not text.startswith(("#", "[", "done")):
                    found.append(Command(name, mark, reason, text))
    return found
