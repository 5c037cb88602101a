"""One HTML page about a run, or about two side by side: all that its folder holds, without script or network.

`read_run` collects a folder; the functions after it turn a Run into plain values; page.html, a jinja2
template with autoescape, holds their looks. Curves are SVG drawn by matplotlib.
"""
import base64
import io
import json
import math
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np

from common.errors import UserError
from common.files import read_json, read_json_lines, write_text
from common.ledger import Ledger
from common.text import printable
from config.options import OPTIONS, Options
from config.parse import differences, read_recipe
from datasets.images import BadImage, decode_path
from models.inspect import class_titles
from models.trained import best_checkpoint
from report.metrics import Predictions, compare, confusion_pairs, metrics
from report.results import per_class, read_predictions, summary_line

COLORS = ("#2457c5", "#d6540c", "#16803c")
MOST = {"events": 60, "classes": 1000, "files": 500}  # rows of a table
_IN_MATRIX, _THUMBNAILS, _THUMBNAIL_SIDE = 24, 24, 112
_UNREADABLE = ("unreadable_image", "bad_pictures")  # the kind of event, and what earlier versions called it


# -------------------------------------------------------------------------------------------- the run folder

@dataclass(frozen=True)
class Run:
    """One run folder, read; any part may be missing. `log` has one dictionary per epoch, in order."""
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
    data: dict = field(default_factory=dict)
    evaluation: dict = field(default_factory=dict)
    predictions: Predictions | None = None
    predictions_error: str = ""

    def values(self, key: str) -> list[float]:
        """The values of one key of the log, not-a-number where an epoch lacks it."""
        return [float(v) if isinstance(v := row.get(key), (int, float)) else math.nan for row in self.log]

    def finite(self, key: str) -> list[float]:
        """The finite values of one key of the log."""
        return [v for v in self.values(key) if math.isfinite(v)]

    @property
    def recipe_difference(self) -> dict:
        """The published values of the options in which the run departs from its model's recipe."""
        options = Options(**{name: value for name, value in self.config.items() if name in OPTIONS})
        return {name: theirs for name, (_, theirs) in differences(options).items()} if self.config else {}


