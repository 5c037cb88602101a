"""One HTML page about a run, all that its folder holds, or about several compared; without script or network.

`read_run` collects a folder; the functions after it turn a Run into plain values; page.html and compare.html,
jinja2 templates with autoescape, hold their looks. Curves are SVG drawn by matplotlib.
"""
import base64
import io
import json
import math
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TypeVar

import numpy as np

from common.errors import UserError
from common.files import read_json, read_json_lines, write_text
from common.ledger import Ledger
from common.log import logger
from common.text import duration, printable, table
from config.parse import read_recipe
from models.inspect import class_titles
from models.trained import best_checkpoint
from report.metrics import Predictions, compare, confusion_pairs, sampling_interval
from report.results import per_class, read_predictions, summary_line
from run.log import SCORES

T = TypeVar("T")
COLORS = ("#2457c5", "#d6540c", "#16803c", "#8a3ab9", "#b07d00", "#0c8599", "#c2255c", "#5c6675")
LINES = ("-", "--", ":", "-.")
MOST = {"events": 60, "classes": 1000, "files": 500, "confusions": 14, "mistakes": 24}  # rows of a table
_IN_MATRIX, _SAMPLES = 24, 12  # classes, images
_UNREADABLE = ("unreadable_image", "bad_pictures")  # the kind of event, and what earlier versions called it


# -------------------------------------------------------------------------------------------- the run folder

@dataclass(frozen=True)
class Run:
    """One run folder, read; parts that are missing are empty. `log` has one dictionary per epoch, in
    order; `origins` has for each option of `config` where it came from, and what the published recipe has
    where that differs."""
    name: str
    folder: Path
    log: list[dict]
    events: list[dict]
    attempts: list[dict]
    status: dict
    environment: dict
    data: dict
    evaluation: dict
    config: dict
    origins: dict
    predictions: Predictions | None

    def values(self, key: str) -> list[float]:
        """The values of one key of the log, not-a-number where an epoch lacks it."""
        return [float(v) if isinstance(v := row.get(key), (int, float)) else math.nan for row in self.log]

    def finite(self, key: str) -> list[float]:
        """The finite values of one key of the log."""
        return [v for v in self.values(key) if math.isfinite(v)]

    @property
    def accuracy(self) -> list[float]:
        """Top-1 after each epoch of the model or of its moving average, whichever came higher."""
        return max(map(self.values, ("test_acc1", "test_acc1_ema")), key=lambda v: np.nanmax([*v, -1.0]))


def read_run(path: str | Path) -> Run:
    """Read a run folder. Raises UserError when there is nothing to report."""
    folder = Path(path)
    # Of an epoch that stands twice the last counts.
    epochs = {row["epoch"]: row for row in read_json_lines(folder / "log.txt")
              if isinstance(row.get("epoch"), int)}
    status, environment, data, evaluation = (_read(folder / f"{name}.json", read_json, {})
                                             for name in ("status", "environment", "data", "eval"))
    if not epochs and not evaluation:
        raise UserError(f"{folder} has neither a log.txt with epochs nor an eval.json: name the --output_dir "
                        "of a run, or the --report of an evaluation.", code="missing_run")
    config, origins = _read(folder / "config.yaml", _config, ({}, {}))
    flat = {name: value for key, entry in environment.items()
            for name, value in (entry.items() if isinstance(entry, dict) else [(key, entry)])}
    return Run(name=folder.resolve().name, folder=folder, log=[epochs[epoch] for epoch in sorted(epochs)],
               events=read_json_lines(folder / "events.jsonl"), attempts=Ledger(folder).attempts(),
               status=status, environment=flat, data=data, evaluation=evaluation, config=config,
               origins=origins, predictions=_read(folder / "predictions.npz", read_predictions, None))


def _read(path: Path, read: Callable[[Path], T], missing: T) -> T:
    """What `read` makes of a file; `missing` where there is none or, which is logged, one of no use."""
    try:
        found = read(path) if path.exists() else missing
        return found if missing is None or isinstance(found, type(missing)) else missing
    except UserError as error:
        logger.warning("%s", error)
        return missing


def _config(path: Path) -> tuple[dict, dict]:
    """Values of the options, and what config.yaml has in comments: where each came from, and the published
    one."""
    comments = re.compile(r"(?m)^(\w+):.*  # (\w+)(?:, published: (.*))?$")
    found = comments.findall(path.read_text("utf-8", "replace"))
    return read_recipe(str(path), None), {name: (origin, theirs) for name, origin, theirs in found}


