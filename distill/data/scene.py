"""Scenes of coloured shapes: what is in them, where, and how they are drawn.

A scene is drawn from a random generator alone. Nothing overlaps, every colour stands out from the background, and the
colours keep clear of each other, so that a question about the content has one answer.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

from distill.data.sample import Split, held_out

RGB = tuple[int, int, int]

# The order of both is the order in which a description names things.
COLORS: dict[str, RGB] = {
    "red": (215, 30, 35),
    "orange": (250, 135, 15),
    "yellow": (250, 220, 30),
    "green": (35, 150, 60),
    "blue": (35, 85, 215),
    "purple": (125, 45, 165),
    "pink": (250, 130, 185),
    "brown": (120, 70, 30),
    "black": (20, 20, 22),
    "white": (250, 250, 250),
}
KINDS = ("circle", "square", "triangle", "diamond", "pentagon", "star", "heart", "cross")
MAX_SHAPES = 6
HELD_OUT_PERCENT = 10

_SIZES_PX = ((14.0, 17.0), (20.0, 24.0), (29.0, 35.0))  # radius on a 224 px picture: small, medium, large
_COLOR_JITTER = 10
_MIN_CONTRAST = 140.0  # between a shape and the background, see `_contrast`
_REACH = 1.15  # no point of a shape is further than this many radii from its centre
_SUPERSAMPLE = 4


@dataclass(frozen=True)
class Shape:
    """One shape. x, y: centre, radius: size, all in units of the picture's side; angle in degrees."""

    kind: str
    color: str
    x: float
    y: float
    radius: float
    angle: float
    rgb: RGB


@dataclass(frozen=True)
class Look:
    """Everything about a picture that no question asks for."""

    background: RGB
    texture: Literal["flat", "gradient", "grain", "blotches", "stripes", "checks"]
    strength: float  # largest distance of the texture from the background, in grey levels
    style: Literal["filled", "outlined", "hollow"]
    shadow: bool
    seed: int


@dataclass(frozen=True)
class Scene:
    shapes: tuple[Shape, ...]
    look: Look

    def count(self, kind: str | None = None, color: str | None = None) -> int:
        """How many shapes are of this kind and colour; None is any."""
        return sum(kind in (None, s.kind) and color in (None, s.color) for s in self.shapes)

    @property
    def content(self) -> str:
        """What is in the picture, regardless of place, size and background: "1 red circle, 2 blue square"."""
        return _content([(s.kind, s.color) for s in self.shapes])

    @property
    def is_held_out(self) -> bool:
        """True for the scenes that are kept for evaluation, chosen by `content`."""
        return held_out(self.content, HELD_OUT_PERCENT)


def _content(names: list[tuple[str, str]]) -> str:
    counts = Counter(f"{color} {kind}" for kind, color in names)
    return ", ".join(f"{counts[name]} {name}" for name in sorted(counts))


def random_scene(rng: random.Random, split: Split) -> Scene:
    """A scene of 1 to `MAX_SHAPES` shapes: a held-out one for split "val", another for "train"."""
    while True:
        look = random_look(rng)
        colors = [name for name, rgb in COLORS.items() if _contrast(rgb, look.background) >= _MIN_CONTRAST]
        num_shapes = rng.randint(1, MAX_SHAPES)
        # Few kinds and colours make equal shapes, without which there would be little to count and compare.
        kinds = rng.sample(KINDS, rng.choice((1, 2, 2, 3, 3, 4, 5, len(KINDS))))
        colors = rng.sample(colors, min(len(colors), rng.choice((1, 2, 2, 3, 3, 4, 5, len(COLORS)))))
        names = [(rng.choice(kinds), rng.choice(colors)) for _ in range(num_shapes)]
        if held_out(_content(names), HELD_OUT_PERCENT) != (split == "val"):
            continue
        places = _grid_places(rng, num_shapes) if rng.random() < 0.3 else _free_places(rng, num_shapes)
        shapes = tuple(
            Shape(kind, color, x, y, radius, rng.uniform(-1, 1) * _MAX_ANGLE[kind], _jitter(rng, COLORS[color]))
            for (kind, color), (x, y, radius) in zip(names, places, strict=True)
        )
        return Scene(shapes, look)


def draw_scene(scene: Scene, size_px: int = 224) -> Image.Image:
    """Draw the scene as an RGB picture of `size_px` by `size_px`."""
    image = draw_background(scene.look, size_px)
    masks = [_mask(s, size_px, hollow=scene.look.style == "hollow") for s in scene.shapes]
    if scene.look.shadow:
        offset_px = round(size_px * 0.013)
        for mask, (left, top) in masks:
            image.paste((0, 0, 0), (left + offset_px, top + offset_px), mask.point(lambda v: v * 0.3))
    for shape, (mask, place) in zip(scene.shapes, masks, strict=True):
        if scene.look.style == "outlined":
            image.paste(_shade(shape.rgb, 0.6), place, mask)
            mask, place = _mask(shape, size_px, scale=1 - min(0.13, 0.011 / shape.radius))
        image.paste(shape.rgb, place, mask)
    return image


