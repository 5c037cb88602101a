"""One HTML page about a run, or about two runs side by side: what is in the folder, in one file without script or network.

`read_run` collects a folder; the functions after it turn a Run into plain values; page.html, a jinja2 template with
autoescape, says how they look. Curves are SVG drawn by matplotlib.
"""
import base64
import io
import json
import math
import re
import shlex
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np

from common.errors import UserError
from common.files import read_json, read_json_lines, write_text
from common.ledger import Ledger
from common.text import printable
from config.options import Options
from config.parse import Resolved
from config.parse import published_recipe
from config.parse import read_recipe as read
from datasets.images import BadImage, decode_path
from models.inspect import class_titles
from report.metrics import Predictions, compare, confusion_pairs, metrics
from report.results import per_class, read_predictions, summary_line

COLORS = ("#2457c5", "#d6540c", "#16803c")
MOST_EVENTS, MOST_CLASSES, MOST_FILES, MOST_IN_MATRIX, MOST_THUMBNAILS, THUMBNAIL_SIDE = 60, 1000, 500, 24, 24, 112
UNREADABLE = ("unreadable_image", "bad_images", "bad_pictures")  # the kind of event, and what earlier versions called it


# ------------------------------------------------------------------------------------------------------ the run folder

@dataclass(frozen=True)
class Run:
    """One run folder, read; any part may be missing, not all. `log` has one dictionary per epoch, in order."""
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
        """Published values of the options in which the run departs from its model's recipe; {} where none is known."""
        options = Options(**self.config)
        published = published_recipe(options.model, asdict(options)) if self.config else None
        return {name: theirs for name, (_, theirs) in Resolved(options, {}, published=published).differences().items()}


