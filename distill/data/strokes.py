"""Digits as a hand draws them: strokes through a few points, each time a little different."""

from __future__ import annotations

import math
import random

from PIL import Image, ImageDraw

Point = tuple[float, float]
Stroke = list[Point]

# Strokes, divided by ";", as the points "x y" of a curve in a box 60 wide and 100 high, y downwards. A point given
# twice is a corner. Some are written in more than one way.
_DRAWN: dict[str, tuple[str, ...]] = {
    "0": ("30 0, 8 16, 0 50, 10 86, 30 100, 52 84, 60 50, 50 14, 30 0",),
    "1": (
        "32 0, 30 50, 30 100",
        "8 25, 34 0, 34 0, 34 50, 34 100",
    ),
    "2": ("3 22, 14 4, 34 0, 55 12, 54 36, 30 66, 2 100, 2 100, 30 100, 60 100",),
    "3": ("5 12, 26 0, 52 10, 50 36, 24 47, 24 47, 52 58, 56 84, 30 100, 2 88",),
    "4": (
        "40 0, 20 34, 0 66, 0 66, 30 66, 60 66; 43 36, 43 70, 43 100",
        "8 0, 5 30, 5 50, 5 50, 30 50, 55 50; 50 8, 48 50, 46 100",
    ),
    "5": ("55 0, 30 0, 10 0, 10 0, 8 20, 6 44, 6 44, 28 36, 54 48, 56 78, 32 100, 2 90",),
    "6": ("50 2, 24 16, 4 50, 6 86, 30 100, 54 86, 54 60, 32 48, 8 64",),
    "7": (
        "2 2, 30 2, 58 0, 58 0, 38 42, 22 100",
        "2 2, 30 2, 58 0, 58 0, 38 42, 22 100; 16 50, 34 50, 52 48",
    ),
    "8": ("32 46, 8 30, 12 6, 32 0, 52 8, 52 30, 30 46, 4 66, 6 92, 30 100, 56 90, 56 66, 32 46",),
    "9": ("52 30, 32 50, 8 44, 4 20, 26 0, 50 12, 54 34, 50 66, 40 100",),
    "+": ("0 55, 28 55, 56 55; 28 28, 28 55, 28 82",),
    "-": ("5 56, 30 56, 55 55",),
    "x": ("5 35, 28 57, 50 80; 50 35, 28 58, 5 80",),
    "=": ("2 44, 30 44, 56 44; 2 68, 30 68, 56 68",),
    "?": ("6 20, 20 2, 46 6, 50 28, 30 46, 26 70; 25 94, 27 96, 26 98",),
}


def _strokes(drawn: str) -> tuple[Stroke, ...]:
    pairs = ([point.split() for point in stroke.split(",")] for stroke in drawn.split(";"))
    return tuple([(int(x) / 100, int(y) / 100) for x, y in stroke] for stroke in pairs)


_GLYPHS = {character: [_strokes(drawn) for drawn in ways] for character, ways in _DRAWN.items()}
CHARACTERS = frozenset(_GLYPHS)
_STEPS = 5  # straight pieces between two points
_THICK_PX = 12


class Hand:
    """One person's way of writing: slant, proportions, unsteadiness, and the pen."""

    def __init__(self, rng: random.Random) -> None:
        self.slant = rng.gauss(0.08, 0.14)
        self.width = rng.uniform(0.8, 1.25)
        self.jitter = rng.uniform(0.008, 0.032)
        self.turn = rng.uniform(0, 5)  # degrees, standard deviation from letter to letter
        self.gap = rng.uniform(0.16, 0.34)
        self.pen = rng.uniform(0.05, 0.14)  # over the height of a digit


def write_by_hand(text: str, rng: random.Random, height_px: float, size_px: int) -> Image.Image | None:
    """A mask (mode L, size_px square) with the text in the middle, or None if it is too wide.

    Args:
        text: of the characters in `CHARACTERS` and spaces.
        height_px: of a digit.
    Raises: KeyError for another character.
    """
    hand = Hand(rng)
    strokes: list[Stroke] = []
    x = 0.0
    for character in text:
        if character == " ":
            x += 0.3
            continue
        glyph = _written(rng.choice(_GLYPHS[character]), hand, rng)
        strokes += [[(px + x, py) for px, py in stroke] for stroke in glyph]
        x += (0.35 if character == "1" else 0.6) * hand.width + hand.gap
    xs, ys = [p[0] for s in strokes for p in s], [p[1] for s in strokes for p in s]
    wide, high = (max(xs) - min(xs)) * height_px, (max(ys) - min(ys)) * height_px
    pen = max(1.6, hand.pen * height_px)
    if max(wide, high) + pen + 4 > size_px:
        return None
    scale = 2  # drawn twice as large, for smooth edges
    left, top = (size_px - wide) / 2 - min(xs) * height_px, (size_px - high) / 2 - min(ys) * height_px
    mask = Image.new("L", (size_px * scale, size_px * scale))
    draw = ImageDraw.Draw(mask)
    width = round(pen * scale)
    for stroke in strokes:
        points = [((left + px * height_px) * scale, (top + py * height_px) * scale) for px, py in stroke]
        # Rounding every joint is slow, and shows with a thick pen only; a thin one needs round ends and corners.
        draw.line(points, fill=255, width=width, joint="curve" if width > _THICK_PX else None)
        for px, py in (*points[::_STEPS], points[-1]):
            draw.ellipse((px - width / 2, py - width / 2, px + width / 2, py + width / 2), fill=255)
    return mask.reduce(scale)


def _written(glyph: tuple[Stroke, ...], hand: Hand, rng: random.Random) -> list[Stroke]:
    """The strokes with every point moved a little, as smooth curves, slanted and turned."""
    turn = math.radians(rng.gauss(0, hand.turn))
    cos, sin = math.cos(turn), math.sin(turn)
    scale, lift = rng.uniform(0.9, 1.08), rng.gauss(0, 0.03)
    result = []
    for stroke in glyph:
        moved: Stroke = []
        for i, point in enumerate(stroke):
            if i and point == stroke[i - 1]:
                moved.append(moved[-1])  # a corner stays one
            else:
                moved.append((point[0] + rng.gauss(0, hand.jitter), point[1] + rng.gauss(0, hand.jitter)))
        curve = []
        for px, py in _smooth(moved):
            px, py = (px - 0.3) * hand.width * scale, (py - 0.5) * scale
            px -= hand.slant * py
            curve.append((px * cos - py * sin + 0.3, px * sin + py * cos + 0.5 + lift))
        result.append(curve)
    return result


def _smooth(points: Stroke) -> Stroke:
    """A Catmull-Rom spline through the points; two equal points in a row make a corner."""
    curve = [points[0]]
    for i in range(len(points) - 1):
        b, c = points[i], points[i + 1]
        if b == c:
            continue
        a = points[i - 1] if i and points[i - 1] != b else b
        d = points[i + 2] if i + 2 < len(points) and points[i + 2] != c else c
        for step in range(1, _STEPS + 1):
            t = step / _STEPS
            curve.append((_cubic(a[0], b[0], c[0], d[0], t), _cubic(a[1], b[1], c[1], d[1], t)))
    return curve


def _cubic(a: float, b: float, c: float, d: float, t: float) -> float:
    return 0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
