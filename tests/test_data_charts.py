"""Charts: every answer is what was drawn, nothing is asked that cannot be read, held-out ones are never trained on."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from distill.data.chart import HELD_OUT_PERCENT, KINDS, Chart, draw_chart, random_chart
from distill.data.charts import MIN_PX, QUESTIONS, Charts
from distill.data.fonts import builtin_font
from distill.data.sample import held_out, rng_for
from distill.data.shapes import NUMBERS
from distill.reading import reading_questions, reads_right


def charts(number: int, kind: str | None = None) -> list[Chart]:
    drawn = (random_chart(rng_for("chart", i), "train") for i in range(10 * number))
    return [chart for chart in drawn if kind in (None, chart.kind)][:number]


def ask(task: str, number: int = 300) -> list[tuple[Chart, str, str]]:
    asked = []
    for i, chart in enumerate(charts(number)):
        turn = QUESTIONS[task](chart, rng_for(task, i))
        if turn is not None:
            asked.append((chart, turn[0].rstrip("?."), turn[1].rstrip(".")))
    assert asked
    return asked


def value_of(chart: Chart, name: str) -> int:
    return dict(zip(chart.names, chart.values, strict=True))[name]


def named(chart: Chart, text: str) -> list[str]:
    found = [(match.start(), name) for name in chart.names for match in re.finditer(rf"\b{re.escape(name)}\b", text)]
    return [name for _, name in sorted(found)]


# -- content and drawing -----------------------------------------------------------------------------------------------


def test_held_out_charts_are_never_trained_on() -> None:
    train = {random_chart(rng_for("t", i), "train").content for i in range(1500)}
    val = {random_chart(rng_for("v", i), "val").content for i in range(150)}
    assert len(val) > 100
    assert not train & val
    assert not any(held_out(content, HELD_OUT_PERCENT) for content in train)


def test_charts_are_of_every_kind_and_make_sense() -> None:
    kinds = Counter(chart.kind for chart in charts(400))
    assert set(kinds) == set(KINDS)
    for chart in charts(400):
        assert 2 <= len(chart.values) == len(set(chart.names)) <= 6
        assert min(chart.values) > 0
        if chart.kind == "pie":
            assert sum(chart.values) == 100
            assert min(chart.values) >= 5
            assert not chart.step


@pytest.mark.parametrize("kind", KINDS)
def test_texts_lie_in_the_picture_and_apart(kind: str) -> None:
    drawn = 0
    for i, chart in enumerate(charts(40, kind)):
        sheet = draw_chart(chart, rng_for("draw", i), [builtin_font()], MIN_PX)
        if sheet is None:
            continue
        drawn += 1
        texts = [text for text, _ in sheet.boxes]
        assert texts[0] == chart.title
        assert all(any(name in text for text in texts) for name in chart.names)
        if not chart.step:
            unit = "%" if kind == "pie" else ""
            assert all(any(f"{value}{unit}" in text for text in texts) for value in chart.values)
        for n, (text, a) in enumerate(sheet.boxes):
            assert a[0] >= 0, text
            assert a[1] >= 0, text
            assert a[2] <= 224, text
            assert a[3] <= 224, text
            for other, b in sheet.boxes[:n]:
                assert a[0] >= b[2] or b[0] >= a[2] or a[1] >= b[3] or b[1] >= a[3], (text, other)
    assert drawn > 20


def test_bars_are_as_tall_as_their_values() -> None:
    """The coloured pixels of each bar, counted in its column, are in proportion to the values."""
    checked = 0
    for i, chart in enumerate(charts(60, "bar")):
        sheet = draw_chart(chart, rng_for("bars", i), [builtin_font()], MIN_PX)
        if sheet is None or min(chart.values) * 8 < max(chart.values):
            continue
        pixels = np.asarray(sheet.image).astype(int)
        heights = []
        for name in chart.names:
            left, top, right, _ = next(box for text, box in sheet.boxes if text == name)
            # Beside the middle, where a printed value would stand above the bar.
            column = pixels[: int(top) - 2, int((left + right) / 2) - 3]
            bar = column[-6]
            heights.append(int((np.abs(column - bar).sum(1) <= 6).sum()))
        ratios = np.array(heights) / np.array(chart.values)
        assert ratios.max() / ratios.min() < 1.25, (chart, heights)
        checked += 1
    assert checked > 15


def test_slices_are_as_large_as_their_shares() -> None:
    checked = 0
    for i, chart in enumerate(charts(60, "pie")):
        sheet = draw_chart(chart, rng_for("slices", i), [builtin_font()], MIN_PX)
        if sheet is None:
            continue
        pixels = np.asarray(sheet.image).astype(int)
        counts = []
        for name in chart.names:
            left, top, _, bottom = next(box for text, box in sheet.boxes if text.startswith(name))
            swatch = pixels[int((top + bottom) / 2), int(left) - 9]
            counts.append(int((np.abs(pixels - swatch).sum(2) <= 3).sum()))
        shares = 100 * np.array(counts) / sum(counts)
        assert np.abs(shares - np.array(chart.values)).max() < 4, (chart, shares)
        checked += 1
    assert checked > 30


def test_same_seed_and_index_give_the_same_sample(font_pack) -> None:
    a, b = Charts(fonts=font_pack).sample(1, 5), Charts(fonts=font_pack).sample(1, 5)
    assert a.turns == b.turns
    assert np.array_equal(np.asarray(a.image), np.asarray(b.image))
    assert a.image.size == (224, 224)
    assert Charts().sample(1, 6).turns != a.turns
    with pytest.raises(ValueError, match='split "test"'):
        Charts("test")


# -- questions ---------------------------------------------------------------------------------------------------------


def test_values_are_right_and_readable() -> None:
    for chart, question, answer in ask("charts_value"):
        (name,) = named(chart, question)
        value = value_of(chart, name)
        assert answer == (f"{value}%" if chart.kind == "pie" else str(value))
        assert not chart.step or value % chart.step == 0, "a value between two labelled lines cannot be read"
    for chart, question, answer in ask("charts_which"):
        said = int(re.findall(r"(\d+)%?", question)[-1])
        assert value_of(chart, answer) == said
        assert all(
            abs(value - said) > 0 for name, value in zip(chart.names, chart.values, strict=True) if name != answer
        )


def test_extremes_are_clear() -> None:
    for chart, question, answer in ask("charts_extreme"):
        largest = bool(re.search("largest|biggest|highest|longest", question))
        ranked = sorted(chart.values, reverse=largest)
        assert value_of(chart, answer) == ranked[0]
        assert abs(ranked[0] - ranked[1]) >= (0.08 * max(chart.values) if chart.step else 1)


def test_counts_titles_and_names_are_right() -> None:
    for chart, _, answer in ask("charts_count"):
        assert NUMBERS.index(answer.lower()) == len(chart.values)
    for chart, _, answer in ask("charts_title"):
        assert answer == chart.title
    for chart, _, answer in ask("charts_names"):
        assert re.split(", | and ", answer) == list(chart.names)


def test_trends_are_right() -> None:
    seen: Counter[str] = Counter()
    for chart, question, answer in ask("charts_trend", 900):
        assert chart.kind == "line"
        steps = [b - a for a, b in zip(chart.values, chart.values[1:], strict=False)]
        up, down = all(s > 0 for s in steps), all(s < 0 for s in steps)
        if answer in ("Yes", "No"):
            assert (answer == "Yes") == (up if re.search("rising|go up", question) else down)
            assert up or down
        else:
            assert answer == ("It rises" if up else "It falls" if down else "It goes up and down")
        seen[answer] += 1
    assert min(seen[a] for a in ("It rises", "It falls", "It goes up and down", "Yes", "No")) > 5


def test_comparisons_are_right_and_balanced() -> None:
    seen: Counter[str] = Counter()
    for chart, question, answer in ask("charts_compare", 800):
        first, second = named(chart, question)
        a, b = value_of(chart, first), value_of(chart, second)
        assert abs(a - b) >= (0.08 * max(chart.values) if chart.step else 1)
        if answer in ("Yes", "No"):
            less = bool(re.search("smaller|lower|less", question))
            assert (answer == "Yes") == (a < b if less else a > b), (question, chart)
        else:
            assert answer == (first if a > b else second)
        seen[answer] += 1
    assert abs(seen["Yes"] - seen["No"]) < 70


def test_descriptions_name_kind_and_title() -> None:
    for chart, _, answer in ask("charts_describe"):
        assert answer.startswith(f'A {chart.kind.removeprefix("lying ")} chart titled "{chart.title}"')


def test_a_chart_with_little_to_ask_is_asked_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two equal bars between the lines: no value, no extreme, no comparison, so four questions instead of five."""
    dull = Chart("bar", "Votes", ("Cats", "Dogs"), (33, 33), step=20)
    monkeypatch.setattr("distill.data.charts.random_chart", lambda *_: dull)
    assert {len(Charts().sample(0, i).turns) for i in range(60)} == {2, 3, 4}, "and none asks for ever"


def test_held_out_questions_are_of_held_out_bars_and_pies() -> None:
    source = Charts("val")
    for i in range(40):
        chart, _, (question, answer) = source.question(0, i)
        assert chart.is_held_out
        assert chart.kind != "line"
        assert question
        assert answer
    asked = list(reading_questions("charts_bar_pie", 5))
    assert [a for _, _, a in asked] == [source.question(0, i)[2][1] for i in range(5)]


@pytest.mark.parametrize(
    ("predicted", "answer", "right"),
    [
        ("45%", "45%.", True),
        ("three", "Three.", True),
        ("3", "Three.", True),
        ("Tea", "Tea.", True),
        ("4", "Three.", False),
        ("visitors in 2019", "Visitors in 2019.", True),
        ("", "Tea.", False),
    ],
)
def test_scoring(predicted: str, answer: str, right: bool) -> None:
    assert reads_right("charts_bar_pie", predicted, answer) is right