# -- content and places ------------------------------------------------------------------------------------------------


def random_look(rng: random.Random) -> Look:
    """A white, black, pale, dark or middling background, mostly plain."""
    roll = rng.random()
    if roll < 0.25:
        background = (255, 255, 255) if rng.random() < 0.8 else (0, 0, 0)
    elif roll < 0.7:  # pale
        background = _from_hsv(rng.random(), rng.uniform(0, 0.16), rng.uniform(0.86, 1))
    elif roll < 0.87:  # dark
        background = _from_hsv(rng.random(), rng.uniform(0, 0.5), rng.uniform(0.06, 0.25))
    else:  # in between
        background = _from_hsv(rng.random(), rng.uniform(0, 0.2), rng.uniform(0.45, 0.8))
    return Look(
        background=background,
        texture=rng.choices(("flat", "gradient", "grain", "blotches", "stripes", "checks"), (8, 3, 2, 2, 0.5, 0.5))[0],
        strength=rng.uniform(4, 20),
        style=rng.choices(("filled", "outlined", "hollow"), (8, 2, 0.5))[0],
        shadow=sum(background) > 450 and rng.random() < 0.25,
        seed=rng.getrandbits(32),
    )


def _free_places(rng: random.Random, num_shapes: int) -> list[tuple[float, float, float]]:
    """Places (x, y, radius) anywhere, apart from each other; sizes shrink where it gets crowded."""
    gap, border = 0.022, 0.02
    shrink = 1.0
    while True:
        # Large ones first: they need the space.
        radii = sorted((rng.uniform(*rng.choice(_SIZES_PX)) / 224 for _ in range(num_shapes)), reverse=True)
        places: list[tuple[float, float, float]] = []
        for radius in radii:
            radius = max(radius * shrink, _SIZES_PX[0][0] / 224)
            reach = radius * _REACH
            for _ in range(30):
                x = rng.uniform(border + reach, 1 - border - reach)
                y = rng.uniform(border + reach, 1 - border - reach)
                if all((x - px) ** 2 + (y - py) ** 2 >= (reach + pr * _REACH + gap) ** 2 for px, py, pr in places):
                    places.append((x, y, radius))
                    break
            else:
                break
        if len(places) == num_shapes:
            rng.shuffle(places)
            return places
        shrink *= 0.93


def _grid_places(rng: random.Random, num_shapes: int) -> list[tuple[float, float, float]]:
    """Places in tidy rows and columns, or in one row, as in worksheets and test cards."""
    num_columns = num_shapes if num_shapes <= 5 and rng.random() < 0.4 else math.ceil(math.sqrt(num_shapes))
    num_rows = math.ceil(num_shapes / num_columns)
    if rng.random() < 0.5:
        num_columns, num_rows = num_rows, num_columns
    cells = [(column, row) for row in range(num_rows) for column in range(num_columns)]
    if rng.random() < 0.5:
        cells = rng.sample(cells, num_shapes)
    cell = 1 / max(num_columns, num_rows)
    largest = min(cell * 0.44 / _REACH, _SIZES_PX[2][1] / 224)
    radius = rng.uniform(max(largest * 0.5, _SIZES_PX[0][0] / 224), largest)
    slack = (cell / 2 - radius * _REACH) * 0.5
    left, top = (1 - num_columns * cell) / 2, (1 - num_rows * cell) / 2
    return [
        (
            left + (column + 0.5) * cell + rng.uniform(-slack, slack),
            top + (row + 0.5) * cell + rng.uniform(-slack, slack),
            radius,
        )
        for column, row in cells[:num_shapes]
    ]


# -- colours -----------------------------------------------------------------------------------------------------------


def _from_hsv(hue: float, saturation: float, value: float) -> RGB:
    def channel(n: float) -> int:
        k = (n + hue * 6) % 6
        return round(255 * value * (1 - saturation * max(0.0, min(k, 4 - k, 1.0))))

    return channel(5), channel(3), channel(1)


def _shade(rgb: RGB, factor: float) -> RGB:
    r, g, b = (round(v * factor) for v in rgb)
    return r, g, b


def _jitter(rng: random.Random, rgb: RGB) -> RGB:
    r, g, b = (min(255, max(0, v + rng.randint(-_COLOR_JITTER, _COLOR_JITTER))) for v in rgb)
    return r, g, b


def _contrast(a: RGB, b: RGB) -> float:
    """Distance of two colours as the eye weighs it ("redmean", compuphase.com/cmetric.htm); black to white is 765."""
    red_mean = (a[0] + b[0]) / 2
    dr, dg, db = (x - y for x, y in zip(a, b, strict=True))
    return math.sqrt((2 + red_mean / 256) * dr**2 + 4 * dg**2 + (2 + (255 - red_mean) / 256) * db**2)


