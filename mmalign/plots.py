"""Line charts as inline SVG that takes its colors and fonts from the page around it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 360.0, 210.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 12.0, 12.0, 26.0
MAX_POINTS = 300
RAW_ABOVE = 40  # series with more points are drawn faint, under a smoothed line
SMOOTHING_SHARE = 0.05

PANELS: tuple[tuple[str, str], ...] = (
    ("Loss", r"loss"),
    ("Implicit accuracy", r"rewards/accuracy|accuracy"),
    ("Margin", r"rewards/margin|margin"),
    ("Implicit rewards", r"rewards/(chosen|rejected)"),
    ("Denoising error", r".*denoising_error.*"),
    ("Gradient norm", r"grad_norm"),
    ("Learning rate", r"lr|learning_rate"),
    ("Stage", r"stage"),
)


@dataclass(frozen=True)
class Series:
    """One line: a name and its points, x ascending."""

    name: str
    points: list[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """One chart: a title, its lines and the drawing."""

    title: str
    series: list[Series]
    svg: Markup


def series_of(records: Sequence[Mapping[str, float | None]]) -> dict[str, Series]:
    """Collect each metric's points over steps; values missing or not finite are left out."""
    lines: dict[str, Series] = {}
    for record in records:
        for name, value in record.items():
            step = record.get("step")
            if name != "step" and step is not None and value is not None and math.isfinite(value):
                line = lines.setdefault(name, Series(name, []))
                line.points.append((float(step), float(value)))
    return lines


def changes(records: Sequence[Mapping[str, float | None]], names: Sequence[str]) -> Panel:
    """Draw metrics of different units together: changes, each in units of its own largest one."""
    known = series_of(records)
    lines = []
    for name in names:
        points = known[name].points
        start = points[0][1]
        largest = max(abs(y - start) for _, y in points) or 1.0
        lines.append(Series(name, [(x, (y - start) / largest) for x, y in points]))
    title = "Change since the start, largest = 1"
    return Panel(title, lines, chart(lines, title))


def panels(records: Sequence[Mapping[str, float | None]]) -> list[Panel]:
    """Arrange logged metrics in charts.

    Well-known metrics share a chart as listed in `PANELS`; each other one gets its own. Values that
    are missing or not finite are left out.

    Args:
        records: lines of `metrics.jsonl`, each with `step`.
    """
    lines = series_of(records)
    found = []
    for title, pattern in PANELS:
        names = [name for name in lines if re.fullmatch(pattern, name)]
        if names:
            found.append((title, [lines.pop(name) for name in names]))
    found += [(name, [line]) for name, line in lines.items()]
    return [Panel(title, series, chart(series, title)) for title, series in found]


def chart(
    series: Sequence[Series], title: str, *, behind: Sequence[Series] = (), x_title: str = ""
) -> Markup:
    """Draw lines; CSS classes `s0`, `s1`, ... color them.

    Args:
        series: lines over steps; with `x_title` paths of any shape, whose last point gets a dot.
        title: read out in place of the picture, with the ends of every line.
        behind: lines to compare with, drawn faint; the axes hold them too.
        x_title: what is across, where it is not steps.
    """
    points = [point for line in (*series, *behind) for point in line.points]
    height = HEIGHT + (16.0 if x_title else 0.0)
    x_low, x_high = _padded(min(x for x, _ in points), max(x for x, _ in points), 0.0)
    y_low, y_high = _padded(min(y for _, y in points), max(y for _, y in points), 0.06)

    def place(x: float, y: float) -> str:
        across = LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        down = HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)
        return f"{across:.1f},{down:.1f}"

    spoken = _spoken(title, series, x_title)
    parts = [
        f'<svg viewBox="0 0 {WIDTH:g} {height:g}" role="img" aria-label="{spoken}">',
        *(_horizontal(y, place(x_low, y)) for y in _ticks(y_low, y_high, 5)),
        *(_below(x, place(x, y_low)) for x in _ticks(x_low, x_high, 4)),
    ]
    for line in behind:
        parts.append(_polyline("behind", [place(*point) for point in line.points]))
    for index, line in enumerate(series):
        if x_title:
            places = [place(*point) for point in line.points]
            parts += [_polyline(f"line s{index % 4}", places), _end(f"s{index % 4}", places[-1])]
            continue
        thin = _thinned(line.points)
        smooth = _smoothed(thin)
        if smooth is not thin:
            raw = "raw faint" if len(series) > 2 else "raw"
            parts.append(_polyline(f"{raw} s{index % 4}", [place(*point) for point in thin]))
        parts.append(_polyline(f"line s{index % 4}", [place(*point) for point in smooth]))
    if x_title:
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(
            f'<text class="tick" x="{middle:g}" y="{height - 6:g}" text-anchor="middle">'
            f"{escape(x_title)}</text>"
        )
    return Markup("".join([*parts, "</svg>"]))


