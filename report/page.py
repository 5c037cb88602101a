"""The sections of a report page; each takes the runs (one or two) and gives HTML that needs nothing from outside."""
import base64
import io
import json
import math
from html import escape
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np

from datasets.images import BadImage, decode_path
from models.inspect import class_titles
from report.metrics import compare, confusion_pairs
from report.results import summary_line
from report.data import Run
from report.svg import Line, heat_map, line_chart

COLORS = ("#2457c5", "#d6540c", "#16803c")
MOST_EVENTS, MOST_CLASSES, MOST_THUMBNAILS, THUMBNAIL_SIDE = 60, 24, 24, 112


def page(runs: list[Run], recipe_differences: list[dict]) -> str:
    """The whole HTML document for one run or two."""
    title = " and ".join(run.name for run in runs)
    sections = [_header(runs), _comparison(runs), _curves(runs)]
    sections += [_each(runs, "Evaluation", _evaluation), _each(runs, "Incidents", _incidents)]
    sections += [_each(runs, "Mistakes", _mistakes), _config(runs, recipe_differences), _environment(runs)]
    body = "".join(sections)
    style = Path(__file__).with_name("report.css").read_text("utf-8")
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)} · HorNet run</title>'
            f'<meta name="viewport" content="width=device-width,initial-scale=1"><link rel="icon" href="data:,">'
            f"<style>{style}</style></head><body><main>{body}</main></body></html>\n")


# ---------------------------------------------------------------- top of the page

class Figure(NamedTuple):
    """One figure at the head of a page, with the number of its decimals and what is to be said about it."""
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
    """The figures of one run that a reader looks for first, by their labels."""
    found = {}
    for key, label in (("test_acc1", "top-1"), ("test_acc1_ema", "top-1 of the EMA")):
        if best := run.best(key):
            found[f"best {label}"] = Figure(best[0], 2, "%", f"epoch {best[1]}")
            found[f"last {label}"] = Figure(run.last(key), 2, "%")
    if run.evaluation.get("acc1") is not None:
        found["evaluated top-1"] = Figure(run.evaluation["acc1"], 2, "%", f"{run.evaluation.get('images', '?')} pictures")
    for key, label, decimals in (("train_loss", "last training loss", 4), ("n_parameters", "parameters", 0)):
        if (last := run.last(key)) is not None:
            found[label] = Figure(last, decimals)
    if run.log:
        found["epochs"] = Figure(len(run.log), note=f"planned {run.config['epochs']}" if "epochs" in run.config else "")
    for key, label, factor, decimals, unit in (("train_images_per_second", "images per second", 1, 0, ""),
                                               ("train_data_wait", "waiting for data", 100, 1, "%")):
        if values := run.values(key):
            found[label] = Figure(factor * median(values), decimals, unit, "median of the epochs")
    if values := run.values("seconds"):
        found["time"] = _time(sum(values))
    return found


def _time(seconds: float) -> Figure:
    if seconds < 120:
        return Figure(seconds, 0, "s")
    return Figure(seconds / 60, 0, "min") if seconds < 7200 else Figure(seconds / 3600, 1, "h")


def _header(runs: list[Run]) -> str:
    lines = []
    for run in runs:
        model = run.config.get("model") or run.evaluation.get("model") or ""
        state = str(run.status.get("state") or "")
        kind = "good" if state.upper() == "DONE" else "bad" if state.upper() == "FAILED" else ""
        chip = f' <span class="chip {kind}">{escape(state)}</span>' if state else ""
        about = " · ".join(escape(str(t)) for t in (model, run.folder.resolve()) if t)
        lines.append(f'<h1>{escape(run.name)}{chip}</h1><p class="soft mono">{about}</p>')
        if run.unread_lines:
            lines.append(f'<p class="soft">{run.unread_lines} lines of log.txt could not be read.</p>')
    if len(runs) == 1:
        tiles = [f'<div class="tile"><b>{figure}</b><span>{escape(", ".join(filter(None, (label, figure.note))))}</span></div>'
                 for label, figure in headline(runs[0]).items()]
        lines.append(f'<div class="tiles">{"".join(tiles)}</div>')
    return "".join(lines)


