"""Charts: what is drawn says in words what it shows, and lies where it belongs."""

from __future__ import annotations

import io
import itertools
import re
import xml.etree.ElementTree as ET

import pytest
from PIL import Image

from mmmamba.chart import HEIGHT, WIDTH, Chart, Line, mebibytes, milliseconds, png, svg, thousands

CHART = Chart(
    "Time for a token",
    milliseconds,
    (
        Line("student <1>", "linear", ((1024, 20.0), (4096, 20.0)), ((1024, 19.0), (103_000, 19.0))),
        Line("teacher", "teacher", ((1024, 18.0), (4096, 40.0)), ((1024, 18.0), (60_000, 300.0)), end=60_000),
    ),
    log_x=True,
)


def test_svg_is_well_formed_and_says_what_it_shows() -> None:
    root = ET.fromstring(svg(CHART))
    assert root.get("role") == "img"
    label = root.get("aria-label") or ""
    assert "student <1>: 20 ms at 4,096 tokens; teacher: 40 ms at 4,096 tokens" in label
    texts = [e.text for e in root.iter("text")]
    for text in (
        "Time for a token",
        "student <1>",
        "20 ms at 4K",
        "teacher",
        "memory full",
        "16K",
        "tokens of context",
    ):
        assert text in texts
    for e in root.iter("polyline"):
        points = [tuple(map(float, p.split(","))) for p in (e.get("points") or "").split()]
        assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in points)


def test_a_single_point_of_a_live_chart_is_seen() -> None:
    """An answer of two words has one time for a token."""
    points = ((83.0, 20.0), (84.0, 21.0))
    one, two = (
        ET.fromstring(svg(Chart("Time", milliseconds, (Line("a", "linear", points[:n]),), live=True))) for n in (1, 2)
    )
    (dot,) = [e for e in one.iter() if e.tag.endswith("circle")]
    assert 0 < float(dot.get("cy") or 0) < HEIGHT
    assert not [e for e in two.iter() if e.tag.endswith("circle")]


def test_a_rising_line_rises_and_a_flat_one_stays() -> None:
    root = ET.fromstring(svg(CHART))
    heights = {
        e.get("class"): [float(p.split(",")[1]) for p in (e.get("points") or "").split()] for e in root.iter("polyline")
    }
    flat, rising = heights["line line-linear measured"], heights["line line-teacher measured"]
    assert flat[0] == flat[1]
    assert rising[1] < rising[0] - 10, "pixels count downwards"


def test_logarithmic_heights_keep_ratios() -> None:
    lines = tuple(Line(f"m{y}", "linear", ((10, y), (1000, y))) for y in (1.0, 10.0, 100.0))
    chart = Chart("x", milliseconds, lines, log_x=True, log_y=True, width=700, height=400, x_marks=(10, 100, 1000))
    root = ET.fromstring(svg(chart))
    assert root.get("viewBox") == "0 0 700 400"
    low, middle, high = (float((e.get("points") or "").split()[0].split(",")[1]) for e in root.iter("polyline"))
    assert low - middle == pytest.approx(middle - high, abs=0.2)
    assert high < middle
    texts = [e.text for e in root.iter("text")]
    assert [t for t in texts if t in ("10", "100", "1K")] == ["10", "100", "1K"]
    assert {"1.0 ms", "2.0 ms", "10 ms", "100 ms"} <= set(texts)


def test_names_do_not_lie_on_each_other() -> None:
    same = Chart("x", milliseconds, tuple(Line(f"m{i}", "linear", ((0, 5.0), (9, 5.0))) for i in range(3)))
    ys = sorted(float(y) for y in re.findall(r'class="name[^"]*" x="[\d.]+" y="([\d.]+)"', svg(same)))
    assert all(b - a >= 30 for a, b in itertools.pairwise(ys))
    assert ys[-1] < HEIGHT
    # One that lies apart stays at its line when others below it are crowded.
    lines = Line("top", "linear", ((0, 50.0), (9, 50.0))), *same.lines
    names = re.findall(r'class="name[^"]*" x="[\d.]+" y="([\d.]+)"', svg(Chart("x", milliseconds, lines)))
    assert float(names[0]) < HEIGHT / 4


def test_an_empty_chart_is_a_chart() -> None:
    assert "Nothing measured yet" in svg(Chart("x", milliseconds, (Line("a", "linear"),)))


def test_png_shows_both_colours() -> None:
    image = Image.open(io.BytesIO(png([CHART, CHART], "a note")))
    assert image.size == (2 * WIDTH, 2 * (2 * HEIGHT + 24))
    colours = {colour for _, colour in image.getcolors(2**20) or []}
    assert {(15, 118, 110), (194, 65, 12)} <= colours


def test_numbers_as_people_say_them() -> None:
    assert [thousands(x) for x in (500, 1024, 16_384, 103_000, 2500)] == ["500", "1K", "16K", "103K", "2.5K"]
    assert [thousands(x) for x in (1_000_000, 2**20, 1_500_000)] == ["1M", "1M", "1.5M"]
    assert [mebibytes(x * 2**20) for x in (0, 5.5, 71, 6000)] == ["0 MiB", "5.5 MiB", "71 MiB", "5.9 GiB"]
