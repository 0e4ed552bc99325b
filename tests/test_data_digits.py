"""Digits and sums: right answers, strokes that look like what they stand for, nothing held out that is trained on."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distill.data.digits import Digits, Number, ask, draw_number, random_number
from distill.data.fonts import builtin_font
from distill.data.sample import rng_for
from distill.data.shapes import NUMBERS
from distill.data.strokes import CHARACTERS, write_by_hand
from distill.reading import reading_questions, reads_right


def test_held_out_numbers_are_never_trained_on() -> None:
    train = {random_number(rng_for("t", i), "train").text.removesuffix(" ?").removesuffix(" =") for i in range(3000)}
    val = {random_number(rng_for("v", i), "val").text.removesuffix(" ?").removesuffix(" =") for i in range(300)}
    assert len(val) > 100
    assert not train & val
    assert set("0123456789") <= train, "single digits are all trained on"
    assert not any(len(text) == 1 for text in val)


def test_sums_are_right() -> None:
    signs: Counter[str] = Counter()
    for i in range(1000):
        number = random_number(rng_for("sum", i), "train")
        if number.result is None:
            assert number.text.isdigit()
            continue
        a, sign, b = number.text.removesuffix(" ?").removesuffix(" =").split()
        assert number.result == {"+": int(a) + int(b), "-": int(a) - int(b), "x": int(a) * int(b)}[sign]
        assert number.result >= 0
        signs[sign] += 1
    assert min(signs[s] for s in "+-x") > 30


def test_answers_are_right_and_balanced() -> None:
    seen: Counter[str] = Counter()
    for i in range(2000):
        number = random_number(rng_for("ask", i), "train")
        question, answer = ask(number, rng_for("q", i))
        bare = answer.rstrip(".")
        if answer in ("Yes.", "No."):
            digit = re.findall(r"\d", question)[-1]
            assert (answer == "Yes.") == (digit in number.text)
        elif place := re.search(r"\b(first|second|last) digit|comes (first|second|last)", question):
            index = {"first": 0, "second": 1, "last": -1}[place[1] or place[2]]
            assert bare == number.text[index]
        elif bare.lower() in NUMBERS:
            assert NUMBERS.index(bare.lower()) == len(number.text)
        elif number.result is None:
            assert bare == number.text
        else:
            assert bare in (str(number.result), number.text)
            assert (bare == number.text) == bool(re.search("written|Read|say|sum", question)), question
        seen[answer] += 1
    assert abs(seen["Yes."] - seen["No."]) < 60


def test_digits_written_by_hand_look_like_themselves() -> None:
    """The mean of many of one digit is nearer to another one of it than the means of the nine others, mostly."""

    def small(text: str, i: int) -> np.ndarray:
        mask = write_by_hand(text, rng_for(text, i), 60, 112)
        assert mask is not None
        return np.asarray(mask.crop(mask.getbbox()).resize((16, 20))).astype(float) / 255

    means = {d: np.mean([small(d, i) for i in range(40)], axis=0) for d in "0123456789"}
    right = Counter(
        d == min(means, key=lambda other: float(((means[other] - picture) ** 2).sum()))
        for d in means
        for picture in (small(d, 1000 + i) for i in range(20))
    )
    assert right[True] > 0.8 * right.total()


def test_every_hand_is_another() -> None:
    masks = {write_by_hand("5", rng_for(i), 100, 224).tobytes() for i in range(20)}
    assert len(masks) == 20
    assert write_by_hand("123456789", rng_for(0), 100, 224) is None, "too wide for the picture"
    assert set("0123456789+-x=?") == CHARACTERS


@pytest.mark.parametrize("text", ["7", "4071", "3 + 4 = ?"])
def test_numbers_lie_within_the_picture(text: str) -> None:
    """What differs from the background leaves a border free."""
    for i in range(25):
        image = draw_number(Number(text), rng_for(text, i), [builtin_font()])
        assert image.size == (224, 224)
        grey = np.asarray(image.convert("L")).astype(int)
        assert grey.max() - grey.min() > 70


def test_what_is_too_wide_by_a_hair_is_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    wide, narrow = Image.new("L", (224, 224)), Image.new("L", (224, 224))
    wide.paste(255, (1, 100, 223, 120))
    narrow.paste(255, (60, 100, 160, 120))
    masks = iter([wide, wide, *[narrow] * 100])
    monkeypatch.setattr("distill.data.digits.write_by_hand", lambda *_: next(masks))
    for i in range(10):
        assert draw_number(Number("4071"), rng_for("wide", i), [builtin_font()]).size == (224, 224)


def test_same_seed_and_index_give_the_same_sample(font_pack: Path) -> None:
    a, b = Digits(fonts=font_pack).sample(1, 5), Digits(fonts=font_pack).sample(1, 5)
    assert a.turns == b.turns
    assert np.array_equal(np.asarray(a.image), np.asarray(b.image))
    samples = [Digits().sample(0, i) for i in range(200)]
    assert len({question for sample in samples for question, _ in sample.turns}) > 60
    with pytest.raises(ValueError, match='split "test"'):
        Digits("test")


def test_held_out_questions_read_or_solve() -> None:
    source = Digits("val")
    for i in range(60):
        number, _, (_, answer) = source.question(0, i)
        assert number.is_held_out
        assert answer in (f"{number.text}.", f"{number.result}.")
    assert len(list(reading_questions("digits", 3))) == 3


@pytest.mark.parametrize(
    ("predicted", "answer", "right"),
    [("482", "482.", True), ("482.", "482.", True), ("seven", "7.", True), ("07", "7.", False), ("48", "482.", False)],
)
def test_scoring(predicted: str, answer: str, right: bool) -> None:
    assert reads_right("digits", predicted, answer) is right