def _comparison(runs: list[Run]) -> str:
    if len(runs) < 2:
        return ""
    heads, rows = [headline(run) for run in runs], []
    for label in dict.fromkeys([*heads[0], *heads[1]]):
        both = [head.get(label) for head in heads]
        rows.append([label, *("–" if f is None else f"{f} ({f.note})" if f.note else str(f) for f in both),
                     both[1].minus(both[0]) if all(both) else ""])
    html = "<h2>Side by side</h2>"
    html += table(["", *(run.name for run in runs), "second − first"], rows, numeric={1, 2, 3})
    if all(run.predictions is not None for run in runs):
        try:
            html += f'<p class="verdict">{escape(compare(runs[0].predictions, runs[1].predictions).sentence)}</p>'
        except ValueError as error:
            html += f'<p class="missing">No paired test: {escape(str(error))}.</p>'
    else:
        html += ('<p class="missing">No paired test (McNemar, bootstrap): both folders need a predictions.npz, which '
                 "<code>python main.py --eval true --report DIR</code> writes.</p>")
    return html


def table(head: list[str], rows: list[list[str]], numeric: set[int] = frozenset(), changed: set[int] = frozenset(),
          card: bool = True) -> str:
    """A table of plain texts; columns in `numeric` stand to the right, rows in `changed` are tinted."""
    def line(cells: list[str], tag: str, row: int = -1) -> str:
        out = "".join(f'<{tag}{" class=n" * (i in numeric)}>{escape(str(c))}</{tag}>' for i, c in enumerate(cells))
        return f'<tr{" class=changed" if row in changed else ""}>{out}</tr>'
    body = "".join(line(row, "td", i) for i, row in enumerate(rows))
    return (f'<div class="{"card " * card}wide"><table><thead>{line(head, "th")}</thead>'
            f"<tbody>{body}</tbody></table></div>")


def _each(runs: list[Run], title: str, section) -> str:
    parts = [(f"<h3>{escape(run.name)}</h3>" if len(runs) > 1 else "") + section(run) for run in runs]
    return f"<h2>{title}</h2>" + "".join(parts)


# ---------------------------------------------------------------- curves

CHARTS = (  # title, axis label, from zero, factor, ((key, label, dash), …)
    ("Top-1 on the validation pictures", "top-1 (%)", False, 1,
     (("test_acc1", "model", ""), ("test_acc1_ema", "EMA", "6 4"))),
    ("Loss", "loss (nats)", False, 1,
     (("train_loss", "training", ""), ("test_loss", "validation", "6 4"), ("test_loss_ema", "validation, EMA", "2 3"))),
    ("Learning rate", "learning rate", True, 1,
     (("train_lr", "largest group", ""), ("train_min_lr", "smallest group", "6 4"))),
    ("Throughput", "images per second", True, 1, (("train_images_per_second", "training", ""),)),
    ("Gradient norm before clipping", "norm", True, 1, (("train_grad_norm", "mean of the epoch", ""),)),
    ("Waiting for data", "share of the time (%)", True, 100, (("train_data_wait", "training", ""),)),
)


def _curves(runs: list[Run]) -> str:
    if not any(run.log for run in runs):
        return '<h2>Curves</h2><p class="missing">No log.txt, so there are no curves.</p>'
    figures = []
    for title, y_label, from_zero, factor, keys in CHARTS:
        lines = []
        for r, run in enumerate(runs):
            epochs = [row["epoch"] for row in run.log]
            for k, (key, label, dash) in enumerate(keys):
                values = [None if v is None else v * factor for v in run.column(key)]
                if any(v is not None for v in values):
                    if key == "train_min_lr" and values == run.column("train_lr"):
                        continue  # without layer decay both lines are one
                    name = label if len(runs) == 1 else f"{run.name}: {label}"
                    lines.append(Line(name, epochs, values, COLORS[r if len(runs) > 1 else k], dash))
        if lines or title.startswith(("Top-1", "Loss")):
            figures.append(line_chart(title, y_label, lines, from_zero=from_zero))
    return (f'<h2>Curves</h2><div class="charts">{"".join(figures)}</div>'
            '<p class="soft">Epochs count from 0, as in log.txt and in the names of checkpoints.</p>')


# ---------------------------------------------------------------- evaluation and incidents

EVALUATION_COLUMNS = (
    ("weights", "weights", str), ("checkpoint", "checkpoint", lambda path: str(path).replace("\\", "/").split("/")[-1]),
    ("acc1", "top-1 %", "{:.2f}".format), ("interval", "95 %", "±{:.2f}".format), ("acc5", "top-5 %", "{:.2f}".format),
    ("loss", "loss", "{:.4f}".format), ("mean_class_acc1", "per-class %", "{:.2f}".format),
    ("calibration_error", "calibration", "{:.4f}".format), ("hits1", "hits", str), ("images", "pictures", str))


