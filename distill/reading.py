"""Held-out questions on text, charts, digits and statements: when an answer is right, and how well text is read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from PIL import Image

from distill.data.charts import Charts
from distill.data.digits import Digits
from distill.data.errors import character_error_rate
from distill.data.fonts import Fonts
from distill.data.nlvr import Nlvr
from distill.data.printed import Printed
from distill.data.sample import rng_for
from distill.data.shapes import NUMBERS

PRINTED = "printed_text"
PRINTED_LONG = "printed_long"
READING_TASKS = (PRINTED, PRINTED_LONG, "charts_bar_pie", "digits", "nlvr")


def reading_questions(
    task: str,
    count: int,
    seed: int = 0,
    *,
    fonts: str | Path | Fonts | None = None,
    nlvr: str | Path | None = None,
) -> Iterator[tuple[Image.Image, str, str]]:
    """`count` held-out (picture, question, answer) of one task; the same for the same seed.

    printed_text    "What does it say?" of up to four words, on their own, in notes and on signs: words that are never
                    trained on, in families of fonts that are not, 16 px and up. Needs fonts.
    printed_long    the same of five words and more.
    charts_bar_pie  one exact answer from a bar or pie chart: title, value, name or number, larger or not.
    digits          numbers to read and sums to solve that are never trained on, written or printed.
    nlvr            true or false, of the hidden statements; at most as many as there are, each asked once. Needs nlvr.

    Raises: ValueError for an unknown task, or what a task needs and lacks.
    """
    if task in (PRINTED, PRINTED_LONG):
        printed = Printed("val", fonts=fonts)
        for index in range(count):
            page, turn = printed.question(seed, index, long=task == PRINTED_LONG)
            yield page.image, *turn
    elif task == "charts_bar_pie":
        charts = Charts("val", fonts=fonts)
        for index in range(count):
            _, sheet, turn = charts.question(seed, index)
            yield sheet.image, *turn
    elif task == "digits":
        digits = Digits("val", fonts=fonts)
        for index in range(count):
            _, image, turn = digits.question(seed, index)
            yield image, *turn
    elif task == "nlvr":
        if nlvr is None:
            raise ValueError("task nlvr needs its statements; pass nlvr= with the folder that holds nlvr_*.jsonl.gz")
        source = Nlvr(nlvr, "val")
        numbers = range(len(source.statements))
        for number in rng_for(task, seed).sample(numbers, min(count, len(numbers))):
            _, image, turn = source.question(number)
            yield image, *turn
    else:
        raise ValueError(f'task "{task}" is not known; use one of {", ".join(READING_TASKS)}')


def reads_right(task: str, predicted: str, answer: str) -> bool:
    """Whether `predicted` says the same as `answer`.

    * printed_text, printed_long: the same characters, capitals included, apart from white space and quotation marks
      around it.
    * charts_bar_pie, digits: apart from capitals and marks at the ends; a number in digits is as good as in words, and
      zeros before a number count ("07" is not "7").
    * nlvr: true is as good as yes, false as no.
    """
    if task in (PRINTED, PRINTED_LONG):
        return _plain(predicted) == _plain(answer)
    if task == "nlvr":
        return _truth(predicted) is not None and _truth(predicted) == _truth(answer)
    return _said(predicted) == _said(answer)


def printed_error_rate(readings: Iterable[tuple[str, str]]) -> float:
    """Character error rate of (reply, what is printed): quotation marks around a reply do not count.

    Raises: ValueError if nothing is printed.
    """
    return character_error_rate((_plain(reply), answer) for reply, answer in readings)


def _plain(text: str) -> str:
    return " ".join(text.split()).strip('"“”')


def _said(text: str) -> str:
    text = text.strip().strip('.!?"“”').lower()
    return str(NUMBERS.index(text)) if text in NUMBERS else text


def _truth(text: str) -> bool | None:
    first = re.match(r"\W*(true|yes|false|no)\b", text.lower())
    return None if first is None else first[1] in ("true", "yes")
