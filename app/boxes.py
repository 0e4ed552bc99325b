"""Places that an answer names: `<ref>cat</ref><box>[[x1, y1, x2, y2]]</box>`, coordinates from 0 to 1000. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

COORDINATES = 1000
COLOURS = ("#0d9488", "#ea580c", "#7c3aed", "#db2777", "#2563eb", "#65a30d")
_PLACE = re.compile(r"(?:<ref>(?P<name>[^<]*)</ref>)?\s*<box>(?P<boxes>[\[\]\d\s,.]*)</box>")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")


@dataclass(frozen=True)
class Place:
    """`box` is left, top, right, bottom in thousandths of the picture."""

    name: str
    box: tuple[float, float, float, float]


def find_places(text: str) -> list[Place]:
    """All boxes of an answer; what is no box of four numbers within the picture is left out."""
    found = []
    for match in _PLACE.finditer(text):
        numbers = [float(n) for n in _NUMBER.findall(match["boxes"])]
        for i in range(0, len(numbers) - 3, 4):
            left, top, right, bottom = numbers[i : i + 4]
            if left < right <= COORDINATES and top < bottom <= COORDINATES:
                found.append(Place((match["name"] or "").strip(), (left, top, right, bottom)))
    return found


def without_marks(text: str, bold: str = "**") -> str:
    """The answer for people: names between `bold`, boxes left out. A mark that is still being written is held back."""
    text = _PLACE.sub(lambda match: f"{bold}{match['name'].strip()}{bold}" if match["name"] else "", text)
    return re.sub(r"<(?:ref|box)>[^<]*(?:</ref>\s*)?(?:<box>[^<]*)?$", "", text)


def draw_places(image: Image.Image, places: Sequence[Place]) -> Image.Image:
    """A copy of an RGB image with the boxes on it, each with its name."""
    from PIL import ImageDraw, ImageFont

    out = image.copy()
    draw = ImageDraw.Draw(out)
    width = max(2, round(max(out.size) / 200))
    size = max(12, round(max(out.size) / 32))
    font = ImageFont.load_default(size)
    for i, place in enumerate(places):
        left, top, right, bottom = (
            value * side / COORDINATES for value, side in zip(place.box, (*out.size, *out.size), strict=True)
        )
        colour = COLOURS[i % len(COLOURS)]
        draw.rectangle([left, top, right, bottom], outline=colour, width=width)
        if place.name:
            at = (left, max(0, top - size - 6))
            draw.rectangle(draw.textbbox(at, place.name, font), fill=colour)
            draw.text(at, place.name, "white", font)
    return out
