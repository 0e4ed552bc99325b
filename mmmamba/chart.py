"""Lines over the length of a context, drawn twice from one layout: SVG for a page, PNG for a file. Pure.

Predictions are thin dashed lines, measurements are thick with dots; every line carries its name and last value beside
its end, so that colour is never all there is.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

XY = tuple[float, float]
WIDTH, HEIGHT = 560, 230  # pixels of a chart, and of what lies around its lines
LEFT, RIGHT, TOP, BOTTOM = 62, 126, 30, 38
LABEL_HEIGHT = 32


@dataclass(frozen=True)
class Line:
    """`kind` gives the colour (`linear`, `hybrid`, `teacher`); `end` marks an x where the model runs out of memory."""

    name: str
    kind: str
    points: tuple[XY, ...] = ()
    predicted: tuple[XY, ...] = ()
    end: float | None = None


@dataclass(frozen=True)
class Chart:
    """`unit` formats a value of y. With `log_x` and `log_y` an axis is logarithmic; `live` leaves the dots out and
    begins where the lines do; `binary` has round numbers of MiB or GiB at the y axis. `label_width` is the room for
    names, and `x_marks` are values of x to be named on a logarithmic axis (none: round ones)."""

    title: str
    unit: Callable[[float], str]
    lines: tuple[Line, ...]
    x_title: str = "tokens of context"
    log_x: bool = False
    log_y: bool = False
    live: bool = False
    binary: bool = False
    width: int = WIDTH
    height: int = HEIGHT
    label_width: int = RIGHT
    x_marks: tuple[float, ...] = ()


COLOURS = {"linear": "#0f766e", "hybrid": "#7c3aed", "teacher": "#c2410c"}  # PNG, on white; a page has its own


def milliseconds(y: float) -> str:
    return f"{y:,.0f} ms" if y >= 10 or y == 0 else f"{y:.1f} ms"


def mebibytes(y: float) -> str:
    mib = y / 2**20
    if mib >= 1024:
        return f"{mib / 1024:.1f} GiB"
    return f"{mib:,.0f} MiB" if mib >= 10 or mib == 0 else f"{mib:.1f} MiB"


def thousands(x: float) -> str:
    """`1K`, `16K`, `103K`, `1M`: tokens as people say them."""
    if x < 1000:
        return f"{x:.0f}"
    if x >= 1e6:
        return f"{x / 2**20:.0f}M" if x % 2**20 == 0 else f"{x / 1e6:.3g}M"
    return f"{x / 1024:.0f}K" if x % 1024 == 0 else f"{x / 1000:.3g}K"


@dataclass(frozen=True)
class _Label:
    """Two lines of text beside the end of a line."""

    x: float
    y: float
    text: str
    kind: str


class _Layout:
    """Where everything of a chart lies, in pixels."""

    def __init__(self, chart: Chart) -> None:
        self.chart = chart
        every = [p for line in chart.lines for p in (*line.points, *line.predicted)]
        xs, ys = [x for x, _ in every] or [0.0, 100.0], [y for _, y in every] or [1.0]
        self.x_min = min(xs) if chart.log_x or chart.live else 0.0
        self.x_max = max(max(xs), self.x_min * 1.01, 1.0)
        self.y_max = (max(ys) or 1.0) * 1.1
        self.y_min = min(ys) / 1.25 if chart.log_y else 0.0
        self.right, self.bottom = chart.width - chart.label_width, chart.height - BOTTOM

    def x(self, value: float) -> float:
        low, high, value = self.x_min, self.x_max, min(max(value, self.x_min), self.x_max)
        if self.chart.log_x:
            low, high, value = math.log(low), math.log(high), math.log(max(value, low))
        share = (value - low) / (high - low) if high > low else 0.0
        return LEFT + share * (self.right - LEFT)

    def y(self, value: float) -> float:
        if self.chart.log_y:
            share = math.log(max(value, self.y_min) / self.y_min) / math.log(self.y_max / self.y_min)
        else:
            share = value / self.y_max
        return self.bottom - share * (self.bottom - TOP)

    def path(self, points: Sequence[XY]) -> list[XY]:
        return [(self.x(x), self.y(y)) for x, y in points]

    def y_ticks(self) -> list[float]:
        if self.chart.log_y:
            powers = range(math.floor(math.log10(self.y_min)), math.ceil(math.log10(self.y_max)))
            marks = (m * 10.0**power for power in powers for m in (1, 2, 5))
            return [mark for mark in marks if self.y_min <= mark <= self.y_max]
        unit = (2.0**30 if self.y_max >= 2**31 else 2.0**20) if self.chart.binary else 1.0
        step = _nice(self.y_max / unit / 4) * unit
        return [i * step for i in range(int(self.y_max / step) + 1)]

    def x_ticks(self) -> list[float]:
        if self.chart.log_x:
            kept: list[float] = []
            for mark in (m for m in self.chart.x_marks or _MARKS if self.x_min <= m <= self.x_max):
                if not kept or self.x(mark) - self.x(kept[-1]) > 40:
                    kept.append(mark)
            return kept
        step = max(1.0, _nice((self.x_max - self.x_min) / 4))
        return [i * step for i in range(math.ceil(self.x_min / step), int(self.x_max / step) + 1)]

    def labels(self) -> list[_Label]:
        """Names and last values beside the ends of the lines, moved apart where they would touch."""
        found = []
        for line in self.chart.lines:
            ends = [points[-1] for points in (line.points, line.predicted) if points]
            if ends:
                what = "predicted"
                if line.points:
                    x, y = line.points[-1]
                    what = self.chart.unit(y) + (f" at {thousands(x)}" if self.chart.log_x else "")
                found.append(_Label(self.right, self.y(max(ends)[1]), f"{line.name}\n{what}", line.kind))
        found.sort(key=lambda label: label.y)
        ys: list[float] = []
        for label in found:
            ys.append(max(label.y, ys[-1] + LABEL_HEIGHT if ys else TOP + 4))
        lowest = self.bottom - 8.0
        for i in reversed(range(len(ys))):
            ys[i] = min(ys[i], lowest)
            lowest = ys[i] - LABEL_HEIGHT
        return [_Label(label.x, y, label.text, label.kind) for label, y in zip(found, ys, strict=True)]


_MARKS = (*(1024.0 * 4**i for i in range(-2, 4)), 103_000.0, *(1024.0 * 4**i for i in range(4, 8)))


def _nice(value: float) -> float:
    """The next of 1, 2, 2.5, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= value * 0.999)


