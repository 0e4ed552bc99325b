"""Pictures put together from icons: which, where, on which background. Icons come from the file of `icons_pack`."""

from __future__ import annotations

import io
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from distill.data.photos import read_records
from distill.data.restyle import restyle
from distill.data.sample import Split, check_split
from distill.data.scene import Look, draw_background, random_look
from distill.data.things import Thing

MAX_ICONS = 4

# Longer side of an icon in units of the picture's side, for pictures of 1, 2, 3 and 4.
_SIDES = ((0.4, 0.96), (0.26, 0.47), (0.23, 0.41), (0.21, 0.38))
_MIN_DISTANCE = 90  # of a colour from the background, summed over the channels, to stand out
_MIN_VISIBLE = 0.4  # share of an icon that must stand out
_MIRRORED = ("animal", "plant", "food")  # carry no letters and have no side


@dataclass(frozen=True, slots=True)
class Icon:
    """One drawing of a thing. data: WebP with transparency.  label: what its package calls it."""

    key: str
    data: bytes
    thing: Thing
    label: str

    def open(self) -> Image.Image:
        """RGBA.  Raises: ValueError, naming the icon, if its bytes are no picture."""
        return open_drawing(self.key, self.data)


@dataclass(frozen=True)
class Placed:
    """An icon in a picture. x, y: centre, width, height: all in units of the picture's side; angle in degrees."""

    icon: Icon
    x: float
    y: float
    width: float
    height: float
    angle: float = 0.0
    mirror: bool = False


@dataclass(frozen=True)
class IconScene:
    """placed: from left to right."""

    placed: tuple[Placed, ...]
    look: Look

    @property
    def things(self) -> list[Thing]:
        return [p.icon.thing for p in self.placed]


def open_drawing(key: str, data: bytes) -> Image.Image:
    """RGBA.  Raises: ValueError, naming the drawing, if its bytes are no picture."""
    try:
        return Image.open(io.BytesIO(data), formats=("WEBP",)).convert("RGBA")
    except OSError as error:
        raise ValueError(f"drawing {key} cannot be decoded ({error}); make its file again") from error


def read_drawings(path: Path, split: Split | None, kind: str) -> list[tuple[str, bytes, dict[str, Any]]]:
    """Key, picture and record of every drawing of a kind ("icon" or "flag") in the styles of a split (None: of all).

    Raises: ValueError for a file that cannot be read or holds no such drawing.
    """
    found = []
    for _, key, data, text in read_records(path, None if split is None else check_split(split)):
        try:
            record = json.loads(text)
            if record["kind"] == kind:
                found.append((key, data, record))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"the record of {key} in {path} cannot be used ({error!r}); make the file again"
            ) from error
    if not found:
        which = f'kind "{kind}"' + (f' and split "{split}"' if split else "")
        raise ValueError(f"{path} holds no drawings of {which}; make it with icons_pack")
    return found


def read_icons(path: Path, split: Split | None) -> list[Icon]:
    """Every icon in the styles of a split (None: of all); raises as `read_drawings`."""
    things: dict[str, Thing] = {}  # one for each name: 5,000 records share 750
    icons = []
    for key, data, record in read_drawings(path, split, "icon"):
        try:
            name = str(record["name"])
            if name not in things:
                things[name] = Thing(
                    name,
                    noun=record["noun"],
                    plural=record["plural"],
                    groups=tuple(record["groups"]),
                    maybe=tuple(record["maybe"]),
                    kin=record["kin"],
                    taught=record["taught"],
                )
            icons.append(Icon(key, data, things[name], str(record["label"])))
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"the record of {key} in {path} cannot be used ({error!r}); make the file again"
            ) from error
    return icons


def make_scene(icons: Sequence[Icon], rng: random.Random, *, restyled: bool = False) -> tuple[IconScene, Image.Image]:
    """A scene of these 1 to `MAX_ICONS` icons, anywhere or in a tidy row, and its picture (RGB, 224 x 224).

    Args: restyled: change most of the drawings, see `distill.data.restyle`.
    """
    drawn = [icon.open() for icon in icons]
    if restyled and rng.random() < 0.7:
        drawn = [restyle(picture, rng) for picture in drawn]
    low, high = _SIDES[len(icons) - 1]
    sides = [rng.uniform(low, high) for _ in icons]
    turned = rng.random() < 0.25
    placed = []
    for (icon, picture), (side, x, y) in zip(zip(icons, drawn, strict=True), _places(sides, rng), strict=True):
        scale = side / max(picture.size)
        angle = rng.uniform(-14, 14) if turned else 0.0
        mirror = bool(set(icon.thing.groups) & set(_MIRRORED)) and rng.random() < 0.5
        placed.append(Placed(icon, x, y, picture.width * scale, picture.height * scale, angle, mirror))
    look = _look(drawn, rng)
    image = draw_background(look, 224)
    for one, picture in zip(placed, drawn, strict=True):
        _paste(image, one, picture)
    return IconScene(tuple(sorted(placed, key=lambda p: p.x)), look), image


def _places(sides: list[float], rng: random.Random) -> list[tuple[float, float, float]]:
    """Side and centre of squares that do not overlap; they shrink where it gets crowded."""
    if len(sides) > 1 and rng.random() < 0.35:
        return _row(sides, rng)
    while True:
        places: list[tuple[float, float, float]] = []
        for side in sides:
            for _ in range(30):
                x, y = (rng.uniform(side / 2 + 0.01, 0.99 - side / 2) for _ in range(2))
                if all(max(abs(x - px), abs(y - py)) >= (side + ps) / 2 + 0.01 for ps, px, py in places):
                    places.append((side, x, y))
                    break
        if len(places) == len(sides):
            return places
        sides = [side * 0.93 for side in sides]


def _row(sides: list[float], rng: random.Random) -> list[tuple[float, float, float]]:
    """In one row or column, evenly spread."""
    cell = 1 / len(sides)
    sides = [min(side, cell * 0.92) for side in sides]
    across = rng.uniform(max(sides) / 2 + 0.01, 0.99 - max(sides) / 2)
    upright = rng.random() < 0.3
    places = []
    for number, side in enumerate(sides):
        along = (number + 0.5) * cell
        places.append((side, across, along) if upright else (side, along, across))
    return places


def _look(drawn: list[Image.Image], rng: random.Random) -> Look:
    """A background that every icon stands out from."""
    small = [
        np.asarray(picture.resize((16, 16), Image.Resampling.NEAREST), np.int32).reshape(-1, 4) for picture in drawn
    ]
    solid = [pixels[pixels[:, 3] > 127, :3] for pixels in small]
    best, most = None, -1.0
    for _ in range(6):
        look = random_look(rng)
        background = np.array(look.background, np.int32)
        visible = min(float((np.abs(rgb - background).sum(1) > _MIN_DISTANCE).mean()) for rgb in solid)
        if visible >= _MIN_VISIBLE:
            return look
        if visible > most:
            best, most = look, visible
    assert best is not None, "six backgrounds were tried"
    return replace(best, texture="flat")


def _paste(image: Image.Image, placed: Placed, picture: Image.Image) -> None:
    side_px = image.width
    size = (max(1, round(placed.width * side_px)), max(1, round(placed.height * side_px)))
    picture = picture.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
    if placed.mirror:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if placed.angle:
        picture = picture.rotate(placed.angle, Image.Resampling.BILINEAR, expand=True)
    corner = (
        math.floor(placed.x * side_px - picture.width / 2),
        math.floor(placed.y * side_px - picture.height / 2),
    )
    image.paste(picture, corner, picture)
