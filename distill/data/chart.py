"""Charts: what they show, and the drawing. Bars upright or lying, lines, and pies.

Whatever a question may ask for can be read from the picture for certain: a value is printed at its bar, or ends on a
labelled line; a share of a pie stands in the pie or in its legend; and what is compared differs clearly.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Literal

from PIL import Image, ImageDraw

from distill.data.fonts import Font
from distill.data.sample import Split, held_out
from distill.data.scene import RGB
from distill.data.sheet import LINE, Sheet, baseline, ink_on, luma, pale, room

ChartKind = Literal["bar", "lying bar", "line", "pie"]
KINDS: tuple[ChartKind, ...] = ("bar", "lying bar", "line", "pie")
HELD_OUT_PERCENT = 10
SIZE_PX = 224
_GAP_PX = 4

_TITLES = (
    "Apples sold", "Visitors", "Rainfall", "Books read", "Votes", "Sales", "Cups of tea", "Goals", "Pets",
    "Hours of sleep", "Bikes rented", "Trees planted", "Cars washed", "Emails", "Favorite fruit", "Favorite sport",
    "Students", "Birds seen", "Tickets sold", "Steps walked", "Snow days", "Points", "Orders", "Fish caught",
    "Eggs laid", "Parcels", "Phone calls", "Coffee sold", "Energy use", "Water use", "Budget", "Costs", "Income",
    "Survey", "Members", "Downloads", "Pages printed", "Cakes baked", "Trips", "Guests", "Sunny days", "Lost items",
    "New houses", "Medals", "Classes", "Exports", "Recycling",
)  # fmt: skip
_WHEN = ("", "", "", " in 2019", " in 2023", " this week", " per day", " last year", " by group", " in May", " (test)")
_SERIES: tuple[tuple[str, ...], ...] = (
    ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"),
    ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"),
    ("2018", "2019", "2020", "2021", "2022", "2023", "2024"),
    ("Q1", "Q2", "Q3", "Q4"),
)  # fmt: skip
_SETS: tuple[tuple[str, ...], ...] = (
    ("Apples", "Pears", "Plums", "Grapes", "Kiwis", "Lemons", "Cherries", "Melons"),
    ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Greta", "Hugo", "Iris", "Jonas"),
    ("Cats", "Dogs", "Birds", "Fish", "Mice", "Horses", "Cows", "Sheep"),
    ("Red", "Blue", "Green", "Pink", "Black", "White"),
    ("Tea", "Coffee", "Milk", "Juice", "Water", "Soda"),
    ("Bus", "Car", "Train", "Bike", "Tram", "Boat"),
    ("Paris", "Rome", "Oslo", "Berlin", "Madrid", "Vienna", "Cairo", "Tokyo"),
    ("Tennis", "Golf", "Rugby", "Chess", "Judo", "Rowing"),
    ("Rent", "Food", "Travel", "Fun", "Taxes", "Books"),
    ("North", "South", "East", "West"),
    ("Team A", "Team B", "Team C", "Team D"),
    ("Piano", "Guitar", "Drums", "Flute", "Violin", "Harp"),
    ("Small", "Medium", "Large"),
)
# Colours that keep apart from each other in a pie.
_PALETTES: tuple[tuple[RGB, ...], ...] = (
    ((230, 60, 60), (60, 120, 216), (60, 170, 90), (245, 190, 50), (145, 85, 185), (240, 130, 50)),
    ((38, 70, 83), (42, 157, 143), (233, 196, 106), (231, 111, 81), (120, 160, 210), (180, 90, 120)),
    ((120, 180, 230), (250, 160, 170), (160, 210, 140), (255, 215, 120), (200, 170, 230), (180, 180, 180)),
)


@dataclass(frozen=True)
class Chart:
    """names, values: of the bars, points or slices in order; of a pie the values are percentages, 100 together.

    step: distance of the labelled lines of the axis; 0 where values are printed instead (always for pies).
    """

    kind: ChartKind
    title: str
    names: tuple[str, ...]
    values: tuple[int, ...]
    step: int = 0

    @property
    def content(self) -> str:
        return f"{self.title}: {', '.join(sorted(self.names))}"

    @property
    def is_held_out(self) -> bool:
        """True for the charts that are kept for evaluation, chosen by title and names."""
        return held_out(self.content, HELD_OUT_PERCENT)

    @property
    def part(self) -> str:
        """What the chart is made of."""
        return {"bar": "bar", "lying bar": "bar", "line": "point", "pie": "slice"}[self.kind]

    def is_readable(self, value: int) -> bool:
        """Whether nobody could be in doubt about this value."""
        return not self.step or value % self.step == 0

    def is_clear(self, a: int, b: int) -> bool:
        """Whether two values differ enough to compare them by eye, where they are not printed."""
        return a != b and (not self.step or abs(a - b) >= 0.08 * max(self.values))


def random_chart(rng: random.Random, split: Split) -> Chart:
    """A chart: a held-out one for split "val", another for "train"."""
    while True:
        kind: ChartKind = rng.choice(KINDS)
        chart = _random_pie(rng) if kind == "pie" else _random_series(rng, kind)
        if chart.is_held_out == (split == "val"):
            return chart


def _random_names(rng: random.Random, kind: ChartKind) -> tuple[str, ...]:
    if kind == "line" or (kind != "pie" and rng.random() < 0.35):
        names = rng.choice(_SERIES)
        count = min(len(names), rng.randint(3, 6))
        start = rng.randint(0, len(names) - count)
        return names[start : start + count]
    things = rng.choice(_SETS)
    return tuple(rng.sample(things, min(len(things), rng.choice((2, 3, 3, 4, 4, 5)))))


def _random_title(rng: random.Random) -> str:
    return rng.choice(_TITLES) + rng.choice(_WHEN)


def _random_series(rng: random.Random, kind: ChartKind) -> Chart:
    names = _random_names(rng, kind)
    top = rng.choice((10, 10, 20, 50, 50, 100, 100, 200, 500, 1000))
    printed = rng.random() < 0.5
    step = 0 if printed else top // 5
    if printed:
        values = [rng.randint(max(1, top // 20), top) for _ in names]
    else:  # mostly on a labelled line
        values = [rng.choice((rng.randint(1, 5) * step, rng.randint(1, 5) * step, rng.randint(1, top))) for _ in names]
    if kind == "line":
        roll = rng.random()
        if roll < 0.5:  # all up or all down
            values = sorted({*values}, reverse=roll < 0.25)
            names = names[: len(values)]
            if len(names) < 3:
                return _random_series(rng, kind)
    return Chart(kind, _random_title(rng), names, tuple(values), step)


def _random_pie(rng: random.Random) -> Chart:
    names = _random_names(rng, "pie")
    unit = rng.choice((1, 5, 5, 10))
    cuts = sorted(rng.sample(range(1, 100 // unit), len(names) - 1))
    parts = [(b - a) * unit for a, b in zip([0, *cuts], [*cuts, 100 // unit], strict=True)]
    if min(parts) < 5:  # thinner ones would have no room for their number
        return _random_pie(rng)
    return Chart("pie", _random_title(rng), names, tuple(parts))


# -- drawing -----------------------------------------------------------------------------------------------------------


def draw_chart(chart: Chart, rng: random.Random, faces: list[Font], min_px: int) -> Sheet | None:
    """The chart, 224 px large, or None if its texts do not fit at `min_px`; `rng` chooses what nobody asks for."""
    font = rng.choice(faces)
    paper = pale(rng) if rng.random() < 0.85 else (rng.randint(15, 50), rng.randint(15, 50), rng.randint(20, 60))
    sheet = Sheet(Image.new("RGB", (SIZE_PX, SIZE_PX), paper))
    ink = ink_on(paper, rng, plain=0.9)
    title_limit = min(20, room(font, [chart.title], 212, 40))
    size = rng.randint(min_px, min_px + 3)
    if title_limit < min_px:
        return None
    title = font.at(rng.randint(min_px, title_limit))
    sheet.write(chart.title, 112, baseline(3, title.size), title, ink, "ms")
    top = 3 + title.size * LINE + 4
    if chart.kind == "pie":
        _draw_pie(sheet, chart, rng, font, size, top, ink, paper)
    elif chart.kind == "lying bar":
        _draw_lying(sheet, chart, rng, font, size, top, ink, paper)
    else:
        _draw_upright(sheet, chart, rng, font, size, top, ink, paper)
    return sheet if sheet.fits and not _overlap(sheet) else None


def _overlap(sheet: Sheet) -> bool:
    """Whether two texts touch, or could be taken for one."""
    boxes = [box for _, box in sheet.boxes]
    return any(
        a[0] < b[2] + _GAP_PX and b[0] < a[2] + _GAP_PX and a[1] < b[3] and b[1] < a[3]
        for i, a in enumerate(boxes)
        for b in boxes[:i]
    )


def _scale(chart: Chart) -> int:
    """The value at the end of the axis."""
    return math.ceil(max(chart.values) / chart.step) * chart.step if chart.step else max(chart.values)


def _between(paper: RGB, ink: RGB) -> RGB:
    """The colour of lines that are there to measure by."""
    r, g, b = (round(p + (i - p) * 0.25) for p, i in zip(paper, ink, strict=True))
    return r, g, b


def _colors(chart: Chart, rng: random.Random, paper: RGB) -> list[RGB]:
    """One colour for all bars or one for each, none like the paper."""
    palette = [color for color in rng.choice(_PALETTES) if abs(luma(color) - luma(paper)) > 35]
    if chart.kind != "pie" and rng.random() < 0.5:
        return [rng.choice(palette)] * len(chart.values)
    rng.shuffle(palette)
    return (palette * 3)[: len(chart.values)]


def _draw_upright(
    sheet: Sheet, chart: Chart, rng: random.Random, font: Font, size: int, top: float, ink: RGB, paper: RGB
) -> None:
    """Bars or a line, above their names."""
    face, scale = font.at(size), _scale(chart)
    left = (max(face.getlength(str(v)) for v in range(0, scale + 1, chart.step)) + 8) if chart.step else 8.0
    right, bottom = SIZE_PX - 6.0, SIZE_PX - face.size * LINE - 6
    high = top + (4 if chart.step else face.size * LINE + 2)  # room for the value on the longest bar
    grid = _between(paper, ink)
    for value in range(0, scale + 1, chart.step or scale + 1):
        y = bottom - (bottom - high) * value / scale
        if chart.step:
            sheet.draw.line((left, y, right, y), fill=grid)
            sheet.write(str(value), left - 4, y + face.size * 0.36, face, ink, "rs")
    sheet.draw.line((left, high, left, bottom, right, bottom), fill=ink, width=1)
    slot = (right - left) / len(chart.values)
    half = slot * rng.uniform(0.28, 0.42)
    colors = _colors(chart, rng, paper)
    points = []
    for i, (name, value) in enumerate(zip(chart.names, chart.values, strict=True)):
        x, y = left + slot * (i + 0.5), bottom - (bottom - high) * value / scale
        points.append((x, y))
        if chart.kind == "bar":
            sheet.draw.rectangle((x - half, y, x + half, bottom), fill=colors[i])
        sheet.write(name, x, baseline(bottom + 3, face.size), face, ink, "ms")
        if chart.kind == "bar" and not chart.step:
            sheet.write(str(value), x, y - 4, face, ink, "ms")
    if chart.kind == "line":
        sheet.draw.line(points, fill=colors[0], width=rng.choice((2, 3)), joint="curve")
        for x, y in points:
            sheet.draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colors[0])
        for i, (x, y) in enumerate(points if not chart.step else ()):
            # Where the line leaves upwards on both sides the value stands below, if the axis leaves room.
            valley = all(other[1] < y for other in points[max(0, i - 1) : i + 2] if other[0] != x)
            below = valley and y + face.size * 1.1 < bottom
            sheet.write(str(chart.values[i]), x, y + face.size if below else y - 7, face, ink, "ms", halo=paper)


def _draw_lying(
    sheet: Sheet, chart: Chart, rng: random.Random, font: Font, size: int, top: float, ink: RGB, paper: RGB
) -> None:
    """Bars beside their names."""
    face, scale = font.at(size), _scale(chart)
    left = max(face.getlength(name) for name in chart.names) + 10
    end = face.getlength(str(scale))
    right = SIZE_PX - 8 - (end / 2 if chart.step else end + 4)
    bottom = SIZE_PX - 6 - (face.size * LINE if chart.step else 0)
    grid = _between(paper, ink)
    for value in range(0, scale + 1, chart.step or scale + 1):
        x = left + (right - left) * value / scale
        if chart.step:
            sheet.draw.line((x, top, x, bottom), fill=grid)
            sheet.write(str(value), x, baseline(bottom + 2, face.size), face, ink, "ms")
    sheet.draw.line((left, top, left, bottom), fill=ink)
    slot = (bottom - top) / len(chart.values)
    half = slot * rng.uniform(0.28, 0.4)
    colors = _colors(chart, rng, paper)
    for i, (name, value) in enumerate(zip(chart.names, chart.values, strict=True)):
        y, x = top + slot * (i + 0.5), left + (right - left) * value / scale
        sheet.draw.rectangle((left, y - half, x, y + half), fill=colors[i])
        sheet.write(name, left - 5, y + face.size * 0.34, face, ink, "rs")
        if not chart.step:
            sheet.write(str(value), x + 5, y + face.size * 0.34, face, ink, "ls")


def _draw_pie(
    sheet: Sheet, chart: Chart, rng: random.Random, font: Font, size: int, top: float, ink: RGB, paper: RGB
) -> None:
    """Slices, and a legend that names them; the percentages in the legend or in the slices."""
    face = font.at(size)
    colors = _colors(chart, rng, paper)
    inside = min(chart.values) >= 12 and rng.random() < 0.5
    labels = [f"{n}" if inside else f"{n} {v}%" for n, v in zip(chart.names, chart.values, strict=True)]
    row = face.size * LINE
    beside = max(face.getlength(label) for label in labels) + size + 6 < 100
    if beside:
        side = min(224 - 16 - max(face.getlength(label) for label in labels) - size, 220 - top)
        left, pie_top = 4.0, top + (220 - top - side) / 2
        x, y = left + side + 8, top + (220 - top - row * len(labels)) / 2
    else:
        side = 220 - top - row * len(labels) - 4
        left, pie_top = (224 - side) / 2, top
        x, y = 112 - max(face.getlength(label) for label in labels) / 2 - size / 2, top + side + 4
    big = Image.new("RGB", (round(side) * 2, round(side) * 2), paper)
    draw = ImageDraw.Draw(big)
    angle = start = rng.choice((-90.0, rng.uniform(0, 360)))
    for value, color in zip(chart.values, colors, strict=True):
        draw.pieslice((2, 2, big.width - 2, big.height - 2), angle, angle + value * 3.6, fill=color, outline=paper)
        angle += value * 3.6
    sheet.image.paste(big.reduce(2), (round(left), round(pie_top)))
    for i, (label, color) in enumerate(zip(labels, colors, strict=True)):
        line_y = baseline(y, face.size, i)
        sheet.draw.rectangle((x, line_y - size * 0.7, x + size * 0.7, line_y), fill=color)
        sheet.write(label, x + size, line_y, face, ink, "ls")
        if inside:
            middle = math.radians(start + (sum(chart.values[:i]) + chart.values[i] / 2) * 3.6)
            at_x = left + side * (0.5 + 0.32 * math.cos(middle))
            at_y = pie_top + side * (0.5 + 0.32 * math.sin(middle))
            sheet.write(f"{chart.values[i]}%", at_x, at_y + face.size * 0.34, face, ink_on(color, rng, plain=1), "ms")