def _evaluation(run: Run) -> str:
    if not run.evaluation:
        return '<p class="missing">No eval.json: <code>python main.py --eval true</code> writes it.</p>'
    results = run.evaluation.get("results") or [run.evaluation]
    rows = [["–" if r.get(key) is None else show(r[key]) for key, _, show in EVALUATION_COLUMNS] for r in results]
    html = table([head for _, head, _ in EVALUATION_COLUMNS], rows, numeric=set(range(2, 10)))
    for result in results:
        if result.get("verdict"):
            kind = {"PASS": "good", "FAIL": "bad"}.get(result["verdict"], "")
            html += (f'<p class="verdict"><span class="chip {kind}">{escape(result["verdict"])}</span> '
                     f'{escape(summary_line(result))}</p>')
            html += "".join(f'<p class="soft">{escape(text)}</p>' for text in result.get("departures", []))
        if real := result.get("real"):
            html += (f"<p>ReaL: top-1 {real['acc1']:.2f} %, top-5 {real['acc5']:.2f} % of the {real['images']} "
                     "pictures with labels.</p>")
    settings = [str(run.evaluation[k]) for k in ("crop", "dtype", "dataset") if run.evaluation.get(k)]
    return html + f'<p class="soft">{escape("; ".join([*settings, "95 %: sampling interval of top-1 in points"]))}.</p>'


def _incidents(run: Run) -> str:
    if not run.events and not run.attempts and not run.status:
        return '<p class="missing">No record of incidents in this folder.</p>'
    html = ""
    if len(run.attempts) > 1:
        html += f"<p>{len(run.attempts)} attempts:</p>" + _records(run.attempts)
    if not run.events:
        return html + "<p>No incident was recorded.</p>"
    kinds = {}
    for event in run.events:
        kinds[_kind(event)] = kinds.get(_kind(event), 0) + 1
    html += "<p>" + " · ".join(f"{n} × {escape(kind)}" for kind, n in kinds.items()) + "</p>"
    more = len(run.events) - MOST_EVENTS
    return html + _records(run.events[:MOST_EVENTS]) + (f'<p class="soft">and {more} more.</p>' if more > 0 else "")


def _kind(event: dict) -> str:
    return str(event.get("kind") or event.get("state") or "event").replace("_", " ")


def _records(records: list[dict]) -> str:
    rows = []
    for record in records:
        when = record.get("time") or record.get("started") or ""
        shown = ("time", "started", "kind", "state", "message", "command")
        rest = [f"{k} {_text(v)}" for k, v in record.items() if k not in shown and v not in (None, "", [], False)]
        rows.append([when, _kind(record), f"{record.get('message') or ''} {'; '.join(rest)}".strip()])
    return table(["when", "what", "details"], rows)


def _text(value: object) -> str:
    """A value of a configuration or record as a person writes it, at most 200 characters."""
    if isinstance(value, (tuple, list)):
        text = " ".join(map(_text, value)) or "none"
    elif isinstance(value, dict):
        text = json.dumps(value, default=str)
    else:
        text = "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 200 else text[:199] + "…"


# ---------------------------------------------------------------- confusion and thumbnails

def _mistakes(run: Run) -> str:
    p = run.predictions
    if run.predictions_error:
        return f'<p class="missing">{escape(run.predictions_error)}.</p>'
    if p is None or not len(p.labels):
        return ('<p class="missing">No predictions.npz: <code>python main.py --eval true --report DIR</code> writes it '
                "(give the run folder as DIR).</p>")
    titles, pairs = class_titles(p.classes), confusion_pairs(p.labels, p.top5[:, 0])
    html, hits = "", p.counts().hits1
    told = run.evaluation.get("hits1")
    if told is not None and told not in {hits, *(r.get("hits1") for r in run.evaluation.get("results", []))}:
        html += f'<p class="missing">predictions.npz has {hits} hits, eval.json {told}: two different evaluations.</p>'
    if not pairs:
        return html + f"<p>All {len(p.labels)} pictures are right.</p>"
    rows = [[titles[t], titles[w] if w >= 0 else "unreadable", n] for t, w, n in pairs[:14]]
    html += (f'<div class="pair">{_heat(p, titles, pairs)}<figure><figcaption>Most frequent confusions</figcaption>'
             f'{table(["is", "taken for", "pictures"], rows, numeric={2}, card=False)}</figure></div>')
    wrong = np.flatnonzero((p.top5[:, 0] != p.labels) & (p.labels >= 0))
    worst = wrong[np.argsort(-p.probabilities[wrong, 0], kind="stable")][:MOST_THUMBNAILS]
    return html + ("<h3>Most confident mistakes</h3><div class='thumbs'>"
                   + "".join(_thumbnail(p, int(i), titles) for i in worst) + "</div>")