# -- drawing -----------------------------------------------------------------------------------------------------------


def _regular(corners: int, radius: float) -> list[tuple[float, float]]:
    turns = [2 * math.pi * i / corners for i in range(corners)]
    return [(radius * math.sin(t), -radius * math.cos(t)) for t in turns]


def _star() -> list[tuple[float, float]]:
    return [(x * r, y * r) for i, (x, y) in enumerate(_regular(10, 1.0)) for r in [(1.15, 0.47)[i % 2]]]


def _heart() -> list[tuple[float, float]]:
    turns = [2 * math.pi * i / 40 for i in range(40)]
    return [
        (
            math.sin(t) ** 3 * 1.05,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16 * 1.05 - 0.08,
        )
        for t in turns
    ]


def _cross(arm: float = 0.34, reach: float = 1.0) -> list[tuple[float, float]]:
    corner = [(arm, -reach), (arm, -arm), (reach, -arm)]
    return [
        point for quarter in range(4) for x, y in corner for point in [((x, y), (-y, x), (-x, -y), (y, -x))[quarter]]
    ]


_OUTLINES: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.81, -0.81), (0.81, -0.81), (0.81, 0.81), (-0.81, 0.81)],
    "triangle": [(x, y + 0.12) for x, y in _regular(3, 1.1)],
    "diamond": [(0, -1.15), (0.72, 0), (0, 1.15), (-0.72, 0)],
    "pentagon": _regular(5, 1.05),
    "star": _star(),
    "heart": _heart(),
    "cross": _cross(),
}
# A square turned far is a diamond, a cross turned far is an x.
_MAX_ANGLE = {
    "circle": 0.0,
    "square": 12.0,
    "triangle": 20.0,
    "diamond": 10.0,
    "pentagon": 25.0,
    "star": 25.0,
    "heart": 20.0,
    "cross": 12.0,
}


def _mask(
    shape: Shape, size_px: int, *, scale: float = 1.0, hollow: bool = False
) -> tuple[Image.Image, tuple[int, int]]:
    """Coverage of the shape (mode L, anti-aliased) and the pixel where its upper left corner belongs."""
    reach_px = math.ceil(shape.radius * size_px * (_REACH + 0.05)) + 1
    left, top = math.floor(shape.x * size_px) - reach_px, math.floor(shape.y * size_px) - reach_px
    side = 2 * reach_px + 1
    mask = Image.new("L", (side * _SUPERSAMPLE, side * _SUPERSAMPLE))
    draw = ImageDraw.Draw(mask)
    center_x, center_y = (shape.x * size_px - left) * _SUPERSAMPLE, (shape.y * size_px - top) * _SUPERSAMPLE
    radius = shape.radius * size_px * _SUPERSAMPLE * scale
    turn = math.radians(shape.angle)
    for r, fill in ((radius, 255), (radius * 0.62, 0)) if hollow else ((radius, 255),):
        if shape.kind == "circle":
            draw.ellipse((center_x - r, center_y - r, center_x + r, center_y + r), fill=fill)
        else:
            cos, sin = r * math.cos(turn), r * math.sin(turn)
            outline = _OUTLINES[shape.kind]
            draw.polygon([(center_x + x * cos - y * sin, center_y + x * sin + y * cos) for x, y in outline], fill=fill)
    return mask.reduce(_SUPERSAMPLE), (left, top)


def draw_background(look: Look, size_px: int) -> Image.Image:
    """The picture before anything is in it, RGB, `size_px` by `size_px`."""
    if look.texture == "flat":
        return Image.new("RGB", (size_px, size_px), look.background)
    # Whole numbers throughout: as floats, this costs as much as all the rest of a picture.
    rng = np.random.default_rng(look.seed)
    base = np.asarray(look.background, np.int16)
    reach = round(look.strength)
    if look.texture in ("gradient", "blotches"):
        # A few random colours, smoothly enlarged: two by two is a gradient.
        cells = 2 if look.texture == "gradient" else int(rng.integers(4, 12))
        coarse = base + rng.integers(-reach, reach + 1, (cells, cells, 3), dtype=np.int16)
        small = Image.fromarray(coarse.clip(0, 255).astype(np.uint8))
        return small.resize((size_px, size_px), Image.Resampling.BICUBIC)
    if look.texture == "grain":
        channels = 1 if rng.random() < 0.5 else 3
        texture = rng.integers(-reach, reach + 1, (size_px, size_px, channels), dtype=np.int8)
    else:
        period_px = size_px / rng.integers(4, 16)
        along = np.floor(np.arange(size_px) / period_px).astype(np.int8) % 2
        across = along if look.texture == "checks" else np.zeros_like(along)
        texture = (((along[:, None] + across[None]) % 2)[..., None] * 2 - 1) * np.int8(reach)
        texture = texture.transpose(1, 0, 2) if rng.random() < 0.5 else texture
    return Image.fromarray((base + texture).clip(0, 255).astype(np.uint8))
