"""Interleaved measurement, the machine's measured peaks, and rows of the result."""
import platform
import re
import statistics
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import timm
import torch

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Row = dict  # of plain values, as `rows` makes them


def interleave(cases: dict[str, Callable[[], object]], repeats: int, clock: str) -> dict[str, list[float]]:
    """Seconds of each call: every round runs each case once, in turning order, after one round unmeasured."""
    now, names = CLOCKS[clock], list(cases)
    times: dict[str, list[float]] = {name: [] for name in names}
    for round_number in range(repeats + 1):
        shift = round_number % len(names)
        for name in names[shift:] + names[:shift]:
            start = now()
            cases[name]()
            if round_number:
                times[name].append(now() - start)
    return times


def rows(work: str, times: dict[str, list[float]], amount: float, unit: str) -> list[Row]:
    """A row per case, the first of which is the reference; `amount` of `unit` is done by one call.

    Times are milliseconds per call; `ratio` is the reference's median over this median, `ratio_of_minimums`
    the same of the fastest calls; `spread` is (third - first quartile) / median; `share` is of the peak named
    by `limit`, measured on this machine in the same run.
    """
    found, base = [], next(iter(times.values()))
    for case, each in times.items():
        low, median, high = statistics.quantiles(each, n=4) if len(each) > 1 else each * 3
        found.append({
            "work": work, "case": case, "median": 1e3 * median, "minimum": 1e3 * min(each),
            "spread": (high - low) / median, "per_second": amount / median, "unit": unit,
            "ratio": statistics.median(base) / median, "ratio_of_minimums": min(base) / min(each),
            "share": None, "limit": "", "difference": None})
    return found


@cache
def peak_flops(dtype: torch.dtype, clock: str) -> float:
    """Best rate of a large oneDNN matrix product, in operations per second (2 per multiply-add)."""
    x, w = torch.randn(1536, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
    with torch.inference_mode():
        packed = torch.ops.mkldnn._reorder_linear_weight(w, len(x))
        call = {"": lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")}
        return 2 * x.numel() * len(w) / min(interleave(call, 20, clock)[""])


def peak_bandwidth(clock: str) -> float:
    """Bytes per second of a large in-place multiply (one read and one write)."""
    x = torch.ones(32 * 2 ** 20)
    return 2 * 4 * x.numel() / min(interleave({"": lambda: x.mul_(1.0)}, 8, clock)[""])


def machine() -> dict[str, object]:
    """What the numbers depend on."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name, family, model = (next(iter(re.findall(rf"^{key}\s*: (.*)$", info, re.MULTILINE)), "unknown")
                           for key in ("model name", "cpu family", "model"))
    return {"cpu": f"{name} (family {family}, model {model})", "threads": torch.get_num_threads(),
            "torch": torch.__version__, "timm": timm.__version__, "python": platform.python_version(),
            "simd": torch.backends.cpu.get_cpu_capability()}


def markdown(titles: str, lines: list[list[str]]) -> str:
    """A Markdown table; `titles` are separated by commas."""
    heads = titles.split(", ")
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *lines))


def table(found: list[Row]) -> str:
    """The rows as a Markdown table."""
    return markdown(
        "work, case, ms (median), ms (min), spread, per second, ratio, of minimums, share of peak, "
        "largest difference",
        [[row["work"], row["case"], f"{row['median']:.1f}", f"{row['minimum']:.1f}", f"{row['spread']:.0%}",
          f"{row['per_second']:.4g} {row['unit']}", f"{row['ratio']:.2f}", f"{row['ratio_of_minimums']:.2f}",
          "" if row["share"] is None else f"{row['share']:.0%} {row['limit']}",
          "" if row["difference"] is None else f"{row['difference']:.1e}"] for row in found])
