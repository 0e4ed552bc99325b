"""Digits, numbers and sums, handwritten or printed."""

from __future__ import annotations

import operator
import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from distill.data.fonts import Font, Fonts, open_fonts
from distill.data.sample import QA, Sample, Split, casual, check_split, held_out, rng_for, sentence, yes_no
from distill.data.shapes import NUMBERS
from distill.data.sheet import Sheet, baseline, blank_sheet, ink_on, pick_size, room, worn
from distill.data.strokes import write_by_hand

HELD_OUT_PERCENT = 10
SIZE_PX = 224
MIN_PX = 18
_OPERATORS = {"+": operator.add, "-": operator.sub, "x": operator.mul}


@dataclass(frozen=True)
class Number:
    """What is written: a number, or a sum with its result.

    text: as written, "4071" or "3 + 4 = ?".   result: of a sum, else None.
    """

    text: str
    result: int | None = None

    @property
    def digits(self) -> str:
        return "".join(character for character in self.text if character.isdigit())

    @property
    def is_held_out(self) -> bool:
        """True for what is kept for evaluation. Never a single digit: there are only ten."""
        content = self.text.removesuffix(" ?").removesuffix(" =")
        return len(content) > 1 and held_out(content, HELD_OUT_PERCENT)


def random_number(rng: random.Random, split: Split) -> Number:
    """A digit, a number of up to six digits, or a sum: a held-out one for split "val", another for "train"."""
    while True:
        roll = rng.random()
        if roll < 0.35:
            number = _random_sum(rng)
        else:
            count = rng.choice((1, 1, 1, 2, 2, 3, 4, 5, 6))
            number = Number("".join(rng.choice("0123456789") for _ in range(count)))
        if number.is_held_out == (split == "val"):
            return number


def _random_sum(rng: random.Random) -> Number:
    sign = rng.choice("++-x")
    most = 9 if sign == "x" or rng.random() < 0.6 else 20
    a, b = rng.randint(0, most), rng.randint(0, most)
    if sign == "-" and b > a:
        a, b = b, a
    ending = rng.choice((" = ?", " =", " = ?", ""))
    return Number(f"{a} {sign} {b}{ending}", _OPERATORS[sign](a, b))


def ask(number: Number, rng: random.Random) -> QA:
    """A question on a number, or on a sum."""
    return _ask_sum(number, rng) if number.result is not None else _ask_number(number, rng)


def _ask_number(number: Number, rng: random.Random) -> QA:
    digits = number.digits
    if len(digits) == 1:
        templates = [
            "Which digit is this?",
            "What digit do you see?",
            "What number is this?",
            "Read the digit.",
            "Which number is written here?",
            "What is the number?",
        ]
        if rng.random() < 0.2:
            truth = rng.random() < 0.5
            shown = digits if truth else rng.choice([d for d in "0123456789" if d != digits])
            return rng.choice(("Is this a {}?", "Is it the digit {}?", "Does it say {}?")).format(shown), yes_no(truth)
        return rng.choice(templates), sentence(digits)
    roll = rng.random()
    if roll < 0.55:
        templates = [
            "What number is this?",
            "Which number do you see?",
            "Read the number.",
            "What is the number?",
            "What number is written here?",
            "Which digits are these?",
            "What does it say?",
            "Read the digits from left to right.",
        ]
        return rng.choice(templates), sentence(digits)
    if roll < 0.7:
        templates = ["How many digits are there?", "How many digits does the number have?", "Count the digits."]
        return rng.choice(templates), sentence(NUMBERS[len(digits)])
    if roll < 0.85:
        place, digit = rng.choice((("first", digits[0]), ("last", digits[-1]), ("second", digits[1])))
        templates = ["What is the {} digit?", "Which digit comes {}?", "Tell me the {} digit."]
        return rng.choice(templates).format(place), sentence(digit)
    truth = rng.random() < 0.5
    digit = rng.choice(digits) if truth else rng.choice([d for d in "0123456789" if d not in digits])
    templates = ["Is there a {} in the number?", "Does the number contain a {}?", "Do you see the digit {}?"]
    return rng.choice(templates).format(digit), yes_no(truth)


