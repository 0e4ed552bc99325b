"""Pictures of printed text with questions on it: words, notes, signs, name tags, receipts, tables and forms."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from distill.data.fonts import Fonts, open_fonts
from distill.data.page import Page, PageKind, Press
from distill.data.pages import random_page
from distill.data.printed_questions import (
    READABLE,
    ask_cell,
    ask_count,
    ask_describe,
    ask_field,
    ask_items,
    ask_letter,
    ask_price,
    ask_read,
    ask_there,
    ask_word,
)
from distill.data.sample import QA, Sample, Split, casual, check_split, rng_for
from distill.data.words import Words

FEW_WORDS = 4
MIN_PX: dict[Split, int] = {"train": 12, "val": 16}
_KIND_WEIGHTS: dict[PageKind, float] = {
    "words": 5, "lines": 3, "sign": 2.5, "name tag": 1.2, "receipt": 2.5, "table": 2, "form": 1.8,
}  # fmt: skip

_Ask = Callable[[Page, random.Random], QA | None]
_ABOUT_TEXT: list[_Ask] = [ask_word, ask_word, ask_count, ask_letter, ask_letter, ask_describe]
_ASKS: dict[PageKind, list[_Ask]] = {
    "words": _ABOUT_TEXT,
    "lines": _ABOUT_TEXT,
    "sign": _ABOUT_TEXT,
    "name tag": [ask_field, ask_describe],
    "receipt": [ask_price, ask_price, ask_price, ask_items, ask_count, ask_describe],
    "table": [ask_cell, ask_cell, ask_cell, ask_count, ask_describe],
    "form": [ask_field, ask_field, ask_field, ask_count, ask_describe],
}


class Printed:
    """Endless pages of text with one to five questions each. A `Source`."""

    name = "printed"
    min_px: ClassVar[dict[Split, int]] = MIN_PX
    made_up: ClassVar[float] = 0.1  # of the words

    def __init__(self, split: Split = "train", *, fonts: str | Path | Fonts | None) -> None:
        """
        Args:
            fonts: a pack of fonts, or where it lies.
        Raises: ValueError without fonts, for a pack that cannot be read or has none for this split, or another split.
        """
        if fonts is None:
            raise ValueError(
                "printed text needs fonts; pass fonts= with the file that python -m distill.data.fonts_pack makes"
            )
        self.split = check_split(split)
        self.press = Press(Words(split, made_up=self.made_up), open_fonts(fonts, split), self.min_px[split])

    def page(self, seed: int, index: int, attempt: int = 0) -> tuple[Page, tuple[QA, ...]]:
        """The page and the questions behind `sample`."""
        rng = rng_for(self.name, self.split, seed, index, attempt)
        page = random_page(rng, self.press, rng.choices(list(_KIND_WEIGHTS), list(_KIND_WEIGHTS.values()))[0])
        turns: list[QA] = []
        asks = [self._ask_there, *_ASKS[page.kind]]
        # A page is mostly read out, before the other questions or after them: it gives all of them away.
        read, order = ask_read(page, rng), rng.random()
        most = rng.choice((1, 2, 3, 3)) if read else rng.choice((2, 3, 4, 5))
        for _ in range(4 * most):
            turn = rng.choice(asks)(page, rng)
            if turn is not None and turn[1] not in [answer for _, answer in turns]:
                turns.append(turn)
            if len(turns) == most:
                break
        if read is not None and (order < 0.9 or not turns):
            turns = [read, *turns[: most - 1]] if order < 0.45 else [*turns, read]
        return page, tuple((casual(rng, question), answer) for question, answer in turns)

    def sample(self, seed: int, index: int, attempt: int = 0) -> Sample:
        page, turns = self.page(seed, index, attempt)
        return Sample(page.image, turns, self.name)

    def question(self, seed: int, index: int, *, long: bool = False) -> tuple[Page, QA]:
        """A page of up to `FEW_WORDS` words, or a longer one, that is to be read out, and that question."""
        for attempt in itertools.count():
            rng = rng_for("printed_text", self.split, seed, index, attempt)
            page = random_page(rng, self.press, rng.choice(READABLE))
            if (len(page.text.split()) > FEW_WORDS) == long:
                break
        turn = ask_read(page, rng)
        assert turn is not None, "such a page can be read"
        return page, (casual(rng, turn[0]), turn[1])

    def _ask_there(self, page: Page, rng: random.Random) -> QA | None:
        return ask_there(page, rng, self.press.words)


class LargePrint(Printed):
    """A few words in large letters, to be read out and nothing else: what reading is learned on first."""

    name = "large_print"
    min_px: ClassVar[dict[Split, int]] = {"train": 26, "val": 26}
    made_up: ClassVar[float] = 0.5

    def page(self, seed: int, index: int, attempt: int = 0) -> tuple[Page, tuple[QA, ...]]:
        rng = rng_for(self.name, self.split, seed, index, attempt)
        page = random_page(rng, self.press, rng.choice(("words", "words", "sign")))
        read = ask_read(page, rng)
        assert read is not None, "such a page can be read"
        return page, ((casual(rng, read[0]), read[1]),)