def _heat(p, titles: list[str], pairs: list[tuple[int, int, int]]) -> str:
    shown = list(range(len(p.classes)))
    if len(shown) > MOST_CLASSES:
        confused = dict.fromkeys(c for true, wrong, _ in pairs for c in (true, wrong) if c >= 0)
        shown = sorted(list(confused)[:MOST_CLASSES])
    true, said = p.labels, p.top5[:, 0]
    both = np.isin(true, shown) & np.isin(said, shown)
    matrix = np.zeros((len(shown), len(shown)), int)
    np.add.at(matrix, (np.searchsorted(shown, true[both]), np.searchsorted(shown, said[both])), 1)
    totals = np.bincount(true[true >= 0], minlength=len(p.classes))[shown]
    note = "all classes" if len(shown) == len(p.classes) else f"the {len(shown)} classes that are confused most"
    return (f'<figure><figcaption>Confusion, {note}</figcaption><p class="soft">Rows: the true class; columns: the '
            f"answer. Blue is right, orange wrong; the number is pictures.</p>"
            f'{heat_map([titles[c] for c in shown], matrix.tolist(), totals.tolist())}</figure>')


def _thumbnail(p, index: int, titles: list[str]) -> str:
    path, said = str(p.paths[index]), int(p.top5[index, 0])
    try:
        small = decode_path(path)
        small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        packed = io.BytesIO()
        small.save(packed, "JPEG", quality=82)
        picture_html = f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(packed.getvalue()).decode()}">'
    except (BadImage, ValueError):  # a name with a NUL character is a ValueError
        picture_html = '<span class="none">no picture</span>'
    confidence = float(p.probabilities[index, 0])
    share = f"{100 * confidence:.1f} %" if math.isfinite(confidence) else "–"
    name, answer = escape(path.replace("\\", "/").split("/")[-1]), escape(titles[said] if said >= 0 else "–")
    return (f'<div class="thumb" title="{escape(path)}">{picture_html}said <b>{answer}</b> ({share})<br>'
            f'is <b>{escape(titles[int(p.labels[index])])}</b><br><span class="soft">{name}</span></div>')


# ---------------------------------------------------------------- configuration and environment

def _config(runs: list[Run], recipe_differences: list[dict]) -> str:
    html = "<h2>Configuration</h2>"
    if not any(run.config for run in runs):
        return html + '<p class="missing">No config.yaml in the folder.</p>'
    if len(runs) == 2:
        keys = sorted({*runs[0].config, *runs[1].config})
        rows = [[k, *(_text(run.config.get(k, "–")) for run in runs)] for k in keys
                if runs[0].config.get(k) != runs[1].config.get(k)]
        html += "<h3>Differences</h3>" + (table(["option", *(run.name for run in runs)], rows) if rows
                                         else "<p>The two configurations are equal.</p>")
    for run, differs in zip(runs, recipe_differences):
        chosen = [k for k in run.config if run.origins.get(k) != "default" or k in differs]
        name = f"{escape(run.name)} · " if len(runs) == 2 else ""
        html += f"<h3>{name}Given by flag or recipe{f'; {len(differs)} differ from the published recipe' * bool(differs)}</h3>"
        html += _options(run, chosen, differs)
        html += (f"<details><summary>{name}All {len(run.config)} options</summary>"
                 f"{_options(run, list(run.config), differs)}</details>")
    return html


def _options(run: Run, names: list[str], differs: dict) -> str:
    columns = 4 if differs else 3  # the last one says what the published recipe has instead
    rows = [[k, _text(run.config[k]), run.origins.get(k, ""), _text(differs[k]) if k in differs else ""][:columns]
            for k in names]
    return table(["option", "value", "from", "published recipe"][:columns], rows,
                 changed={i for i, k in enumerate(names) if k in differs})


def _environment(runs: list[Run]) -> str:
    if not any(run.environment for run in runs):
        return '<h2>Environment</h2><p class="missing">No environment.json in the folder.</p>'
    flat = [{name: value for key, entry in run.environment.items()
             for name, value in (entry.items() if isinstance(entry, dict) else [(key, entry)])} for run in runs]
    rows = [[k, *(_text(values.get(k, "–")) for values in flat)] for k in dict.fromkeys([*flat[0], *flat[-1]])]
    differ = {i for i, row in enumerate(rows) if len(runs) == 2 and row[1] != row[2]}
    return "<h2>Environment</h2>" + table(["", *(run.name for run in runs)], rows, changed=differ)