def read_run(path: str | Path) -> Run:
    """Read a run folder, or a lone log.txt. Raises UserError when there is nothing to report."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist: name a run folder (the --output_dir of a training) or its log.txt.",
                        code="missing_run")
    folder, log_file = (path, path / "log.txt") if path.is_dir() else (path.parent, path)
    rows = read_json_lines(log_file)
    lines = log_file.read_bytes().split(b"\n") if log_file.exists() else []
    epochs = {row["epoch"]: row for row in rows if isinstance(row.get("epoch"), int)}  # a repeated epoch: the last one
    run = Run(name=folder.resolve().name, folder=folder, log=[epochs[epoch] for epoch in sorted(epochs)],
              unread_lines=sum(bool(line.strip()) for line in lines) - len(rows),
              **(_records(folder) if path.is_dir() else {}))
    if not run.log and not run.evaluation:
        raise UserError(f"{path} has neither a log.txt with epochs, an eval.json nor a predictions.npz: is it the "
                        "--output_dir of a run, or the --report of an evaluation?", code="missing_run")
    return run


def _records(folder: Path) -> dict:
    evaluation, predictions, error = _json(folder / "eval.json"), None, ""
    if (folder / "predictions.npz").is_file():
        try:
            predictions = read_predictions(folder / "predictions.npz")
        except UserError as failure:
            error = str(failure)
    if predictions is not None and not evaluation:  # the --report folder of an evaluation kept elsewhere
        counts = predictions.counts()
        evaluation = {"acc1": counts.acc1, "acc5": counts.acc5, "loss": counts.loss, "hits1": counts.hits1,
                      "images": counts.images, **metrics(predictions, len(predictions.classes))}
    try:
        config = dict(read(str(folder / "config.yaml")).values)
        origins = dict(re.findall(r"(?m)^(\w+):.*  # (\w+)$", (folder / "config.yaml").read_text("utf-8", "replace")))
    except (OSError, UserError):
        config, origins = {}, {}
    return {"events": read_json_lines(folder / "events.jsonl"), "attempts": Ledger(folder).attempts(),
            "evaluation": evaluation, "predictions": predictions, "predictions_error": error,
            "config": config, "origins": origins,
            **{name: _json(folder / f"{name}.json") for name in ("status", "environment", "data")}}


def _json(path: Path) -> dict:
    try:
        value = read_json(path)
    except (OSError, UserError):
        return {}
    return value if isinstance(value, dict) else {}


# ------------------------------------------------------------------------------------------------------------- figures

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
        return f"{self.value - other.value:+,.{self.decimals}f} {unit}".rstrip() if self.unit == other.unit else ""


def headline(run: Run) -> dict[str, Figure]:
    """The figures of one run that a reader looks for first, by their labels. Epochs count from 1."""
    found = {}
    for key, label in (("test_acc1", "top-1"), ("test_acc1_ema", "top-1 of the EMA")):
        if scores := run.finite(key):
            epoch = next(row["epoch"] for row in run.log if row.get(key) == max(scores))
            found[f"best {label}"] = Figure(max(scores), 2, "%", f"epoch {epoch + 1}")
            found[f"last {label}"] = Figure(scores[-1], 2, "%")
    if run.evaluation.get("acc1") is not None:
        found["evaluated top-1"] = Figure(run.evaluation["acc1"], 2, "%", f"{run.evaluation.get('images', '?')} images")
    for part in ("train", "val"):
        if part in run.data:
            found[f"{part} images"] = Figure(run.data[part]["images"], note=f"{len(run.data['classes'])} classes")
    if run.log:
        found["epochs"] = Figure(len(run.log), note=f"planned {run.config['epochs']}" if "epochs" in run.config else "")
    for key, label, factor, decimals, unit in (
            ("train_loss", "last training loss", None, 4, ""), ("n_parameters", "parameters", None, 0, ""),
            ("train_images_per_second", "images per second", 1, 0, ""), ("train_data_wait", "waiting for data", 100, 1, "%")):
        if values := run.finite(key):
            found[label] = (Figure(values[-1], decimals, unit) if factor is None else
                            Figure(factor * median(values), decimals, unit, "median of the epochs"))
    if seconds := sum(run.finite("seconds")):
        divisor, decimals, unit = (1, 0, "s") if seconds < 120 else (60, 0, "min") if seconds < 7200 else (3600, 1, "h")
        found["time"] = Figure(seconds / divisor, decimals, unit)
    return found


CHARTS = (  # title, axis label, from zero, factor, ((key, label, line style), …)
    ("Top-1 on the validation images", "top-1 (%)", False, 1, (("test_acc1", "model", "-"), ("test_acc1_ema", "EMA", "--"))),
    ("Loss", "loss (nats)", False, 1,
     (("train_loss", "training", "-"), ("test_loss", "validation", "--"), ("test_loss_ema", "validation, EMA", ":"))),
    ("Learning rate", "learning rate", True, 1,
     (("train_lr", "largest group", "-"), ("train_min_lr", "smallest group", "--"))),
    ("Throughput", "images per second", True, 1, (("train_images_per_second", "training", "-"),)),
    ("Gradient norm before clipping", "norm", True, 1, (("train_grad_norm", "mean of the epoch", "-"),)),
    ("Waiting for data", "share of the time (%)", True, 100, (("train_data_wait", "training", "-"),)),
)


def charts(runs: list[Run]) -> list[tuple[str, str]]:
    """(title, SVG text) of each chart for which a log has values."""
    drawn = []
    for title, y_label, from_zero, factor, keys in CHARTS:
        lines = []
        for r, run in enumerate(runs):
            for k, (key, label, style) in enumerate(keys):
                if run.finite(key) and (key != "train_min_lr" or run.values(key) != run.values("train_lr")):
                    name = label if len(runs) == 1 else f"{_short(run.name)}: {label}"
                    lines.append((run, [v * factor for v in run.values(key)],
                                  {"label": name, "linestyle": style, "color": COLORS[r if len(runs) > 1 else k]}))
        if lines:
            drawn.append((title, _draw(title, y_label, from_zero, lines)))
    return drawn


def _short(name: str) -> str:
    """A run's name for a legend; a dollar sign would begin a formula there."""
    name = printable(name).replace("$", r"\$")
    return name if len(name) <= 18 else name[:17] + "…"


