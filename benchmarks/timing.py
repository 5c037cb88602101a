"""Interleaved measurement, and what the commands share: options, rows, report."""
import argparse
import json
import platform
import re
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Collection
from pathlib import Path
from timeit import timeit
from typing import Any

import timm
import torch

from common.files import write_json

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Row = dict[str, Any]  # plain values by the titles of the table


def new_parser(module: str, what: str | None, choices: dict[str, Collection[str]],
               **defaults: Any) -> argparse.ArgumentParser:
    """A parser of `python -m MODULE` with an option for each default, of the same type; a list takes several
    values."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=what, allow_abbrev=False)
    for name, value in defaults.items():
        kind, several = (str, "+") if isinstance(value, list) else (type(value), None)
        parser.add_argument(f"--{name}", default=value, type=kind, nargs=several, choices=choices.get(name),
                            metavar=name.upper(), help="default: %(default)s")
    return parser


def interleave(cases: dict[str, Callable[[], object]], repeats: int, clock: str) -> dict[str, list[float]]:
    """Seconds of each call: every round runs each case once, in turning order, after one round unmeasured."""
    order, times = deque(cases), {name: [] for name in cases}
    for _ in range(repeats + 1):
        for name in order:
            times[name].append(timeit(cases[name], timer=CLOCKS[clock], number=1))
        order.rotate(-1)
    return {name: each[1:] for name, each in times.items()}


def rows(work: str, times: dict[str, list[float]], amount: float, unit: str) -> list[Row]:
    """A row per case, the first of which is the reference; `amount` of `unit` is done by one call.

    Times are milliseconds per call; `ratio` is the reference's median over this median, `of minimums` the
    same of the fastest calls; `spread` is (third - first quartile) / median.
    """
    found, base = [], next(iter(times.values()))
    for case, each in times.items():
        low, median, high = statistics.quantiles(each, n=4) if len(each) > 1 else each * 3
        found.append({
            "work": work, "case": case, "ms (median)": 1e3 * median, "ms (min)": 1e3 * min(each),
            "spread": f"{(high - low) / median:.0%}", "per second": f"{amount / median:.4g} {unit}",
            "ratio": statistics.median(base) / median, "of minimums": min(base) / min(each)})
    return found


def machine() -> Row:
    """What the numbers depend on."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name, family, model = (next(iter(re.findall(rf"^{key}\s*: (.*)$", info, re.MULTILINE)), "unknown")
                           for key in ("model name", "cpu family", "model"))
    return {"cpu": f"{name} (family {family}, model {model})", "threads": torch.get_num_threads(),
            "torch": torch.__version__, "timm": timm.__version__, "python": platform.python_version(),
            "simd": torch.backends.cpu.get_cpu_capability()}


def table(found: list[Row]) -> str:
    """The rows as a Markdown table."""
    cells = [[f"{value:,.4g}" if isinstance(value, float) else str(value) for value in row.values()]
             for row in found]
    return "\n".join(f"| {' | '.join(each)} |" for each in ([*found[0]], ["---"] * len(found[0]), *cells))


def report(found: list[Row], out: str, **more: Any) -> int:
    """Print the machine (with what `more` says) and the table; write them to `out` as JSON."""
    about = machine() | more
    write_json(out, {"machine": about, "rows": found})
    sys.stdout.write(f"{json.dumps(about)}\n\n{table(found)}\n")
    return 0
