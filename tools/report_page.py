"""The sections of a report page; each takes the runs (one or two) and gives HTML that needs nothing from outside."""
import base64
import io
import json
import math
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from models.inspect import class_titles
from run.metrics import compare, confusion_pairs
from run.results import summary_line
from tools.report_data import Run
from tools.report_svg import Line, heat_map, line_chart

COLORS = ("#2457c5", "#d6540c", "#16803c")
MOST_EVENTS, MOST_CLASSES, MOST_THUMBNAILS, THUMBNAIL_SIDE = 60, 24, 24, 112
READABLE_FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"]

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

def headline(run: Run) -> dict[str, tuple[str, str]]:
    """The figures of one run that a reader looks for first: label → (figure, note)."""
    found = {}
    for key, label in (("test_acc1", "best top-1"), ("test_acc1_ema", "best top-1 of the EMA")):
        if best := run.best(key):
            found[label] = (f"{best[0]:.2f} %", f"epoch {best[1]}")
    if run.evaluation.get("acc1") is not None:
        found["evaluated top-1"] = (f"{run.evaluation['acc1']:.2f} %", f"{run.evaluation.get('images', '?')} pictures")
    for key, label, show in (("test_acc1", "top-1 of the last epoch", "{:.2f} %"),
                             ("train_loss", "last training loss", "{:.4f}"), ("n_parameters", "parameters", "{:,.0f}")):
        if (last := run.last(key)) is not None:
            found[label] = (show.format(last), "")
    if run.log:
        found["epochs"] = (str(len(run.log)), f"planned {run.config['epochs']}" if "epochs" in run.config else "")
    for key, label, show, total in (("train_images_per_second", "images per second", lambda v: f"{v:,.0f}", np.median),
                                    ("train_data_wait", "waiting for data", lambda v: f"{100 * v:.1f} %", np.median),
                                    ("seconds", "time", duration, sum)):
        values = [v for v in run.column(key) if v is not None]
        if values:
            found[label] = (show(float(total(values))), "median of the epochs" if total is np.median else "")
    return found


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


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
        if run.missing:
            lines.append(f'<p class="soft">Not in the folder: {escape("; ".join(run.missing))}.</p>')
    if len(runs) == 1:
        tiles = [f'<div class="tile"><b>{escape(figure)}</b><span>{escape(label + (note and ", " + note))}</span></div>'
                 for label, (figure, note) in headline(runs[0]).items()]
        lines.append(f'<div class="tiles">{"".join(tiles)}</div>')
    return "".join(lines)


def _comparison(runs: list[Run]) -> str:
    if len(runs) < 2:
        return ""
    heads = [headline(run) for run in runs]
    nothing = ("–", "")
    rows = []
    for label in dict.fromkeys([*heads[0], *heads[1]]):
        first, second = (h.get(label, nothing) for h in heads)
        rows.append([label, *(f"{figure} ({note})" if note else figure for figure, note in (first, second)),
                     _difference(first[0], second[0])])
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


def _difference(first: str, second: str) -> str:
    """`second - first` where both are figures of one unit, in their number of decimals."""
    try:
        (a, unit), (b, other) = ((text.replace(",", "").split() + [""])[:2] for text in (first, second))
        text = f"{float(b) - float(a):+.{len(b.partition('.')[2])}f}"
        return f"{text} {'points' if unit == '%' else unit}".strip() if unit == other else ""
    except ValueError:
        return ""


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
    parts = [(f'<p><b>{escape(run.name)}</b></p>' if len(runs) > 1 else "") + section(run) for run in runs]
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
    return f'<h2>Curves</h2><div class="charts">{"".join(figures)}</div>'


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
    return html + f'<p class="soft">{escape("; ".join(settings))}. 95 %: sampling interval of top-1 in points.</p>'


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
    return str(event.get("kind") or event.get("state") or "event")


def _records(records: list[dict]) -> str:
    rows = []
    for record in records:
        when = record.get("time") or record.get("started") or ""
        shown = ("time", "started", "kind", "state", "message", "command")
        rest = [f"{k} {_short(v)}" for k, v in record.items() if k not in shown and v not in (None, "", [], False)]
        rows.append([str(when), _kind(record), "; ".join(filter(None, [str(record.get("message") or ""), *rest]))])
    return table(["when", "what", "details"], rows)