def svg(chart: Chart) -> str:
    """The chart for a page. Colours are classes (`line-linear`, ...) that its style sheet sets for light and dark."""
    at = _Layout(chart)
    values = [f"{line.name}: {chart.unit(line.points[-1][1])} at {line.points[-1][0]:,.0f} tokens"
              for line in chart.lines if line.points]  # fmt: skip
    description = f"{chart.title}. " + ("; ".join(values) or "Nothing measured yet.")
    out = [
        f'<svg class="chart" viewBox="0 0 {chart.width} {chart.height}" role="img" aria-label="{escape(description)}">',
        f'<text class="chart-title" x="{LEFT}" y="18">{escape(chart.title)}</text>',
    ]
    for tick in at.y_ticks():
        y = at.y(tick)
        out.append(f'<line class="grid" x1="{LEFT}" x2="{at.right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{chart.unit(tick)}</text>')
    for tick in at.x_ticks():
        label = thousands(tick)
        out.append(f'<text class="tick" x="{at.x(tick):.1f}" y="{at.bottom + 16}" text-anchor="middle">{label}</text>')
    middle = (LEFT + at.right) / 2
    below = chart.height - 6
    out.append(f'<text class="tick" x="{middle}" y="{below}" text-anchor="middle">{escape(chart.x_title)}</text>')
    for line in chart.lines:
        for points, what in ((line.predicted, "predicted"), (line.points, "measured")):
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at.path(points))
            if path:
                out.append(f'<polyline class="line line-{line.kind} {what}" points="{path}"/>')
        if not chart.live or len(line.points) == 1:  # of one point there is no line
            out += [
                f'<circle class="dot line-{line.kind}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>'
                for x, y in at.path(line.points)
            ]
        if line.end is not None and line.end <= at.x_max:
            x = at.x(line.end)
            out.append(
                f'<line class="line line-{line.kind} end" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{at.bottom}"/>'
            )
            out.append(f'<text class="tick" x="{x - 4:.1f}" y="{TOP + 10}" text-anchor="end">memory full</text>')
    for tag in at.labels():
        name, value = tag.text.split("\n")
        x = tag.x + 8
        out.append(f'<text class="name line-{tag.kind}" x="{x:.1f}" y="{tag.y - 2:.1f}">{escape(name)}</text>')
        out.append(f'<text class="value" x="{x:.1f}" y="{tag.y + 12:.1f}">{escape(value)}</text>')
    return "".join([*out, "</svg>"])