# --------------------------------------------------------------------------------------------------- figures

def headline(run: Run) -> dict[str, tuple[str, str]]:
    """The figures that a reader looks for first, by their labels, each with a remark. Epochs count from 1."""
    found = {}
    for key, label in SCORES.items():
        if "acc5" not in key and (scores := run.finite(key)):
            epoch = next(row["epoch"] for row in run.log if row.get(key) == max(scores))
            found[f"best {label}"] = f"{max(scores):.2f} %", f"epoch {epoch + 1}"
            found[f"last {label}"] = f"{scores[-1]:.2f} %", ""
    if (acc1 := run.evaluation.get("acc1")) is not None:
        found["evaluated top-1"] = f"{acc1:.2f} %", f"{run.evaluation.get('images', '?')} images"
    for part in ("train", "val"):
        if part in run.data:
            found[f"{part} images"] = f"{run.data[part]['images']:,}", f"{len(run.data['classes'])} classes"
    if run.log:
        planned = run.config.get("epochs")
        found["epochs"] = str(len(run.log)), f"planned {planned}" if planned else ""
    if losses := run.finite("train_loss"):
        found["last training loss"] = f"{losses[-1]:.4f}", ""
    if parameters := run.finite("n_parameters"):
        found["parameters"] = f"{parameters[-1]:,.0f}", ""
    if rates := run.finite("train_images_per_second"):
        found["images per second"] = f"{median(rates):,.0f}", "median of the epochs"
    if seconds := sum(run.finite("seconds")):
        found["time"] = duration(seconds), ""
    return found


_CHARTS = (  # title, axis label, from zero, ((key, label), …)
    ("Top-1 on the validation images", "top-1 (%)", False,
     (("test_acc1", "model"), ("test_acc1_ema", "EMA"))),
    ("Segmentation", "percent", False,
     (("test_miou", "mIoU"), ("test_macc", "mAcc"), ("test_aacc", "aAcc"))),
    ("Detection", "percent", False,
     (("test_box_ap", "box AP"), ("test_mask_ap", "mask AP"), ("test_box_ap50", "box AP50"))),
    ("Loss", "loss (nats)", False, (("train_loss", "training"), ("test_loss", "validation"),
                                    ("test_loss_ema", "validation, EMA"))),
    ("Learning rate", "learning rate", True,
     (("train_lr", "largest group"), ("train_min_lr", "smallest group"))),
    ("Throughput", "images per second", True, (("train_images_per_second", "training"),)),
    ("Gradient norm before clipping", "norm", True, (("train_grad_norm", "mean of the epoch"),)),
    ("Share of the devices' peak (MFU)", "share", True, (("train_mfu", "training"),)),
    ("Where the time goes", "share of the time", True, (
        ("train_data_wait", "waiting for data"), ("train_forward_share", "forward"),
        ("train_backward_share", "backward"), ("train_step_share", "update"))),
)


def charts(runs: list[Run]) -> list[tuple[str, str]]:
    """(title, SVG text) of each chart for which a log has values."""
    drawn = []
    for title, y_label, from_zero, keys in _CHARTS:
        lines = [([row["epoch"] + 1 for row in run.log], run.values(key),
                  _looks(runs, r, k, label if len(keys) > 1 or len(runs) == 1 else ""))
                 for r, run in enumerate(runs) for k, (key, label) in enumerate(keys)
                 if run.finite(key) and (key != "train_min_lr" or run.values(key) != run.values("train_lr"))]
        if lines:
            drawn.append((title, _draw(title, {"epoch": lines}, y_label, from_zero, 4 - min(len(runs), 2))))
    return drawn


def _looks(runs: list[Run], number: int, line: int = 0, label: str = "") -> dict[str, str]:
    """Of a run's line in a chart; runs differ in colour, and so do the lines of a lone run."""
    name = "" if label and len(runs) == 1 else printable(runs[number].name[:18])
    # A dollar would begin a formula.
    return {"label": ": ".join(filter(None, (name, label))).replace("$", r"\$"),
            "color": COLORS[(number if len(runs) > 1 else line) % len(COLORS)], "linestyle": LINES[line]}