def _ask_sum(number: Number, rng: random.Random) -> QA:
    if rng.random() < 0.7:
        templates = [
            "What is the answer?",
            "Solve it.",
            "What is the result?",
            "How much is it?",
            "Can you solve this?",
            "What should stand for the question mark?" if "?" in number.text else "What comes out?",
            "Calculate this.",
            "What does this make?",
            "Work it out.",
        ]
        return rng.choice(templates), sentence(str(number.result))
    templates = ["What is written here?", "Read the task.", "What does it say?", "Which sum is this?", "Read it out."]
    return rng.choice(templates), number.text


class Digits:
    """Endless numbers and sums with one to three questions each. A `Source`."""

    name = "digits"

    def __init__(self, split: Split = "train", *, fonts: str | Path | Fonts | None = None) -> None:
        """
        Args:
            fonts: a pack of fonts, or where it lies; None prints with Pillow's own. Two pictures in three are drawn
                stroke by stroke in any case.
        Raises: ValueError if `split` is neither "train" (what is not held out) nor "val", or for an unusable pack.
        """
        self.split = check_split(split)
        self.faces = open_fonts(fonts, split)

    def number(self, seed: int, index: int, attempt: int = 0) -> tuple[Number, Image.Image, tuple[QA, ...]]:
        """The number, its picture and the questions behind `sample`."""
        rng = rng_for(self.name, self.split, seed, index, attempt)
        number = random_number(rng, self.split)
        turns: dict[str, str] = {}  # by answer: the same again would teach nothing
        for _ in range(rng.choice((1, 2, 2, 3))):
            question, answer = ask(number, rng)
            turns.setdefault(answer, question)
        image = draw_number(number, rng, self.faces)
        return number, image, tuple((casual(rng, question), answer) for answer, question in turns.items())

    def sample(self, seed: int, index: int, attempt: int = 0) -> Sample:
        _, image, turns = self.number(seed, index, attempt)
        return Sample(image, turns, self.name)

    def question(self, seed: int, index: int) -> tuple[Number, Image.Image, QA]:
        """A number that is to be read, or a sum that is to be solved."""
        rng = rng_for("digits", self.split, "question", seed, index)
        while True:
            number = random_number(rng, self.split)
            question, answer = ask(number, rng)
            if answer in (sentence(number.digits), sentence(str(number.result))):
                return number, draw_number(number, rng, self.faces), (casual(rng, question), answer)


def draw_number(number: Number, rng: random.Random, faces: list[Font]) -> Image.Image:
    """A picture of 224 px with the number at any size and nearly any place."""
    while True:
        sheet, background = blank_sheet(rng, SIZE_PX)
        ink = ink_on(background, rng)
        fits = _write(number, rng, sheet, ink) if rng.random() < 0.67 else _print(number, rng, sheet, ink, faces)
        if fits:
            return worn(sheet.image, rng)


def _write(number: Number, rng: random.Random, sheet: Sheet, ink: tuple[int, int, int]) -> bool:
    height = min(180.0, 330 / len(number.text)) * rng.uniform(0.35, 1)
    mask = write_by_hand(number.text, rng, max(MIN_PX, height), SIZE_PX)
    if mask is None:
        return False
    left, top, right, bottom = mask.getbbox() or (0, 0, SIZE_PX, SIZE_PX)
    if max(right - left, bottom - top) > SIZE_PX - 4:
        return False
    shift = rng.randint(2 - left, SIZE_PX - 2 - right), rng.randint(2 - top, SIZE_PX - 2 - bottom)
    sheet.image.paste(ink, shift, mask)
    return True


def _print(number: Number, rng: random.Random, sheet: Sheet, ink: tuple[int, int, int], faces: list[Font]) -> bool:
    font = rng.choice(faces)
    limit = room(font, [number.text], SIZE_PX - 12, SIZE_PX - 12)
    if limit < MIN_PX:
        return False
    face = font.at(pick_size(rng, MIN_PX, limit))
    x = rng.uniform(6, max(6, SIZE_PX - 6 - face.getlength(number.text)))
    sheet.write(number.text, x, baseline(rng.uniform(4, SIZE_PX - 4 - face.size * 1.25), face.size), face, ink)
    return sheet.fits