def png(charts: Sequence[Chart], note: str = "") -> bytes:
    """The charts below each other as a PNG on white, twice as fine as the SVG; `note` stands at the foot."""
    from PIL import Image, ImageDraw, ImageFont

    scale = 2
    below = sum(chart.height for chart in charts)
    image = Image.new("RGB", (max(chart.width for chart in charts) * scale, (below + 24) * scale), "white")
    draw = ImageDraw.Draw(image)
    small, large = ImageFont.load_default(11 * scale), ImageFont.load_default(14 * scale)

    shift = 0
    for chart in charts:
        at = _Layout(chart)

        def px(x: float, y: float, shift: int = shift) -> tuple[float, float]:
            return x * scale, (y + shift) * scale

        draw.text(px(LEFT, 8), chart.title, "#0f172a", large)
        for tick in at.y_ticks():
            y = at.y(tick)
            draw.line([px(LEFT, y), px(at.right, y)], "#e2e8f0", scale)
            draw.text(px(LEFT - 6, y), chart.unit(tick), "#475569", small, anchor="rm")
        for mark in at.x_ticks():
            draw.text(px(at.x(mark), at.bottom + 12), thousands(mark), "#475569", small, anchor="mm")
        draw.text(px((LEFT + at.right) / 2, chart.height - 10), chart.x_title, "#475569", small, anchor="mm")
        for line in chart.lines:
            colour = COLOURS.get(line.kind, "#334155")
            for a, b in zip(at.path(line.predicted), at.path(line.predicted)[1:], strict=False):
                _dashed(draw, px(*a), px(*b), colour, scale)
            path = [px(*p) for p in at.path(line.points)]
            if len(path) > 1:
                draw.line(path, colour, 2 * scale, joint="curve")
            for x, y in path:
                draw.ellipse([x - 3 * scale, y - 3 * scale, x + 3 * scale, y + 3 * scale], colour)
            if line.end is not None and line.end <= at.x_max:
                x = at.x(line.end)
                _dashed(draw, px(x, TOP), px(x, at.bottom), colour, scale)
                draw.text(px(x - 4, TOP + 6), "memory full", "#475569", small, anchor="rm")
        for label in at.labels():
            name, value = label.text.split("\n")
            draw.text(px(label.x + 8, label.y - 6), name, COLOURS.get(label.kind, "#334155"), small, anchor="lm")
            draw.text(px(label.x + 8, label.y + 8), value, "#0f172a", small, anchor="lm")
        shift += chart.height
    draw.text((LEFT * scale, (below + 10) * scale), note, "#475569", small, anchor="lm")
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def _dashed(draw: object, a: XY, b: XY, colour: str, scale: int) -> None:
    length = math.dist(a, b)
    dash = 5 * scale
    for start in range(0, int(length), 2 * dash):
        end = min(start + dash, length)
        points = [tuple(p + (q - p) * t / length for p, q in zip(a, b, strict=True)) for t in (start, end)]
        draw.line(points, colour, scale)  # type: ignore[attr-defined]