def _spoken(title: str, series: Sequence[Series], x_title: str) -> Markup:
    """Say in words where the lines begin and end, for those who do not see the picture."""
    lines = []
    for line in series:
        (x_first, first), (x_last, last) = line.points[0], line.points[-1]
        name = f"{line.name} " if line.name != title else ""
        across = x_title or "step"
        ends = [f"{_label(first)} at {across} {_label(x_first)}"]
        if len(line.points) > 1:
            ends.append(f"{_label(last)} at {across} {_label(x_last)}")
        lines.append(name + " to ".join(ends))
    return escape(f"{title}: {'; '.join(lines)}")


def _end(css: str, place: str) -> str:
    x, y = place.split(",")
    return f'<circle class="{css} end" cx="{x}" cy="{y}" r="3.5"/>'


def _polyline(css: str, places: list[str]) -> str:
    if len(places) == 1:
        x, y = places[0].split(",")
        return f'<circle class="{css} dot" cx="{x}" cy="{y}" r="2.5"/>'
    return f'<polyline class="{css}" points="{" ".join(places)}"/>'


def _horizontal(value: float, place: str) -> str:
    y = float(place.split(",")[1])
    line = f'<line class="grid" x1="{LEFT:g}" x2="{WIDTH - RIGHT:g}" y1="{y:g}" y2="{y:g}"/>'
    return line + _text(LEFT - 6, y + 3.5, "end", value)


def _below(value: float, place: str) -> str:
    x = float(place.split(",")[0])
    return _text(x, HEIGHT - 8, "middle", value)


def _text(x: float, y: float, anchor: str, value: float) -> str:
    label = _label(value)
    return f'<text class="tick" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{label}</text>'


def _label(value: float) -> str:
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.5g}"
    return f"{value:.2g}".replace("e-0", "e-").replace("e+0", "e")


def _padded(low: float, high: float, share: float) -> tuple[float, float]:
    if low == high:
        room = abs(low) * 0.5 or 0.5
        return low - room, high + room
    room = (high - low) * share
    return low - room, high + room


def _ticks(low: float, high: float, count: int) -> list[float]:
    rough = (high - low) / count
    power: float = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Average neighbors until at most `MAX_POINTS` are left."""
    size = math.ceil(len(points) / MAX_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [
        (sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group))
        for group in groups
    ]


def _smoothed(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Moving average over a centered window, only where it helps the eye."""
    values = [y for _, y in points]
    if len(points) < RAW_ABOVE or not _noisy(values):
        return points
    reach = max(2, round(len(points) * SMOOTHING_SHARE))
    smooth = []
    for index, (x, _) in enumerate(points):
        window = values[max(0, index - reach) : index + reach + 1]
        smooth.append((x, sum(window) / len(window)))
    return smooth


def _noisy(values: list[float]) -> bool:
    """Whether the line turns around at more than a quarter of its points."""
    triples = zip(values, values[1:], values[2:], strict=False)
    turns = sum((b - a) * (c - b) < 0 for a, b, c in triples)
    return turns > len(values) / 4
