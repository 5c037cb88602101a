"""Published accuracy against measured speed, as the paper's figure, in an SVG file without dependencies."""
import math
from html import escape

WIDTH, HEIGHT, LEFT, BOTTOM, EDGE = 720, 440, 60, 50, 20


def accuracy_speed(family: list[dict], title: str) -> str:
    """An SVG of top-1 (published, ImageNet-1k) over milliseconds per picture (evaluation, float32); the two
    series are the 7x7 and the global-filter models. Rows without a published top-1 or a speed are left
    out."""
    points = [(1e3 / row["evaluate_per_second"], row["top1"], row["model"]) for row in family
              if row.get("top1") and row.get("evaluate_per_second")]
    if not points:
        raise ValueError("no model has both a published top-1 and a measured speed")
    low, high = math.log(min(p[0] for p in points) * 0.6), math.log(max(p[0] for p in points) * 1.4)
    floor = math.floor(2 * min(p[1] for p in points)) / 2 - 0.25
    top = math.ceil(2 * max(p[1] for p in points)) / 2 + 0.1

    def place(ms: float, accuracy: float) -> tuple[float, float]:
        x = LEFT + (math.log(ms) - low) / (high - low) * (WIDTH - LEFT - EDGE)
        return x, HEIGHT - BOTTOM - (accuracy - floor) / (top - floor) * (HEIGHT - BOTTOM - 2 * EDGE)

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
             f'font-size="12"><rect width="100%" height="100%" fill="white"/>',
             f'<text x="{WIDTH / 2}" y="16" text-anchor="middle" font-size="13">{escape(title)}</text>']
    for step in range(math.ceil(2 * floor), math.floor(2 * top) + 1):
        _, y = place(math.exp(low), step / 2)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - EDGE}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
                     f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{step / 2:.1f}</text>')
    for ms in (d * 10 ** e for e in range(5) for d in (1, 2, 5)):
        if low <= math.log(ms) <= high:
            x, _ = place(ms, floor)
            parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{2 * EDGE}" y2="{HEIGHT - BOTTOM}" stroke="#eee"/>'
                         f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{ms:g}</text>')
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 12}" text-anchor="middle">milliseconds per picture '
                 f'(logarithmic)</text><text transform="translate(16 {HEIGHT / 2}) rotate(-90)" '
                 f'text-anchor="middle">top-1 in %, published</text>')
    for kind, colour, anchor in (("7x7", "#1f5fa8", "start"), ("gf", "#c2571a", "end")):
        series = sorted(p for p in points if kind in p[2])
        places = [place(ms, accuracy) for ms, accuracy, _ in series]
        parts.append(f'<polyline fill="none" stroke="{colour}" points="'
                     + " ".join(f"{x:.1f},{y:.1f}" for x, y in places) + '"/>')
        for (x, y), (_, _, name) in zip(places, series):
            shift = 9 if anchor == "start" else -9
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}"/><text x="{x + shift:.1f}" '
                         f'y="{y + 4:.1f}" text-anchor="{anchor}">{escape(name)}</text>')
    return "\n".join(parts + ["</svg>\n"])
