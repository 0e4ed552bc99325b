"""What a page of text is: what is printed on it, and what it is made with."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from distill.data.fonts import Font
from distill.data.sheet import Box, Sheet, worn
from distill.data.words import Words

PageKind = Literal["words", "lines", "sign", "name tag", "receipt", "table", "form"]
SIZE_PX = 224


@dataclass(frozen=True)
class Page:
    """What a picture shows.

    lines: all that is printed, from top to bottom; the cells of a row are joined by spaces.
    fields: of a receipt (item, price), of a form (label, value or "" where it was left blank), of a name tag ("name",
        name); prices with their sign, as printed.
    table: its rows, the header first. title: a receipt's shop. total: a receipt's sum.
    boxes: every text that was written, with the pixels that it covers.
    """

    kind: PageKind
    image: Image.Image
    lines: tuple[str, ...]
    boxes: tuple[tuple[str, Box], ...]
    fields: tuple[tuple[str, str], ...] = ()
    table: tuple[tuple[str, ...], ...] = ()
    title: str = ""
    total: str = ""

    @property
    def text(self) -> str:
        return " ".join(self.lines)


@dataclass(frozen=True)
class Press:
    """What pages are made with: words and faces of one split, and the smallest size of letters."""

    words: Words
    faces: list[Font]
    min_px: int

    def face(self, rng: random.Random, *kinds: str) -> Font:
        """A face, of these kinds if there are any."""
        fitting = [face for face in self.faces if face.kind in kinds]
        return rng.choice(fitting or self.faces)


def finished_page(
    kind: PageKind,
    sheet: Sheet,
    rng: random.Random,
    lines: list[str],
    *,
    fields: tuple[tuple[str, str], ...] = (),
    table: tuple[tuple[str, ...], ...] = (),
    title: str = "",
    total: str = "",
) -> Page | None:
    """The page that was drawn, or None if something lies outside the picture."""
    if not sheet.fits:
        return None
    image = worn(sheet.image, rng)
    return Page(kind, image, tuple(lines), tuple(sheet.boxes), fields, table, title, total)