def _draw(title: str, panels: dict[str, list[tuple[list[float], list[float], dict]]], y_label: str,
          from_zero: bool, columns: int) -> str:
    """SVG text of panels side by side with one y axis: label of the x axis -> lines (x, y, looks)."""
    import matplotlib
    from matplotlib.figure import Figure  # not pyplot, which keeps all figures and wants a screen
    from matplotlib.ticker import MaxNLocator

    epochs = sorted({number for lines in panels.values() for x, _, _ in lines for number in x})
    # The salt makes names inside the SVG the same each time, and different between charts of a page.
    with matplotlib.rc_context({"svg.hashsalt": title, "lines.marker": "o" if len(epochs) <= 40 else "None"},
                               Path(__file__).with_name("charts.mplstyle")):
        canvas = Figure(figsize=(5.6 if len(panels) == 1 else 11, 3.2), layout="constrained")
        for axes, (x_label, lines) in zip(canvas.subplots(1, len(panels), squeeze=False)[0], panels.items()):
            for x, y, looks in lines:
                axes.plot(x, y, **looks)
            axes.set(xlabel=x_label, ylabel=y_label)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=x_label == "epoch"))
            if len(epochs) == 1:
                axes.set(xlim=(epochs[0] - 1, epochs[0] + 1), xticks=epochs)
            if from_zero or len(epochs) == 1:
                axes.margins(y=0.1)
                axes.set_ylim(bottom=0)
        canvas.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=columns)
        svg = io.StringIO()
        canvas.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    text = re.sub(r".*?(<svg.*?)<metadata>.*?</metadata>", r"\1", svg.getvalue(), count=1, flags=re.DOTALL)
    return re.sub(r'<g id="[^"]*">', "<g>", text)  # every chart has the same ones


# ------------------------------------------------------------------------------------ tables of the sections

def best(run: Run) -> dict | None:
    """The best checkpoint: its name, its manifest's score and epoch, its paths as a shell wants them."""
    path = best_checkpoint(run.folder)
    if path is None:
        return None
    return {"score": None, "epoch": None, **_read(Path(f"{path}.json"), read_json, {}), "name": path.name,
            "folder": shlex.quote(str(run.folder)), "file": shlex.quote(str(path))}


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
    names = run.predictions.classes if run.predictions else run.data.get("classes", [])
    titles = class_titles(names)
    rows = per_class(run.predictions, titles) if run.predictions else [{"name": title} for title in titles]
    for part, column in (("val", "images"), ("train", "train")):
        known = run.data.get(part, {}) if run.data.get("classes") == names else {}
        for row, count in zip(rows, known.get("per_class", ())):
            row.setdefault(column, count)
    return rows


def mistakes(run: Run) -> dict | None:
    """Confusion matrix, most frequent confusions, most confident mistakes; None without predictions."""
    p = run.predictions
    if p is None:
        return None
    answers, titles = p.top5[:, 0], [*class_titles(p.classes), "unreadable"]
    pairs, shown = confusion_pairs(p.labels, answers), list(range(len(p.classes)))
    if len(shown) > _IN_MATRIX:
        shown = sorted(list(dict.fromkeys(c for *both, _ in pairs for c in both if c >= 0))[:_IN_MATRIX])
    incorrect = np.flatnonzero((answers != p.labels) & (p.labels >= 0))
    worst = incorrect[np.argsort(-p.probabilities[incorrect, 0], kind="stable")][:MOST["mistakes"]]
    hits, results = int(p.hit1.sum()), run.evaluation.get("results", [run.evaluation])
    return {"images": len(p.labels), "hits": hits, "all": len(shown) == len(p.classes),
            "other": all(hits != result.get("hits1") for result in results),
            "names": [titles[c] for c in shown],
            "matrix": [[int(((p.labels == row) & (answers == column)).sum()) for column in shown]
                       for row in shown],
            "totals": [int((p.labels == c).sum()) for c in shown],
            "pairs": [(titles[label], titles[answer], n) for label, answer, n in pairs[:MOST["confusions"]]],
            "worst": [(str(p.paths[i]), titles[p.labels[i]], titles[answers[i]],
                       f"{100 * p.probabilities[i, 0]:.1f}") for i in worst]}


def text(value: object) -> str:
    """A value of a configuration or record as a person writes it, at most 200 characters."""
    words = value if isinstance(value, str) else "none" if value is None else json.dumps(value, default=str)
    return words if len(words) <= 200 else words[:199] + "…"


# -------------------------------------------------------------------------------------------------- the page

