"""Interleaved measurement, the machine's measured peaks, and rows of the result."""
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import timm
import torch

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass
class Row:
    """One measured case. Times are milliseconds per call; `ratio` is the reference's median over this median,
    `ratio_of_minimums` the same of the fastest calls; `spread` is (third - first quartile) / median; `share`
    is of the peak named by `limit`, measured on this machine in the same run."""

    work: str
    case: str
    median: float
    minimum: float
    spread: float
    per_second: float
    unit: str
    ratio: float
    ratio_of_minimums: float
    share: float | None = None
    limit: str = ""
    difference: float | None = None


def interleave(cases: dict[str, Callable[[], object]], repeats: int, clock: str = "wall") -> dict[str, list[float]]:
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


def rows(work: str, times: dict[str, list[float]], amount: float, unit: str, reference: str) -> list[Row]:
    """A row per case; `amount` of `unit` is done by one call."""
    base = times[reference]
    result = []
    for case, each in times.items():
        median = statistics.median(each)
        quartiles = statistics.quantiles(each, n=4) if len(each) > 1 else [median] * 3
        result.append(Row(work, case, 1e3 * median, 1e3 * min(each), (quartiles[2] - quartiles[0]) / median,
                          amount / median, unit, statistics.median(base) / median, min(base) / min(each)))
    return result


def peak_flops(dtype: torch.dtype, clock: str) -> float:
    """Best multiply-add rate of a large oneDNN matrix product, in operations per second (2 per
    multiply-add)."""
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
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(line.split(":", 1) for line in info.read_text().split("\n\n")[0].splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in fields.items()}
        family = f" (family {fields['cpu family']}, model {fields['model']})" if "cpu family" in fields else ""
        cpu = fields.get("model name", cpu) + family
    return {"cpu": cpu, "threads": torch.get_num_threads(), "torch": torch.__version__, "timm": timm.__version__,
            "python": platform.python_version(), "simd": torch.backends.cpu.get_cpu_capability()}


def table(found: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = ["| work | case | ms (median) | ms (min) | spread | per second | ratio | of minimums | share of peak | "
             "largest difference |", "|---|---|---|---|---|---|---|---|---|---|"]
    for row in found:
        share = "" if row.share is None else f"{100 * row.share:.0f} % {row.limit}"
        difference = "" if row.difference is None else f"{row.difference:.1e}"
        lines.append(f"| {row.work} | {row.case} | {row.median:.1f} | {row.minimum:.1f} | {100 * row.spread:.0f} % | "
                     f"{row.per_second:.4g} {row.unit} | {row.ratio:.2f} | {row.ratio_of_minimums:.2f} | {share} | "
                     f"{difference} |")
    return "\n".join(lines)


def as_json(found: list[Row]) -> list[dict]:
    """The rows as plain data."""
    return [asdict(row) for row in found]
