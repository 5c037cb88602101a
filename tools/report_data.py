"""What a report reads from a run folder; every part but the log may be missing and is then named."""
import json
import math
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from common.errors import UserError
from run.folder import RunFolder
from run.metrics import Predictions
from run.options import Options, Resolved
from run.recipe import published_recipe
from run.recipe import read as read_recipe
from run.results import read_predictions

PARTS = {"config.yaml": "the configuration", "environment.json": "the environment", "eval.json": "the evaluation",
         "predictions.npz": "per-picture answers (python main.py --eval true --report DIR)",
         "status.json": "how the run ended"}


@dataclass
class Run:
    """One run folder, read. `log` has one dictionary per epoch, in order, each epoch once."""
    name: str
    folder: Path
    log: list[dict] = field(default_factory=list)
    unread_lines: int = 0
    events: list[dict] = field(default_factory=list)
    attempts: list[dict] = field(default_factory=list)
    status: dict = field(default_factory=dict)
    config: dict = field(default_factory=dict)
    origins: dict = field(default_factory=dict)
    environment: dict = field(default_factory=dict)
    evaluation: dict = field(default_factory=dict)
    predictions: Predictions | None = None
    missing: list[str] = field(default_factory=list)

    def column(self, key: str) -> list[float | None]:
        """The values of one key of the log, None where an epoch lacks it."""
        return [row.get(key) if isinstance(row.get(key), (int, float)) else None for row in self.log]

    def best(self, key: str) -> tuple[float, int] | None:
        """(highest value, its epoch) of one key of the log, the first such epoch; None without values."""
        found = [(v, -row["epoch"]) for row, v in zip(self.log, self.column(key)) if v is not None and math.isfinite(v)]
        return (max(found)[0], -max(found)[1]) if found else None

    def last(self, key: str) -> float | None:
        values = [v for v in self.column(key) if v is not None]
        return values[-1] if values else None


def read_run(path: str | Path) -> Run:
    """Read a run folder, or a lone log.txt. Raises UserError when there is nothing to report."""
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    log_file = folder / "log.txt" if path.is_dir() else path
    if not path.exists():
        raise UserError(f"{path} does not exist: name a run folder (the --output_dir of a training) or its log.txt")
    run = Run(folder.resolve().name, folder)
    rows, run.unread_lines = _json_lines(log_file)
    epochs = {row["epoch"]: row for row in rows if isinstance(row.get("epoch"), int)}  # a repeated epoch: the last one
    run.log = [epochs[epoch] for epoch in sorted(epochs)]
    if path.is_dir():
        _read_parts(run)
    else:
        run.missing = list(PARTS.values())
    if not run.log and not run.evaluation:
        raise UserError(f"{path} has neither a log.txt with epochs nor an eval.json: is it the --output_dir of a run?")
    return run


def _read_parts(run: Run) -> None:
    folder = run.folder
    run.missing = [what for name, what in PARTS.items() if not (folder / name).is_file()]
    run.events, run.attempts = _json_lines(folder / "events.jsonl")[0], RunFolder(folder).attempts()
    run.status, run.environment = _json(folder / "status.json"), _json(folder / "environment.json")
    run.evaluation = _json(folder / "eval.json")
    run.config, run.origins = _config(folder / "config.yaml")
    if (folder / "predictions.npz").is_file():
        try:
            run.predictions = read_predictions(folder / "predictions.npz")
        except UserError as error:
            run.missing.append(str(error))


def _json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text("utf-8", "replace"))
        return value if isinstance(value, dict) else {}
    except (OSError, ValueError):
        return {}


def _json_lines(path: Path) -> tuple[list[dict], int]:
    if not path.is_file():
        return [], 0
    rows, unread = [], 0
    for line in path.read_text("utf-8", "replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif line.strip():
            unread += 1
    return rows, unread


def _config(path: Path) -> tuple[dict, dict]:
    """(values, origins) of the configuration a run writes: `name: value  # origin` lines."""
    try:
        origins = dict(re.findall(r"^(\w+):.*  # (\w+)$", path.read_text("utf-8", "replace"), re.MULTILINE))
        return dict(read_recipe(str(path)).values), origins
    except (OSError, UserError):
        return {}, {}


def recipe_difference(run: Run) -> dict:
    """Published values of the options in which the run departs from its model's recipe; empty where none is known."""
    names = {f.name for f in fields(Options)}
    options = Options(**{name: value for name, value in run.config.items() if name in names})
    published = published_recipe(options.model, asdict(options)) if run.config else None
    return {name: theirs for name, (_, theirs) in Resolved(options, {}, published=published).differences().items()}