def _draw(title: str, y_label: str, from_zero: bool, lines: list[tuple[Run, list[float], dict]]) -> str:
    import matplotlib
    from matplotlib.figure import Figure as Canvas  # without pyplot, which keeps every figure and looks for a screen
    from matplotlib.ticker import MaxNLocator

    epochs = {row["epoch"] + 1 for run, _, _ in lines for row in run.log}
    # The salt makes the names inside the SVG the same each time, and different between the charts of one page.
    settings = {"svg.hashsalt": title, "svg.fonttype": "none", "font.family": "DejaVu Sans", "font.size": 9,
                "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e6e9ef",
                "axes.edgecolor": "#9aa3b1", "axes.formatter.useoffset": False, "legend.frameon": False,
                "lines.linewidth": 1.6, "lines.markersize": 3.5, "lines.marker": "o" if len(epochs) <= 40 else "None"}
    with matplotlib.rc_context(settings):
        canvas = Canvas(figsize=(5.6, 3.2), layout="constrained")
        axes = canvas.subplots()
        for run, values, looks in lines:
            axes.plot([row["epoch"] + 1 for row in run.log], values, **looks)
        axes.set(xlabel="epoch", ylabel=y_label)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        if len(epochs) == 1:
            axes.set(xlim=(min(epochs) - 1, min(epochs) + 1), xticks=[min(epochs)])
        if from_zero or len(epochs) == 1:
            axes.set_ylim(bottom=0)
        canvas.legend(loc="outside upper left", ncols=3 if len({id(run) for run, _, _ in lines}) == 1 else 2)
        svg = io.StringIO()
        canvas.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    text = re.sub(r".*?(<svg.*?)<metadata>.*?</metadata>", r"\1", svg.getvalue(), count=1, flags=re.DOTALL)
    return re.sub(r'<g id="[^"]*">', "<g>", text)  # every chart has the same ones


# ---------------------------------------------------------------------------------------------- tables of the sections

def best_checkpoint(run: Run) -> dict | None:
    """The best checkpoint (the moving average wins a tie), its score, and the commands that use it."""
    found = [(about["score"], name, about) for name in ("checkpoint-best.pth", "checkpoint-best-ema.pth")
             if (run.folder / name).is_file() and (about := _json(run.folder / f"{name}.json")).get("score") is not None]
    if not found:
        return None
    score, name, about = max(found, key=lambda item: item[0] + (item[1] == "checkpoint-best-ema.pth") * 1e-9)
    folder, path = shlex.quote(str(run.folder)), shlex.quote(str(run.folder / name))
    return {"name": name, "score": score, "epoch": about.get("epoch"), "commands": (
        ("evaluate it, with results per class on this page", f"python main.py --eval true --output_dir {folder} --report {folder}"),
        ("classify images", f"python -m tools.predict IMAGES --resume {path}"),
        ("from Python", f"models.load({str(run.folder)!r})"))}


def unreadable_files(run: Run) -> list[tuple[str, str]]:
    """(path, when it was met) of each unreadable image that the events name, each once."""
    found = {}
    for event in run.events:
        if event.get("kind") in UNREADABLE:
            epoch = event.get("epoch")
            for path in event.get("images", event.get("pictures", ())):
                found.setdefault(str(path), f"epoch {epoch + 1}" if isinstance(epoch, int) else event.get("time", ""))
    return sorted(found.items())


def incidents(run: Run) -> list[tuple[str, str, str]]:
    """(when, what, details) of each event; those that name unreadable files are left to `unreadable_files`."""
    rows = []
    for event in run.events:
        if event.get("kind") not in UNREADABLE:
            rest = {name: value + 1 if name == "epoch" and isinstance(value, int) else value for name, value in event.items()
                    if name not in ("time", "kind", "message") and value not in (None, "", [], False)}
            details = "; ".join([str(event.get("message") or ""), *(f"{k} {text(v)}" for k, v in rest.items())])
            rows.append((event.get("time", ""), str(event.get("kind", "event")).replace("_", " "), details.strip("; ")))
    return rows


def class_rows(run: Run) -> list[dict]:
    """One row per class: its name, training and validation images, and, once evaluated with --report, its accuracy."""
    names = run.predictions.classes if run.predictions is not None else run.data.get("classes", [])
    titles = class_titles(names)
    counts = [run.data.get(part, {}).get("per_class", []) if run.data.get("classes") == names else []
              for part in ("train", "val")]
    found = per_class(run.predictions) if run.predictions is not None else [None] * len(names)
    return [{"title": titles[i], "train": counts[0][i] if counts[0] else None,
             "val": row.images if row else counts[1][i] if counts[1] else None, "result": row,
             "mistaken_for": titles[row.mistaken_for] if row and row.mistaken_for >= 0 else ""}
            for i, row in enumerate(found)]


