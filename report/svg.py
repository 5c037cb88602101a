"""The two pictures of a report page as plain SVG text: lines over epochs, and a confusion heat map."""
import math
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 540, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 14, 44


@dataclass
class Line:
    """One line of a chart; points with a missing or non-finite value are left out and break the line."""
    label: str
    x: list[float]
    y: list[float | None]
    color: str
    dash: str = ""


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten) from at or below `low` to at or above `high`."""
    if high <= low:
        half = abs(low) * 0.05 or 0.5
        low, high = low - half, high + half
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def number(value: float) -> str:
    """A short way to write a figure on an axis or in a table."""
    if value == 0:
        return "0"
    if abs(value) >= 1e6 or abs(value) < 1e-4:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def line_chart(title: str, y_label: str, lines: list[Line], x_label: str = "epoch", from_zero: bool = False) -> str:
    """An HTML figure with title, legend and lines; says so when there is nothing to draw."""
    lines = [line for line in lines if any(_finite(v) for v in line.y)]
    if not lines:
        return (f'<figure><figcaption>{escape(title)}</figcaption>'
                '<p class="missing">The log has no such values.</p></figure>')
    values = [v for line in lines for v in line.y if _finite(v)]
    x_ticks = ticks(min(min(line.x) for line in lines), max(max(line.x) for line in lines), 6)
    y_ticks = ticks(0.0 if from_zero else min(values), max(values))
    if len({v for line in lines for v in line.x}) == 1:
        x_ticks = [lines[0].x[0] - 1, lines[0].x[0], lines[0].x[0] + 1]
    x_ticks = [v for v in x_ticks if float(v).is_integer()] or x_ticks
    x_low, x_high = min(x_ticks[0], min(min(li.x) for li in lines)), max(max(max(li.x) for li in lines), x_ticks[0] + 1)

    def place(x: float, y: float) -> tuple[float, float]:
        return (LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT),
                HEIGHT - BOTTOM - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (HEIGHT - TOP - BOTTOM))

    drawn = [_grid(x_ticks, y_ticks, place, x_high), _axis_labels(x_label, y_label)]
    drawn += [_path(line, place) for line in lines]
    legend = "".join(f'<span class="key"><svg width="26" height="10" aria-hidden="true"><line x1="1" y1="5" x2="25" '
                     f'y2="5" stroke="{li.color}" stroke-width="2.2" stroke-dasharray="{li.dash}"/></svg>'
                     f'{escape(li.label)}</span>' for li in lines)
    return (f'<figure><figcaption>{escape(title)}</figcaption><div class="legend">{legend}</div>'
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(drawn)}</svg>'
            "</figure>")


def _finite(value: float | None) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _grid(x_ticks: list[float], y_ticks: list[float], place, x_high: float) -> str:
    parts = []
    for value in y_ticks:
        y = place(x_ticks[0], value)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
                     f'<text class="tick" x="{LEFT - 7}" y="{y + 3.5:.1f}" text-anchor="end">{number(value)}</text>')
    for value in x_ticks:
        if value <= x_high:
            x = place(value, y_ticks[0])[0]
            parts.append(f'<line class="notch" x1="{x:.1f}" x2="{x:.1f}" y1="{HEIGHT - BOTTOM}" '
                         f'y2="{HEIGHT - BOTTOM + 4}"/><text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 17}" '
                         f'text-anchor="middle">{number(value)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>')
    return "".join(parts)


def _axis_labels(x_label: str, y_label: str) -> str:
    middle_x, middle_y = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    return (f'<text class="label" x="{middle_x}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>'
            f'<text class="label" transform="translate(13 {middle_y}) rotate(-90)" text-anchor="middle">'
            f'{escape(y_label)}</text>')


def _path(line: Line, place) -> str:
    pieces, pen_down, last = [], False, (0.0, 0.0)
    for x, y in zip(line.x, line.y):
        if _finite(y):
            last = place(x, y)
            pieces.append(f"{'L' if pen_down else 'M'}{last[0]:.1f} {last[1]:.1f}")
        pen_down = _finite(y)
    end = f'<circle cx="{last[0]:.1f}" cy="{last[1]:.1f}" r="3" fill="{line.color}"/>'
    return (f'<path d="{"".join(pieces)}" fill="none" stroke="{line.color}" stroke-width="1.8" '
            f'stroke-linejoin="round" stroke-dasharray="{line.dash}"><title>{escape(line.label)}</title></path>{end}')


def heat_map(names: list[str], matrix: list[list[int]], row_totals: list[int]) -> str:
    """A confusion matrix as SVG: rows are true classes, columns answers; blue is right, orange wrong.

    The colour is the share of the row's pictures; the count stands in the cell.
    """
    n, cell = len(names), 30 if len(names) > 12 else 42
    short = [name if len(name) <= 26 else name[:25] + "…" for name in names]
    margin = 16 + 7 * max(map(len, short))
    side = n * cell
    parts = []
    for r in range(n):
        y = margin + r * cell
        name, column = escape(short[r]), f"translate({y + cell / 2 + 4} {margin - 7}) rotate(-60)"
        parts.append(f'<text class="tick" x="{margin - 7}" y="{y + cell / 2 + 4}" text-anchor="end">{name}</text>'
                     f'<text class="tick" transform="{column}">{name}</text>')
        for c in range(n):
            share = matrix[r][c] / row_totals[r] if row_totals[r] else 0.0
            color = _blend((36, 87, 197) if r == c else (214, 84, 12), share if r == c else min(1.0, share * 2.5))
            x = margin + c * cell
            hint = f"{names[r]} taken for {names[c]}: {matrix[r][c]} of {row_totals[r]}"
            parts.append(f'<rect x="{x}" y="{y}" width="{cell}" height="{cell}" fill="{color}" stroke="#fff">'
                         f'<title>{escape(hint)}</title></rect>')
            if matrix[r][c]:
                dark = share > 0.5 if r == c else share > 0.2
                parts.append(f'<text class="cell{" light" * dark}" x="{x + cell / 2}" y="{y + cell / 2 + 4}">'
                             f'{matrix[r][c]}</text>')
    width, height = margin + side + margin // 2, margin + side + 8
    return (f'<svg class="heat" viewBox="0 0 {width} {height}" style="max-width:{width}px" role="img" '
            f'aria-label="confusion heat map">{"".join(parts)}</svg>')


def _blend(color: tuple[int, int, int], share: float) -> str:
    paper = (245, 246, 248)
    return "#" + "".join(f"{round(p + (c - p) * share):02x}" for p, c in zip(paper, color))