def read_run(path: str | Path) -> Run:
    """Read a run folder, or a lone log.txt. Raises UserError when there is nothing to report."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist: name a run folder (the --output_dir of a training) or its "
                        "log.txt.", code="missing_run")
    folder, log_file = (path, path / "log.txt") if path.is_dir() else (path.parent, path)
    rows = read_json_lines(log_file)  # of an epoch that stands twice the last counts
    lines = log_file.read_bytes().split(b"\n") if log_file.exists() else []
    epochs = {row["epoch"]: row for row in rows if isinstance(row.get("epoch"), int)}
    run = Run(name=folder.resolve().name, folder=folder, log=[epochs[epoch] for epoch in sorted(epochs)],
              unread_lines=sum(bool(line.strip()) for line in lines) - len(rows),
              **(_records(folder) if path.is_dir() else {}))
    if not run.log and not run.evaluation:
        raise UserError(f"{path} has neither a log.txt with epochs, an eval.json nor a predictions.npz: is "
                        "it the --output_dir of a run, or the --report of an evaluation?", code="missing_run")
    return run


def _records(folder: Path) -> dict:
    found: dict = {name: _json(folder / f"{name}.json") for name in ("status", "environment", "data")}
    found["evaluation"] = _json(folder / "eval.json")
    if (folder / "predictions.npz").is_file():
        try:
            found["predictions"] = p = read_predictions(folder / "predictions.npz")
            if not found["evaluation"]:  # the --report folder of an evaluation kept elsewhere
                counts = p.counts()
                found["evaluation"] = metrics(p, len(p.classes)) | {
                    name: getattr(counts, name) for name in ("acc1", "acc5", "loss", "hits1", "images")}
        except UserError as error:
            found["predictions_error"] = str(error)
    try:
        text = (folder / "config.yaml").read_text("utf-8", "replace")
        found["config"] = read_recipe(str(folder / "config.yaml"))
        found["origins"] = dict(re.findall(r"(?m)^(\w+):.*  # (\w+)$", text))
    except (OSError, UserError):
        pass
    return found | {"events": read_json_lines(folder / "events.jsonl"), "attempts": Ledger(folder).attempts()}


def _json(path: Path) -> dict:
    try:
        value = read_json(path)
    except (OSError, UserError):
        return {}
    return value if isinstance(value, dict) else {}


# --------------------------------------------------------------------------------------------------- figures

class Figure(NamedTuple):
    """One figure at the head of a page, with the number of its decimals and a remark."""
    value: float
    decimals: int = 0
    unit: str = ""
    note: str = ""

    def __str__(self) -> str:
        return f"{self.value:,.{self.decimals}f} {self.unit}".rstrip()

    def minus(self, other: "Figure") -> str:
        """The difference as text; "" between different units."""
        unit = "points" if self.unit == "%" else self.unit
        difference = f"{self.value - other.value:+,.{self.decimals}f} {unit}".rstrip()
        return difference if self.unit == other.unit else ""


def headline(run: Run) -> dict[str, Figure]:
    """The figures of one run that a reader looks for first, by their labels. Epochs count from 1."""
    found = {}
    for key, label in (("test_acc1", "top-1"), ("test_acc1_ema", "top-1 of the EMA")):
        if scores := run.finite(key):
            epoch = next(row["epoch"] for row in run.log if row.get(key) == max(scores))
            found[f"best {label}"] = Figure(max(scores), 2, "%", f"epoch {epoch + 1}")
            found[f"last {label}"] = Figure(scores[-1], 2, "%")
    if (acc1 := run.evaluation.get("acc1")) is not None:
        found["evaluated top-1"] = Figure(acc1, 2, "%", f"{run.evaluation.get('images', '?')} images")
    classes = f"{len(run.data.get('classes', ()))} classes"
    for part in ("train", "val"):
        if part in run.data:
            found[f"{part} images"] = Figure(run.data[part]["images"], note=classes)
    if run.log:
        planned = f"planned {run.config['epochs']}" if "epochs" in run.config else ""
        found["epochs"] = Figure(len(run.log), note=planned)
    for key, label, decimals in (("train_loss", "last training loss", 4), ("n_parameters", "parameters", 0)):
        if values := run.finite(key):
            found[label] = Figure(values[-1], decimals)
    for key, label, factor, decimals, unit in (("train_images_per_second", "images per second", 1, 0, ""),
                                               ("train_data_wait", "waiting for data", 100, 1, "%")):
        if values := run.finite(key):
            found[label] = Figure(factor * median(values), decimals, unit, "median of the epochs")
    if seconds := sum(run.finite("seconds")):
        unit = (1, 0, "s") if seconds < 120 else (60, 0, "min") if seconds < 7200 else (3600, 1, "h")
        found["time"] = Figure(seconds / unit[0], *unit[1:])
    return found


_CHARTS = (  # title, axis label, from zero, factor, ((key, label, line style), …)
    ("Top-1 on the validation images", "top-1 (%)", False, 1,
     (("test_acc1", "model", "-"), ("test_acc1_ema", "EMA", "--"))),
    ("Loss", "loss (nats)", False, 1, (("train_loss", "training", "-"), ("test_loss", "validation", "--"),
                                       ("test_loss_ema", "validation, EMA", ":"))),
    ("Learning rate", "learning rate", True, 1,
     (("train_lr", "largest group", "-"), ("train_min_lr", "smallest group", "--"))),
    ("Throughput", "images per second", True, 1, (("train_images_per_second", "training", "-"),)),
    ("Gradient norm before clipping", "norm", True, 1, (("train_grad_norm", "mean of the epoch", "-"),)),
    ("Waiting for data", "share of the time (%)", True, 100, (("train_data_wait", "training", "-"),)),
)


def charts(runs: list[Run]) -> list[tuple[str, str]]:
    """(title, SVG text) of each chart for which a log has values."""
    drawn = []
    for title, y_label, from_zero, factor, keys in _CHARTS:
        lines = []
        for r, run in enumerate(runs):
            epochs = [row["epoch"] + 1 for row in run.log]
            short = run.name if len(run.name) <= 18 else f"{run.name[:17]}…"
            for k, (key, label, style) in enumerate(keys):
                if run.finite(key) and (key != "train_min_lr" or run.values(key) != run.values("train_lr")):
                    name = label if len(runs) == 1 else f"{printable(short)}: {label}"
                    lines.append((epochs, [v * factor for v in run.values(key)], {
                        "label": name.replace("$", r"\$"),  # which would begin a formula
                        "linestyle": style, "color": COLORS[r if len(runs) > 1 else k]}))
        if lines:
            drawn.append((title, _draw(title, y_label, from_zero, lines, columns=3 if len(runs) == 1 else 2)))
    return drawn


def _draw(title: str, y_label: str, from_zero: bool, lines: list[tuple[list[int], list[float], dict]],
          columns: int) -> str:
    import matplotlib
    from matplotlib.figure import Figure as Canvas  # not pyplot, which keeps all figures and wants a screen
    from matplotlib.ticker import MaxNLocator

    epochs = sorted({epoch for x, _, _ in lines for epoch in x})
    with matplotlib.rc_context({
            # The salt makes names inside the SVG the same each time, and different between charts of a page.
            "svg.hashsalt": title, "svg.fonttype": "none", "font.family": "DejaVu Sans", "font.size": 9,
            "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e6e9ef",
            "axes.edgecolor": "#9aa3b1", "axes.formatter.useoffset": False, "legend.frameon": False,
            "lines.markersize": 3.5, "lines.marker": "o" if len(epochs) <= 40 else "None"}):
        canvas = Canvas(figsize=(5.6, 3.2), layout="constrained")
        axes = canvas.subplots()
        for x, y, looks in lines:
            axes.plot(x, y, **looks)
        axes.set(xlabel="epoch", ylabel=y_label)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        if len(epochs) == 1:
            axes.set(xlim=(epochs[0] - 1, epochs[0] + 1), xticks=epochs)
        if from_zero or len(epochs) == 1:
            axes.margins(y=0.1)
            axes.set_ylim(bottom=0)
        canvas.legend(loc="outside upper left", ncols=columns)
        svg = io.StringIO()
        canvas.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    text = re.sub(r".*?(<svg.*?)<metadata>.*?</metadata>", r"\1", svg.getvalue(), count=1, flags=re.DOTALL)
    return re.sub(r'<g id="[^"]*">', "<g>", text)  # every chart has the same ones


# ------------------------------------------------------------------------------------ tables of the sections

def best(run: Run) -> dict | None:
    """The best checkpoint, its manifest's score, and the commands that use it."""
    path = best_checkpoint(run.folder)
    if path is None:
        return None
    about, folder, file = _json(Path(f"{path}.json")), shlex.quote(str(run.folder)), shlex.quote(str(path))
    return {"name": path.name, "score": about.get("score"), "epoch": about.get("epoch"), "commands": (
        ("evaluate it, with results per class on this page",
         f"python main.py --eval true --output_dir {folder} --report {folder}"),
        ("classify images", f"python -m tools.predict IMAGES --resume {file}"),
        ("from Python", f"models.load({str(run.folder)!r})"))}