def _short(value: object) -> str:
    if isinstance(value, list):
        value = " ".join(map(str, value)) or "none"
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 200 else text[:199] + "…"


# ---------------------------------------------------------------- confusion and thumbnails

def _mistakes(run: Run) -> str:
    p = run.predictions
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
    shown = list(range(len(p.classes))) if len(p.classes) <= MOST_CLASSES else []
    for true, wrong, _ in pairs if not shown else ():
        for c in (true, wrong):
            if c >= 0 and c not in shown and len(shown) < MOST_CLASSES:
                shown.append(c)
    place = {c: i for i, c in enumerate(sorted(shown))}
    matrix = [[0] * len(place) for _ in place]
    for true, said in zip(p.labels.tolist(), p.top5[:, 0].tolist()):
        if true in place and said in place:
            matrix[place[true]][place[said]] += 1
    totals = np.bincount(p.labels[p.labels >= 0], minlength=len(p.classes))[sorted(shown)].tolist()
    note = "all classes" if len(shown) == len(p.classes) else f"the {len(shown)} classes that are confused most"
    return (f'<figure><figcaption>Confusion, {note}</figcaption><p class="soft">Rows: the true class; columns: the '
            f"answer. Blue is right, orange wrong; the number is pictures.</p>"
            f'{heat_map([titles[c] for c in sorted(shown)], matrix, totals)}</figure>')


def _thumbnail(p, index: int, titles: list[str]) -> str:
    path, said = str(p.paths[index]), int(p.top5[index, 0])
    try:
        with Image.open(path, formats=READABLE_FORMATS) as picture:
            picture.draft("RGB", (2 * THUMBNAIL_SIDE, 2 * THUMBNAIL_SIDE))
            small = picture.convert("RGB")
        small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        packed = io.BytesIO()
        small.save(packed, "JPEG", quality=82)
        picture_html = f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(packed.getvalue()).decode()}">'
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
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
        rows = [[k, *(_value(run.config.get(k, "–")) for run in runs)] for k in keys
                if runs[0].config.get(k) != runs[1].config.get(k)]
        html += "<h3>Differences</h3>" + (table(["option", *(run.name for run in runs)], rows) if rows
                                         else "<p>The two configurations are equal.</p>")
    for run, differs in zip(runs, recipe_differences):
        chosen = [k for k in run.config if run.origins.get(k) != "default" or k in differs]
        name = f"{escape(run.name)}: " if len(runs) == 2 else ""
        html += f"<h3>{name}{f'{len(differs)} differ from the published recipe' if differs else 'given'}</h3>"
        html += _options(run, chosen, differs)
        html += (f"<details><summary>{name}all {len(run.config)} options</summary>"
                 f"{_options(run, list(run.config), differs)}</details>")
    return html


def _options(run: Run, names: list[str], differs: dict) -> str:
    rows = [[k, _value(run.config[k]), run.origins.get(k, ""), _value(differs[k]) if k in differs else ""]
            for k in names]
    return table(["option", "value", "from", "published recipe"], rows,
                 changed={i for i, k in enumerate(names) if k in differs})


def _value(value: object) -> str:
    if isinstance(value, (tuple, list)):
        return " ".join(map(_value, value)) or "none"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _environment(runs: list[Run]) -> str:
    if not any(run.environment for run in runs):
        return '<h2>Environment</h2><p class="missing">No environment.json in the folder.</p>'
    flat = [{name: value for key, entry in run.environment.items()
             for name, value in (entry.items() if isinstance(entry, dict) else [(key, entry)])} for run in runs]
    rows = [[k, *(_short(values.get(k, "–")) for values in flat)] for k in dict.fromkeys([*flat[0], *flat[-1]])]
    differ = {i for i, row in enumerate(rows) if len(runs) == 2 and row[1] != row[2]}
    return "<h2>Environment</h2>" + table(["", *(run.name for run in runs)], rows, changed=differ)