def mistakes(run: Run) -> dict | None:
    """Confusion matrix, most frequent confusions and most confident mistakes; None without predictions."""
    p = run.predictions
    if p is None or not len(p.labels):
        return None
    titles, pairs = [*class_titles(p.classes), "unreadable"], confusion_pairs(p.labels, p.top5[:, 0])
    shown = list(range(len(p.classes)))
    if len(shown) > MOST_IN_MATRIX:
        shown = sorted(list(dict.fromkeys(c for *both, _ in pairs for c in both if c >= 0))[:MOST_IN_MATRIX])
    inside = np.isin(p.labels, shown) & np.isin(p.top5[:, 0], shown)
    matrix = np.zeros((len(shown), len(shown)), int)
    np.add.at(matrix, (np.searchsorted(shown, p.labels[inside]), np.searchsorted(shown, p.top5[inside, 0])), 1)
    incorrect = np.flatnonzero((p.top5[:, 0] != p.labels) & (p.labels >= 0))
    worst = incorrect[np.argsort(-p.probabilities[incorrect, 0], kind="stable")][:MOST_THUMBNAILS]
    evaluated = {run.evaluation.get("hits1"), *(r.get("hits1") for r in run.evaluation.get("results", []))}
    return {"images": len(p.labels), "hits": (hits := p.counts().hits1), "other": hits not in evaluated, "all": len(shown) == len(p.classes),
            "names": [titles[c] for c in shown], "matrix": matrix.tolist(),
            "totals": np.bincount(p.labels[p.labels >= 0], minlength=len(p.classes))[shown].tolist(),
            "pairs": [(titles[t], titles[w], n) for t, w, n in pairs[:14]],
            "thumbnails": [{"path": path, "name": path.replace("\\", "/").split("/")[-1], "jpeg": _thumbnail(path),
                            "answer": titles[p.top5[i, 0]], "label": titles[p.labels[i]],
                            "share": float(p.probabilities[i, 0])} for i in worst for path in [str(p.paths[i])]]}


def _thumbnail(path: str) -> str:
    """A small JPEG in base64; "" where the image is not there any more."""
    try:
        small, packed = decode_path(path), io.BytesIO()
    except (BadImage, ValueError):  # a name with a NUL character is a ValueError
        return ""
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    small.save(packed, "JPEG", quality=82)
    return base64.b64encode(packed.getvalue()).decode()


def text(value: object) -> str:
    """A value of a configuration or record as a person writes it, at most 200 characters."""
    if isinstance(value, (tuple, list)):
        words = " ".join(map(text, value)) or "none"
    elif isinstance(value, dict):
        words = json.dumps(value, default=str)
    else:
        words = "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return words if len(words) <= 200 else words[:199] + "…"


# ------------------------------------------------------------------------------------------------------------ the page

def paired_test(runs: list[Run]) -> str:
    """McNemar's test of two runs in one sentence, or what it lacks; "" for one run."""
    if len(runs) < 2:
        return ""
    first, second = (run.predictions for run in runs)
    if first is None or second is None:
        return ("No paired test (McNemar, bootstrap): both folders need a predictions.npz, which "
                "python main.py --eval true --report DIR writes.")
    try:
        return compare(first, second).sentence
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
    names = (headline, best_checkpoint, unreadable_files, incidents, class_rows, mistakes, summary_line)
    html = world.get_template("page.html").render(
        {f.__name__: f for f in names}, runs=runs, charts=charts(runs), paired=paired_test(runs),
        most=MOST_EVENTS, most_classes=MOST_CLASSES, most_files=MOST_FILES)
    out.parent.mkdir(parents=True, exist_ok=True)
    # Names with bytes that are not text are shown with a question mark: the page has to be valid UTF-8.
    write_text(out, html.encode("utf-8", "replace").decode("utf-8"))
    return out
