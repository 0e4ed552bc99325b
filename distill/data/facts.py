"""Questions about a photo that its pixels answer: brightness, colours, black and white, the shape of the frame.

What is asked is first measured, and asked only where it is far from the border between two answers. So nothing here
depends on labels, and any photo will do.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from distill.data.photos import Photo, Photos, squash
from distill.data.sample import QA, Sample, Split, casual, check_split, rng_for, yes_no
from distill.data.unseen import part_of

_SIZE_PX = 224
_SMALL_PX = 28  # what is measured: a photo shrunk to this
_CHROMA = 45  # largest minus smallest channel: from here on a pixel has a colour, with the margin below
_FRAMES: dict[str, tuple[float, float]] = {"landscape": (1.45, 2.4), "portrait": (0.42, 0.69), "square": (1.0, 1.0)}

Frame = Literal["landscape", "portrait", "square"]

# Upper ends of the named stretches of the hue circle in degrees; between the names lies what has no certain one.
_HUES = (
    (10, "red"),
    (18, ""),
    (36, "orange"),
    (46, ""),
    (62, "yellow"),
    (85, ""),
    (160, "green"),
    (195, ""),
    (245, "blue"),
    (262, ""),
    (292, "purple"),
    (345, ""),
    (360, "red"),
)
_NAMES = ("red", "orange", "yellow", "green", "blue", "purple", "white", "black", "gray")
_HUE_NAMES = np.array([_NAMES.index(name) if name else -1 for _, name in _HUES])
_HUE_ENDS = np.array([end for end, _ in _HUES])


@dataclass(frozen=True)
class Measures:
    """Of a photo, shrunk. Shares are of the pixels, grey levels from 0 to 255.

    shares: of each colour name; what has no certain name is in none.
    """

    brightness: float
    left: float
    right: float
    top: float
    bottom: float
    chroma: float
    most_chroma: float  # of the 98th percentile: nothing but grey below a few levels
    shares: dict[str, float]

    @property
    def hues(self) -> list[str]:
        """Colours that take 5 % or more, apart from white, gray and black."""
        return [name for name in _NAMES[:6] if self.shares[name] >= 0.05]


def measure(image: Image.Image) -> Measures:
    """What is asked about a photo, from 28 x 28 means of its pixels."""
    small = np.asarray(image.resize((_SMALL_PX, _SMALL_PX), Image.Resampling.BOX, reducing_gap=2.0), np.float32)
    luma = small @ np.array([0.299, 0.587, 0.114], np.float32)
    high, low = small.max(2), small.min(2)
    chroma = high - low
    names = _color_numbers(small, high, chroma)
    counts = np.bincount(names.ravel() + 1, minlength=len(_NAMES) + 1)[1:] / names.size
    half = _SMALL_PX // 2
    return Measures(
        brightness=float(luma.mean()),
        left=float(luma[:, :half].mean()),
        right=float(luma[:, half:].mean()),
        top=float(luma[:half].mean()),
        bottom=float(luma[half:].mean()),
        chroma=float(chroma.mean()),
        most_chroma=float(np.percentile(chroma, 98)),
        shares=dict(zip(_NAMES, counts.tolist(), strict=True)),
    )


def _color_numbers(rgb: np.ndarray, high: np.ndarray, chroma: np.ndarray) -> np.ndarray:
    """Number in `_NAMES` of each pixel's colour, -1 without a certain one."""
    safe = np.maximum(chroma, 1e-3)
    red, green, blue = (rgb[..., i] for i in range(3))
    sector = np.where(
        high == red,
        (green - blue) / safe % 6,
        np.where(high == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    hue = _HUE_NAMES[np.searchsorted(_HUE_ENDS, np.minimum(sector * 60, 359.9))]
    strong = (chroma >= _CHROMA) & (chroma >= 0.4 * high) & (high >= 80)
    # Orange in the dark is brown, pale red is pink: neither is asked for.
    strong &= (hue != _NAMES.index("orange")) | ((high >= 180) & (chroma >= 0.6 * high))
    strong &= (hue != _NAMES.index("red")) | (chroma >= 0.6 * high)
    plain = chroma < 18
    number = np.where(strong, hue, -1)
    number = np.where(plain & (high > 215), _NAMES.index("white"), number)
    number = np.where(plain & (high > 90) & (high < 175), _NAMES.index("gray"), number)
    return np.where((high < 40) & (chroma < 30), _NAMES.index("black"), number)


# -- questions ---------------------------------------------------------------------------------------------------------
# Each returns (question, answer), or None where it would not be certain.


def ask_main_color(m: Measures, rng: random.Random) -> QA | None:
    """The colour of most of the photo; or whether it is one, or whether a colour is there at all."""
    first, second = sorted(m.shares.items(), key=lambda item: -item[1])[:2]
    if rng.random() < 0.35:
        truth = rng.random() < 0.5
        names = [n for n in _NAMES[:6] if (m.shares[n] >= 0.15 if truth else _surely_absent(m, n))]
        if not names:
            return None
        templates = ["Is there a lot of {} in the photo?", "Do you see much {} in this picture?", "Is much of this {}?"]
        return rng.choice(templates).format(rng.choice(names)), yes_no(truth)
    if first[1] < 0.5 or second[1] > 0.2:
        return None
    if rng.random() < 0.4:
        truth = rng.random() < 0.5
        others = [name for name in _NAMES if name != first[0] and m.shares[name] < 0.05]
        if not others:
            return None
        name = first[0] if truth else rng.choice(others)
        templates = ["Is the picture mostly {}?", "Is most of this photo {}?", "Is {} the main color here?"]
        return rng.choice(templates).format(name), yes_no(truth)
    templates = [
        "What is the main color of the picture?",
        "Which color takes up most of the photo?",
        "What color is most of this picture?",
        "Which color is there most of?",
        "What is the dominant color?",
    ]
    return rng.choice(templates), f"{first[0].capitalize()}."


def _surely_absent(m: Measures, name: str) -> bool:
    """No pixel is certainly of this colour, and few could be argued about."""
    certain = sum(m.shares.values())
    return m.shares[name] < 0.002 and (certain > 0.9 or m.most_chroma < 30)


def ask_brightness(m: Measures, rng: random.Random) -> QA | None:
    """Bright or dark."""
    if 75 < m.brightness < 180:
        return None
    bright = m.brightness >= 180
    if rng.random() < 0.4:
        asked = rng.random() < 0.5
        word = "bright" if asked else "dark"
        templates = ["Is the picture {}?", "Is this a {} photo?", "Would you call this picture {}?"]
        return rng.choice(templates).format(word), yes_no(asked == bright)
    templates = [
        "Is the picture bright or dark?",
        "Is this photo dark or bright?",
        "Bright or dark?",
        "How bright is the picture?",
        "Is the image rather dark or rather bright?",
    ]
    return rng.choice(templates), "It is bright." if bright else "It is dark."


def ask_half(m: Measures, rng: random.Random) -> QA | None:
    """Which of two halves is brighter or darker."""
    pairs = [("left", "right", m.left - m.right), ("top", "bottom", m.top - m.bottom)]
    pairs = [pair for pair in pairs if abs(pair[2]) >= 40]
    if not pairs:
        return None
    first, second, difference = rng.choice(pairs)
    brighter, darker = (first, second) if difference > 0 else (second, first)
    word, right, wrong = ("brighter", brighter, darker) if rng.random() < 0.6 else ("darker", darker, brighter)
    if rng.random() < 0.4:
        truth = rng.random() < 0.5
        side, other = (right, wrong) if truth else (wrong, right)
        templates = ["Is the {0} half {2} than the {1} half?", "Is the picture {2} at the {0} than at the {1}?"]
        return rng.choice(templates).format(side, other, word), yes_no(truth)
    templates = [
        "Which half is {2}, the {0} or the {1}?",
        "Is the {0} or the {1} half {2}?",
        "Which side is {2}, {0} or {1}?",
    ]
    return rng.choice(templates).format(first, second, word), f"The {right} half."


def ask_colorful(m: Measures, rng: random.Random) -> QA | None:
    """Of one colour or of many."""
    many = len(m.hues) >= 3 and m.chroma > 60
    one = max(m.shares.values()) > 0.7 and len(m.hues) <= 1
    if not many and not one:
        return None
    if rng.random() < 0.5:
        asked = rng.random() < 0.5
        templates = (
            ["Is the picture colorful?", "Does the photo have many colors?", "Are there many different colors?"]
            if asked
            else ["Is the picture mostly of one color?", "Is nearly everything here the same color?"]
        )
        return rng.choice(templates), yes_no(asked == many)
    templates = ["Is the picture colorful or mostly of one color?", "One color or many?", "How colorful is this photo?"]
    return rng.choice(templates), "It has many colors." if many else "It is mostly of one color."


def ask_gray(m: Measures, rng: random.Random) -> QA | None:
    """Black and white or in colour."""
    if 4 < m.most_chroma < 60:
        return None
    gray = m.most_chroma <= 4
    if rng.random() < 0.55:
        asked = rng.random() < 0.5
        templates = (
            ["Is this a black and white photo?", "Is the picture in black and white?", "Is the photo black and white?"]
            if asked
            else ["Is the photo in color?", "Is this a color picture?"]
        )
        return rng.choice(templates), yes_no(asked == gray)
    templates = [
        "Is the photo in color or in black and white?",
        "Color or black and white?",
        "Is this picture black and white or in color?",
    ]
    return rng.choice(templates), "Black and white." if gray else "In color."


def ask_frame(frame: Frame, rng: random.Random) -> QA:
    """The shape of a photo that lies on a canvas."""
    if rng.random() < 0.45:
        asked = frame if rng.random() < 0.5 else rng.choice([name for name in _FRAMES if name != frame])
        words = {
            "landscape": ("in landscape format", "wider than tall"),
            "portrait": ("in portrait format", "taller than wide"),
            "square": ("square", "as wide as it is tall"),
        }
        templates = ["Is the photo {}?", "Is the photo on this page {}?", "Would you say the photo is {}?"]
        return rng.choice(templates).format(rng.choice(words[asked])), yes_no(asked == frame)
    templates = [
        "Is the photo in portrait, landscape or square format?",
        "What format does the photo have?",
        "Is the photo wide, tall or square?",
        "Portrait, landscape or square?",
        "What is the shape of the photo?",
    ]
    answers = {
        "landscape": "Landscape, wider than tall.",
        "portrait": "Portrait, taller than wide.",
        "square": "Square.",
    }
    return rng.choice(templates), answers[frame]


ASKS: tuple[Callable[[Measures, random.Random], QA | None], ...] = (
    ask_main_color,
    ask_brightness,
    ask_half,
    ask_colorful,
    ask_gray,
)


class PhotoFacts:
    """Photos drawn with replacement, with one to three questions about what can be measured. A `Source`.

    A fifth of the photos is turned to black and white, another fifth is cut and laid on a canvas to ask for its
    format; a mixture of questions that had only the photos' own would nearly always say "in color".
    """

    name = "photo_facts"

    def __init__(self, photos: str | Path | Photos, split: Split = "train") -> None:
        """
        Args:
            photos: of the same split, or where they lie. For training, those of classes that are only shown in
                evaluation (`distill.data.unseen`) are left out.
        Raises: ValueError as `read_photos`, or for photos of another split.
        """
        self.split = check_split(split)
        source = photos if isinstance(photos, Photos) else Photos(photos, split)
        if source.split != split:
            raise ValueError(f'the photos are of split "{source.split}", not "{split}"; read that split')
        self.photos: Sequence[Photo] = [
            photo for photo in source.photos if split == "val" or part_of(photo.class_name) != "val"
        ]

    def sample(self, seed: int, index: int, attempt: int = 0) -> Sample:
        rng = rng_for(self.name, self.split, seed, index, attempt)
        while True:  # some photos are middling in all respects
            image, turns = self._ask(rng)
            if turns:
                return Sample(image, tuple((casual(rng, question), answer) for question, answer in turns), self.name)

    def _ask(self, rng: random.Random) -> tuple[Image.Image, list[QA]]:
        image = rng.choice(self.photos).open()
        gray = rng.random() < 0.2
        if gray:
            image = image.convert("L").convert("RGB")
        if rng.random() < 0.2:
            return _on_canvas(image, rng)
        image = squash(image, _SIZE_PX)
        if self.split == "train" and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        measures = measure(image)
        found = {ask: turn for ask in ASKS if (turn := ask(measures, rng)) is not None}
        # A gray photo allows little else; others all allow the question for color, and must not drown in it.
        if not gray and len(found) > 1 and rng.random() < 0.6:
            found.pop(ask_gray, None)
        asked = list(found.values())
        rng.shuffle(asked)
        return image, asked[: rng.randint(1, 3)]


def _on_canvas(image: Image.Image, rng: random.Random) -> tuple[Image.Image, list[QA]]:
    """The photo cut to a format, on a plain canvas, and questions for the format."""
    names: tuple[Frame, ...] = ("landscape", "portrait", "square")
    frame = rng.choice(names)
    ratio = rng.uniform(*_FRAMES[frame])
    width, height = image.size
    cut_width, cut_height = min(width, height * ratio), min(height, width / ratio)
    left, top = rng.uniform(0, width - cut_width), rng.uniform(0, height - cut_height)
    side = rng.uniform(0.6, 1.0 if frame != "square" else 0.85) * _SIZE_PX
    size = (round(side * min(1, ratio)), round(side / max(1, ratio)))
    photo = image.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + cut_width, top + cut_height))
    rim = _rim(photo)
    shades = [s for s in (255, 250, 235, 200, 128, 60, 20, 0) if (np.abs(rim - s) > 40).mean() > 0.85]
    if not shades:  # one could not see where the photo ends
        return image, []
    shade = rng.choice(shades)
    canvas = Image.new("RGB", (_SIZE_PX, _SIZE_PX), (shade, shade, shade))
    if rng.random() < 0.6:
        corner = ((_SIZE_PX - size[0]) // 2, (_SIZE_PX - size[1]) // 2)
    else:
        corner = (rng.randint(0, _SIZE_PX - size[0]), rng.randint(0, _SIZE_PX - size[1]))
    canvas.paste(photo, corner)
    turns = [ask_frame(frame, rng)]
    if rng.random() < 0.3 and (another := ask_frame(frame, rng)) not in turns:
        turns.append(another)
    return canvas, turns


def _rim(photo: Image.Image) -> np.ndarray:
    """Grey levels along the border of the photo."""
    small = np.asarray(photo.convert("L").resize((_SMALL_PX, _SMALL_PX), Image.Resampling.BOX), np.float32)
    return np.concatenate([small[0], small[-1], small[:, 0], small[:, -1]])


def fact_question(facts: PhotoFacts, seed: int, index: int) -> Sample:
    """One question about one photo."""
    sample = facts.sample(seed, index)
    return Sample(sample.image, sample.turns[:1], sample.task)
