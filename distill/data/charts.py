"""Bar, line and pie charts with questions that the picture answers for certain; names are `Spelled`."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from distill.data.chart import Chart, draw_chart, random_chart
from distill.data.fonts import Fonts, open_fonts
from distill.data.sample import QA, Sample, Spelled, Split, casual, check_split, join_words, rng_for, sentence, yes_no
from distill.data.shapes import NUMBERS
from distill.data.sheet import Sheet

MIN_PX = 12

# Each function below returns (question, answer), or None where the chart does not allow such a question.


def ask_title(chart: Chart, rng: random.Random) -> QA | None:
    """What the chart is about."""
    templates = [
        "What is the title?",
        "What is the title of the chart?",
        "What's the chart called?",
        "Read the title.",
        "What is the chart about?",
        "What does the {} chart show?",
        "Which title does the chart have?",
    ]
    return rng.choice(templates).format(_kind(chart)), Spelled(sentence(chart.title))


def ask_value(chart: Chart, rng: random.Random) -> QA | None:
    """The value of one bar, point or slice."""
    known = [i for i, value in enumerate(chart.values) if chart.is_readable(value)]
    if not known:
        return None
    i = rng.choice(known)
    templates = [
        "What is the value of {}?",
        "What is the value for {}?",
        "How many for {}?",
        "What does the chart say for {}?",
        "Which value does {} have?",
        "How much is {}?",
        "What is the number for {}?",
        "{}?",
    ]
    if chart.kind == "pie":
        templates = [
            "What percentage is {}?",
            "How many percent are {}?",
            "What is the share of {}?",
            "How big is the slice for {}?",
            "What is the value of {}?",
            "Which percentage does {} have?",
        ]
    return rng.choice(templates).format(chart.names[i]), sentence(_said(chart, i))


def ask_extreme(chart: Chart, rng: random.Random) -> QA | None:
    """Which one is the largest, the smallest."""
    largest = rng.random() < 0.6
    ranked = sorted(range(len(chart.values)), key=lambda i: chart.values[i], reverse=largest)
    if not chart.is_clear(chart.values[ranked[0]], chart.values[ranked[1]]):
        return None
    words: tuple[str, ...] = ("largest", "biggest", "highest") if largest else ("smallest", "lowest")
    templates = [
        "Which {1} is the {0}?",
        "What is the {0} {1}?",
        "Which one is the {0}?",
        "Which has the {0} value?",
        "Who or what has the {0} value?",
    ]
    if chart.kind in ("bar", "lying bar"):
        templates += ["Which bar is the {}?".format("longest" if largest else "shortest")]
    if chart.kind == "line":
        templates = ["When is it the {0}?", "Where is the line {0}?", "Which has the {0} value?"]
        words = ("highest",) if largest else ("lowest",)
    return rng.choice(templates).format(rng.choice(words), chart.part), Spelled(sentence(chart.names[ranked[0]]))


def ask_which(chart: Chart, rng: random.Random) -> QA | None:
    """Which one has this value."""
    known = [i for i, v in enumerate(chart.values) if chart.is_readable(v) and _only(chart, v)]
    if not known:
        return None
    i = rng.choice(known)
    templates = [
        "Which {1} has the value {0}?",
        "Which one is at {0}?",
        "What has a value of {0}?",
        "Where do you read {0}?",
        "For which name is the value {0}?",
    ]
    return rng.choice(templates).format(_said(chart, i), chart.part), Spelled(sentence(chart.names[i]))


def ask_count(chart: Chart, rng: random.Random) -> QA | None:
    """How many bars, points or slices."""
    templates = ["How many {} are there?", "How many {} does the chart have?", "Count the {}.", "Number of {}?"]
    return rng.choice(templates).format(chart.part + "s"), sentence(NUMBERS[len(chart.values)])


def ask_trend(chart: Chart, rng: random.Random) -> QA | None:
    """Whether a line goes up or down all the way."""
    if chart.kind != "line":
        return None
    ordered = list(chart.values)
    up, down = ordered == sorted(set(ordered)), ordered == sorted(set(ordered), reverse=True)
    if not (up or down) and len(set(ordered)) < len(ordered):
        return None  # flat for a while: neither up nor down, nor both
    templates = [
        "Does the line rise or fall?",
        "Is it going up or down?",
        "What is the trend?",
        "How does the line go?",
    ]
    answer = "It rises." if up else "It falls." if down else "It goes up and down."
    if (up or down) and rng.random() < 0.3:
        asks_up = rng.random() < 0.5
        words = ("Is the line rising?", "Does it go up?") if asks_up else ("Is the line falling?", "Does it go down?")
        return rng.choice(words), yes_no(asks_up == up)
    return rng.choice(templates), answer


def ask_compare(chart: Chart, rng: random.Random) -> QA | None:
    """Whether A is larger than B; as often yes as no."""
    pairs = [
        (i, j) for i, a in enumerate(chart.values) for j, b in enumerate(chart.values) if a > b and chart.is_clear(a, b)
    ]
    if not pairs:
        return None
    more, less = rng.choice(pairs)
    if rng.random() < 0.35:
        a, b = rng.sample((more, less), 2)
        templates = ["Which is larger, {} or {}?", "{} or {}: which is more?", "What is higher, {} or {}?"]
        return rng.choice(templates).format(chart.names[a], chart.names[b]), Spelled(sentence(chart.names[more]))
    truth, smaller = rng.random() < 0.5, rng.random() < 0.3
    a, b = (more, less) if truth != smaller else (less, more)
    word = rng.choice(("smaller", "lower", "less") if smaller else ("larger", "higher", "more"))
    templates = ["Is {} {} than {}?", "Is the value of {} {} than that of {}?", "Is {} really {} than {}?"]
    return rng.choice(templates).format(chart.names[a], word, chart.names[b]), yes_no(truth)


def ask_names(chart: Chart, rng: random.Random) -> QA | None:
    """Everything that the chart names, in order."""
    templates = ["List the names.", "Which {}s are there?", "What are the labels?", "Which labels do you see?"]
    return rng.choice(templates).format(chart.part), Spelled(sentence(join_words(chart.names)))


def ask_describe(chart: Chart, rng: random.Random) -> QA | None:
    """The kind of chart, its title and its names."""
    templates = [
        "What do you see?",
        "What is this?",
        "Describe the picture.",
        "What is in the picture?",
        "What does the image show?",
        "What kind of chart is this?",
    ]
    answer = f'A {_kind(chart)} chart titled "{chart.title}" with {join_words(chart.names)}.'
    return rng.choice(templates), Spelled(answer)


QUESTIONS: dict[str, Callable[[Chart, random.Random], QA | None]] = {
    "charts_title": ask_title,
    "charts_value": ask_value,
    "charts_extreme": ask_extreme,
    "charts_which": ask_which,
    "charts_count": ask_count,
    "charts_trend": ask_trend,
    "charts_compare": ask_compare,
    "charts_names": ask_names,
    "charts_describe": ask_describe,
}
_WEIGHTS = (1.0, 3.0, 1.5, 1.5, 0.7, 1.2, 2.0, 0.4, 0.6)
_EXACT = ("charts_title", "charts_value", "charts_extreme", "charts_which", "charts_count", "charts_compare")


class Charts:
    """Endless charts with two to five questions each. A `Source`."""

    name = "charts"

    def __init__(self, split: Split = "train", *, fonts: str | Path | Fonts | None = None) -> None:
        """
        Args:
            fonts: a pack of fonts, or where it lies; None writes everything in Pillow's own.
        Raises: ValueError if `split` is neither "train" (charts not held out) nor "val", or for an unusable pack.
        """
        self.split = check_split(split)
        self.faces = open_fonts(fonts, split, ("sans", "serif", "mono"))

    def chart(self, seed: int, index: int, attempt: int = 0) -> tuple[Chart, Sheet, tuple[QA, ...]]:
        """The chart, its picture and the questions behind `sample`."""
        rng = rng_for(self.name, self.split, seed, index, attempt)
        chart, sheet = self._draw(rng)
        number = rng.randint(2, 5)
        turns: dict[tuple[str, str], QA] = {}
        tasks = list(QUESTIONS)
        weights = list(_WEIGHTS)
        while len(turns) < number and tasks:
            task = rng.choices(tasks, weights)[0]
            turn = QUESTIONS[task](chart, rng)
            if turn is None or (task, turn[1]) in turns:
                # A chart of two equal bars has no more than four things to ask.
                del weights[tasks.index(task)], tasks[tasks.index(task)]
            else:
                turns[task, turn[1]] = turn
        return chart, sheet, tuple((casual(rng, question), answer) for question, answer in turns.values())

    def sample(self, seed: int, index: int, attempt: int = 0) -> Sample:
        _, sheet, turns = self.chart(seed, index, attempt)
        return Sample(sheet.image, turns, self.name)

    def question(self, seed: int, index: int) -> tuple[Chart, Sheet, QA]:
        """One bar or pie chart with a question that has one exact answer."""
        rng = rng_for("charts_bar_pie", self.split, seed, index)
        while True:
            chart, sheet = self._draw(rng)
            turn = QUESTIONS[rng.choice(_EXACT)](chart, rng)
            if chart.kind != "line" and turn is not None:
                return chart, sheet, (casual(rng, turn[0]), turn[1])

    def _draw(self, rng: random.Random) -> tuple[Chart, Sheet]:
        while True:
            chart = random_chart(rng, self.split)
            sheet = draw_chart(chart, rng, self.faces, MIN_PX)
            if sheet is not None:
                return chart, sheet


def _kind(chart: Chart) -> str:
    return "bar" if chart.kind == "lying bar" else chart.kind


def _said(chart: Chart, i: int) -> str:
    return f"{chart.values[i]}%" if chart.kind == "pie" else str(chart.values[i])


def _only(chart: Chart, value: int) -> bool:
    """Whether no other value could be taken for this one."""
    return sum(other == value or not chart.is_clear(other, value) for other in chart.values) == 1