def incidents(run: Run) -> tuple[list[tuple[str, str]], list[tuple[str, str, str]]]:
    """Two tables: (path, when met) of each unreadable image, and (when, what, details) of other events."""
    files, rows = {}, []
    for event in run.events:
        event = event | ({"epoch": event["epoch"] + 1} if isinstance(event.get("epoch"), int) else {})
        kind, when = str(event.get("kind", "event")), str(event.get("time", ""))
        if kind in _UNREADABLE:
            for path in event.get("images", event.get("pictures", ())):
                files.setdefault(str(path), f"epoch {event['epoch']}" if "epoch" in event else when)
        else:
            rest = (f"{name} {text(value)}" for name, value in event.items()
                    if name not in ("time", "kind", "message") and value not in (None, "", [], False))
            details = "; ".join(filter(None, (str(event.get("message") or ""), *rest)))
            rows.append((when, kind.replace("_", " "), details))
    return sorted(files.items()), rows


def class_rows(run: Run) -> list[dict]:
    """One row per class: its name, training and validation images, and, once evaluated, its accuracy."""
    names = run.data.get("classes", []) if run.predictions is None else run.predictions.classes
    titles = class_titles(names)
    if run.predictions is None:
        rows = [{"name": title, "images": "", "acc1": "", "acc5": "", "times": 0} for title in titles]
    else:
        rows = per_class(run.predictions, titles)
    for part, column in (("val", "images"), ("train", "train")):
        known = run.data.get("classes") == names and part in run.data
        for row, count in zip(rows, run.data[part]["per_class"] if known else [""] * len(rows)):
            row[column] = row.get(column) or count
    return rows


