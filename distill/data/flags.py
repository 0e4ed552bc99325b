"""Pictures of flags with questions: whose flag it is, and its colours where they are certain.

Split "train" shows flags filling the picture, as a rectangle on a background, or hung along random curves. Split "val"
shows the same flags by other artists, always as a sine wave with its own shade, on a background; the curves of training
come near that (see `restyle.bend`), the artists do not.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from distill.data.icon_scene import open_drawing, read_drawings
from distill.data.photos import squash
from distill.data.restyle import bend, restyle
from distill.data.sample import QA, Sample, Split, casual, check_split, join_words, rng_for, sentence, yes_no
from distill.data.scene import COLORS, draw_background, random_look

_SIZE_PX = 224

_WHOSE = (
    "Which country's flag is this?",
    "Whose flag is this?",
    "What flag is this?",
    "Which flag is this?",
    "Which country does this flag belong to?",
    "What country is this the flag of?",
    "Which country has this flag?",
    "Name the country of this flag.",
    "Do you know this flag?",
    "What country is this flag from?",
    "Which country is this?",
    "Identify the flag.",
)
_IS_IT = (
    "Is this the flag of {}?",
    "Is it the flag of {}?",
    "Does this flag belong to {}?",
    "Would you say this is the flag of {}?",
    "Does the picture show the flag of {}?",
)
_WHAT = ("What is this?", "What do you see?", "What is in the picture?", "Describe the picture.", "What is shown here?")


@dataclass(frozen=True, slots=True)
class Flag:
    """One drawing of a flag. country: "Japan", "the Netherlands".  colors: all of them, or none if not certain."""

    key: str
    data: bytes
    country: str
    colors: tuple[str, ...]


class Flags:
    """Flags with one to three questions each. A `Source`."""

    name = "flags"

    def __init__(self, path: str | Path, split: Split = "train") -> None:
        """Reads the file that `icons_pack` makes into memory; raises as `read_drawings`."""
        self.split = check_split(split)
        self.flags = []
        for key, data, record in read_drawings(Path(path), split, "flag"):
            self.flags.append(Flag(key, data, record["name"], tuple(record["colors"])))
        self.countries = sorted({flag.country for flag in self.flags})
        self._by_colors: dict[tuple[str, ...], list[str]] = {}
        for flag in self.flags:
            self._by_colors.setdefault(flag.colors, []).append(flag.country)

    def draw(self, flag: Flag, rng: random.Random) -> Image.Image:
        """The flag as this split shows flags, RGB, 224 x 224."""
        drawing = open_drawing(flag.key, flag.data)
        if self.split == "val":
            return _draw_waving(drawing, rng)
        return _draw_flat(drawing, rng)

    def sample(self, seed: int, index: int, attempt: int = 0) -> Sample:
        rng = rng_for(self.name, self.split, seed, index, attempt)
        flag = rng.choice(self.flags)
        image = self.draw(flag, rng)
        turns = [(rng.choice(_WHOSE), sentence(flag.country))]
        if rng.random() < 0.2:
            turns = [(rng.choice(_WHAT), f"The flag of {flag.country}.")]
        if rng.random() < 0.4:
            turns.insert(0, self._is_it(flag, rng))
        if flag.colors and rng.random() < 0.4:
            turns.insert(0, ask_colors(flag, rng))
        return Sample(image, tuple((casual(rng, question), answer) for question, answer in turns), self.name)

    def _is_it(self, flag: Flag, rng: random.Random) -> QA:
        """As often yes as no; a wrong country has a flag of the same colours more often than not."""
        truth = rng.random() < 0.5
        country = flag.country
        if not truth:
            pool = self._by_colors[flag.colors] if rng.random() < 0.6 else self.countries
            others = [name for name in pool if name != flag.country] or [c for c in self.countries if c != flag.country]
            if others:
                country = rng.choice(others)
        return rng.choice(_IS_IT).format(country), yes_no(country == flag.country)


def flag_question(flags: Flags, seed: int, index: int) -> Sample:
    """Whose flag is this?  Every country in turn."""
    rng = rng_for("flags", flags.split, seed, index)
    country = flags.countries[index % len(flags.countries)]
    flag = rng.choice([flag for flag in flags.flags if flag.country == country])
    return Sample(flags.draw(flag, rng), ((casual(rng, rng.choice(_WHOSE)), sentence(country)),), "flags")


def ask_colors(flag: Flag, rng: random.Random) -> QA:
    """All colours, in the order of `COLORS`; or whether one is among them."""
    if rng.random() < 0.4:
        truth = rng.random() < 0.5
        others = [color for color in COLORS if color not in flag.colors]
        color = rng.choice(flag.colors if truth else others)
        templates = ["Is there {} in the flag?", "Does this flag have any {}?", "Is {} one of the colors of this flag?"]
        return rng.choice(templates).format(color), yes_no(truth)
    templates = [
        "What colors does the flag have?",
        "Which colors are in this flag?",
        "What are the colors of this flag?",
        "What colors do you see in the flag?",
    ]
    return rng.choice(templates), sentence(join_words(flag.colors))


def _draw_flat(drawing: Image.Image, rng: random.Random) -> Image.Image:
    background = random_look(rng)
    if rng.random() < 0.6:
        drawing = restyle(drawing, rng)
    bent = rng.random() < 0.6
    if bent:
        drawing = bend(drawing, rng)
    elif rng.random() < 0.35:
        flat = Image.new("RGB", drawing.size, background.background)
        flat.paste(drawing, (0, 0), drawing)
        return squash(flat, _SIZE_PX)
    width = rng.uniform(0.45, 0.96)
    height = width / rng.uniform(1.0, 2.0)
    size = (round(width * _SIZE_PX), round(height * _SIZE_PX))
    drawing = drawing.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
    if not bent and rng.random() < 0.6:
        drawing = ImageOps.expand(drawing, 1, (90, 90, 90, 255))  # or a white stripe ends in a white background
    if rng.random() < 0.3:
        drawing = drawing.rotate(rng.uniform(-9, 9), Image.Resampling.BILINEAR, expand=True)
    return _on_background(drawing, draw_background(background, _SIZE_PX), rng)


def _draw_waving(drawing: Image.Image, rng: random.Random) -> Image.Image:
    width_px = rng.randint(130, 205)
    height_px = round(width_px / rng.uniform(1.3, 1.9))
    pixels = np.asarray(drawing.resize((width_px, height_px), Image.Resampling.BICUBIC)).astype(np.float32)
    swing_px = rng.uniform(0.03, 0.07) * width_px
    phase = np.linspace(0, rng.uniform(1.2, 2.2) * 2 * math.pi, width_px) + rng.uniform(0, 2 * math.pi)
    shift = np.round(swing_px * np.sin(phase)).astype(int)
    reach = int(np.abs(shift).max())
    waved = np.zeros((height_px + 2 * reach, width_px, 4), np.float32)
    rows = np.arange(height_px)[:, None] + reach + shift[None]
    waved[rows, np.arange(width_px)[None]] = pixels
    waved[..., :3] *= (0.86 + 0.14 * np.cos(phase))[None, :, None]  # a fold in the shade
    cloth = Image.fromarray(waved.clip(0, 255).astype(np.uint8), "RGBA")
    return _on_background(cloth, draw_background(random_look(rng), _SIZE_PX), rng)


def _on_background(drawing: Image.Image, image: Image.Image, rng: random.Random) -> Image.Image:
    drawing.thumbnail((_SIZE_PX, _SIZE_PX))
    left, top = (rng.randint(0, _SIZE_PX - side) for side in drawing.size)
    image.paste(drawing, (left, top), drawing)
    return image