def write_report(folder: str | Path, out: str | Path | None = None) -> Path:
    """Write the page about a run folder and return its path; `out` defaults to report.html in the folder.

    Raises UserError for a folder without a run.
    """
    run = read_run(folder)
    functions = {f.__name__: f for f in (headline, best, incidents, class_rows, mistakes, summary_line)}
    return _write("page.html", Path(out or run.folder), "report.html", functions, run=run, most=MOST,
                  charts=charts([run]), samples=[base64.b64encode(path.read_bytes()).decode() for path in
                                                 sorted(run.folder.glob("samples/*.jpg"))[:_SAMPLES]])


def _write(template: str, out: Path, name: str, *values: dict, **more: object) -> Path:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    out = out / name if out.is_dir() else out
    world = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True,
                        lstrip_blocks=True, undefined=StrictUndefined, extensions=["jinja2.ext.do"])
    world.filters["text"] = text
    html = world.get_template(template).render(*values, **more)
    out.parent.mkdir(parents=True, exist_ok=True)
    # Names with bytes that are not text are shown with a question mark: the page has to be valid UTF-8.
    write_text(out, html.encode("utf-8", "replace").decode("utf-8"))
    return out


# --------------------------------------------------------------------------------------------- several runs

def write_comparison(folders: Sequence[str | Path], out: str | Path | None = None,
                     price_per_hour: float | None = None) -> tuple[Path, str]:
    """Write the page that compares runs, and return its path and its table of results as text.

    `out` defaults to comparison.html in the first folder; `price_per_hour` is that of one process (GPU).
    """
    runs = [read_run(folder) for folder in folders]
    rows = comparison(runs, price_per_hour)
    taken = [effort(run, price_per_hour) for run in runs]
    panels = {label: [(taken[r][label], run.accuracy, _looks(runs, r)) for r, run in enumerate(runs)]
              for label in taken[0]}
    path = _write("compare.html", Path(out or runs[0].folder), "comparison.html", runs=runs, head=[*rows[0]],
                  rows=[[*row.values()] for row in rows], price=price_per_hour, charts=charts(runs),
                  differing=differing, paired=any(row["p"] for row in rows),
                  progress=_draw("effort", panels, "top-1 (%)", False, 4))
    return path, table(rows)


def effort(run: Run, price_per_hour: float | None = None) -> dict[str, list[float]]:
    """What a run had taken at the end of each of its epochs, by what it is."""
    about = run.config | run.environment
    seen = np.array(run.values("update")) * (about.get("global_batch") or math.nan) / 1e6
    hours = np.nancumsum(run.values("seconds")) / 3600
    cost = {} if price_per_hour is None else {"cost": hours * about.get("world_size", 1) * price_per_hour}
    return {name: part.tolist() for name, part in ({"images seen (M)": seen, "hours": hours} | cost).items()}


def comparison(runs: list[Run], price_per_hour: float | None = None) -> list[dict[str, str]]:
    """A row of figures for each run, best first, with the paired test against the best."""
    def score(run: Run) -> float:
        return run.evaluation.get("acc1", np.nanmax([*run.accuracy, -1.0]))

    rows, leader = [], max(runs, key=score)
    for run in sorted(runs, key=score, reverse=True):
        taken = {name: values[-1:] for name, values in effort(run, price_per_hour).items()}
        images = run.evaluation.get("images") or run.data.get("val", {}).get("images")
        known, speed = images and score(run) >= 0, run.finite("train_images_per_second")
        found = (compare(leader.predictions, run.predictions, len(runs) - 1)
                 if run is not leader and leader.predictions and run.predictions else None)
        rows.append({
            "run": printable(run.name), "top-1 %": f"{score(run):.2f}" if score(run) >= 0 else "–",
            "±": f"{sampling_interval(score(run), images):.2f}" if known else "", "epochs": str(len(run.log)),
            **{name: f"{value[0]:,.4g}" if value else "" for name, value in taken.items()},
            "img/s": f"{median(speed):,.0f}" if speed else "",
            "to the best": f"{found.difference:+.2f} ± {found.margin:.2f}" if found else "",
            "p": f"{found.p_value:.2g}" if found else ""})
    return rows


def differing(parts: list[dict]) -> list[list[str]]:
    """A row for each name whose values are not the same in all `parts`."""
    names = dict.fromkeys(name for part in parts for name in part)
    return [[name, *(text(part[name]) if name in part else "–" for part in parts)] for name in names
            if any(part.get(name) != parts[0].get(name) for part in parts)]