def mistakes(run: Run) -> dict | None:
    """Confusion matrix, most frequent confusions and most confident mistakes; None without predictions."""
    p = run.predictions
    if p is None or not len(p.labels):
        return None
    answers, titles = p.top5[:, 0], [*class_titles(p.classes), "unreadable"]
    pairs, shown = confusion_pairs(p.labels, answers), list(range(len(p.classes)))
    if len(shown) > _IN_MATRIX:
        shown = sorted(list(dict.fromkeys(c for *both, _ in pairs for c in both if c >= 0))[:_IN_MATRIX])
    matrix = [[int(((p.labels == row) & (answers == column)).sum()) for column in shown] for row in shown]
    incorrect = np.flatnonzero((answers != p.labels) & (p.labels >= 0))
    worst = incorrect[np.argsort(-p.probabilities[incorrect, 0], kind="stable")][:_THUMBNAILS]
    hits, results = p.counts().hits1, run.evaluation.get("results") or [run.evaluation]
    return {"images": len(p.labels), "hits": hits, "all": len(shown) == len(p.classes),
            "other": all(hits != result.get("hits1") for result in results),
            "names": [titles[c] for c in shown], "matrix": matrix,
            "totals": [int((p.labels == c).sum()) for c in shown],
            "pairs": [(titles[label], titles[answer], n) for label, answer, n in pairs[:14]],
            "thumbnails": [(path := str(p.paths[i]), _thumbnail(path), titles[answers[i]],
                            titles[p.labels[i]], float(p.probabilities[i, 0])) for i in worst]}


def _thumbnail(path: str) -> str:
    """A small JPEG in base64; "" where the image is not there any more."""
    try:
        small, packed = decode_path(path), io.BytesIO()
    except (BadImage, ValueError):  # a name with a NUL character is a ValueError
        return ""
    small.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
    small.save(packed, "JPEG", quality=82)
    return base64.b64encode(packed.getvalue()).decode()


def text(value: object) -> str:
    """A value of a configuration or record as a person writes it, at most 200 characters."""
    words = value if isinstance(value, str) else "none" if value is None else json.dumps(value, default=str)
    return words if len(words) <= 200 else words[:199] + "…"


# -------------------------------------------------------------------------------------------------- the page

def paired_test(runs: list[Run]) -> str:
    """McNemar's test of two runs in one sentence, or what it lacks; "" for one run."""
    predictions = [run.predictions for run in runs if run.predictions is not None]
    if len(predictions) < 2:
        return ("No paired test (McNemar, bootstrap): both folders need a predictions.npz, which python "
                "main.py --eval true --report DIR writes.") if len(runs) == 2 else ""
    try:
        return compare(predictions[0], predictions[1]).sentence
    except UserError as error:
        return f"No paired test: {error}."


def write_report(folders: list[str | Path], out: str | Path | None = None) -> Path:
    """Write the page about one or two run folders (or log.txt files) and return its path.

    `out` defaults to report.html in the first run's folder. Raises UserError for a folder without a run.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    runs = [read_run(folder) for folder in folders]
    out = Path(out) if out is not None else runs[0].folder
    out = out / "report.html" if out.is_dir() else out
    world = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True,
                        lstrip_blocks=True, undefined=StrictUndefined, extensions=["jinja2.ext.do"])
    world.filters["text"] = text
    html = world.get_template("page.html").render(
        {f.__name__: f for f in (headline, best, incidents, class_rows, mistakes, summary_line)},
        runs=runs, charts=charts(runs), paired=paired_test(runs), most=MOST)
    out.parent.mkdir(parents=True, exist_ok=True)
    # Names with bytes that are not text are shown with a question mark: the page has to be valid UTF-8.
    write_text(out, html.encode("utf-8", "replace").decode("utf-8"))
    return out
