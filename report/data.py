"""What a report reads from a run folder; any part may be missing, not all of them."""
import math
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from common.errors import UserError
from common.files import read_json, read_json_lines
from run.folder import RunFolder
from report.metrics import Predictions, metrics
from config.options import Options
from config.parse import Resolved, published_recipe, read_recipe
from report.results import read_predictions


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
    predictions_error: str = ""

    def column(self, key: str) -> list[float | None]:
        """The values of one key of the log, None where an epoch lacks it."""
        return [row.get(key) if isinstance(row.get(key), (int, float)) else None for row in self.log]

    def best(self, key: str) -> tuple[float, int] | None:
        """(highest value, its epoch) of one key of the log, the first such epoch; None without values."""
        found = [(v, -row["epoch"]) for row, v in zip(self.log, self.column(key)) if v is not None and math.isfinite(v)]
        return (max(found)[0], -max(found)[1]) if found else None

    def values(self, key: str) -> list[float]:
        """The values of one key of the log, without the epochs that lack it."""
        return [v for v in self.column(key) if v is not None]

    def last(self, key: str) -> float | None:
        return (self.values(key) or [None])[-1]


def read_run(path: str | Path) -> Run:
    """Read a run folder, or a lone log.txt. Raises UserError when there is nothing to report."""
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    log_file = folder / "log.txt" if path.is_dir() else path
    if not path.exists():
        raise UserError(f"{path} does not exist: name a run folder (the --output_dir of a training) or its log.txt")
    run = Run(folder.resolve().name, folder)
    rows = read_json_lines(log_file)
    if log_file.is_file():
        lines = sum(bool(line.strip()) for line in log_file.read_bytes().split(b"\n"))
        run.unread_lines = max(0, lines - len(rows))
    epochs = {row["epoch"]: row for row in rows if isinstance(row.get("epoch"), int)}  # a repeated epoch: the last one
    run.log = [epochs[epoch] for epoch in sorted(epochs)]
    if path.is_dir():
        _read_parts(run)
    if not run.log and not run.evaluation:
        raise UserError(f"{path} has neither a log.txt with epochs, an eval.json nor a predictions.npz: is it the "
                        "--output_dir of a run, or the --report of an evaluation?")
    return run


def _read_parts(run: Run) -> None:
    folder = run.folder
    run.events, run.attempts = read_json_lines(folder / "events.jsonl"), RunFolder(folder).attempts()
    run.status, run.environment = _json(folder / "status.json"), _json(folder / "environment.json")
    run.evaluation = _json(folder / "eval.json")
    run.config, run.origins = _config(folder / "config.yaml")
    if (folder / "predictions.npz").is_file():
        try:
            run.predictions = read_predictions(folder / "predictions.npz")
        except UserError as error:
            run.predictions_error = str(error)
    if run.predictions is not None and not run.evaluation:  # the --report folder of an evaluation kept elsewhere
        counts = run.predictions.counts()
        run.evaluation = {"acc1": counts.acc1, "acc5": counts.acc5, "loss": counts.loss, "hits1": counts.hits1,
                          "images": counts.images, **metrics(run.predictions, len(run.predictions.classes))}


def _json(path: Path) -> dict:
    try:
        value = read_json(path)
    except (OSError, UserError):
        return {}
    return value if isinstance(value, dict) else {}


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
