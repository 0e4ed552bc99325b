"""A small file of icons and flags, drawn here: every thing a disc of a colour of its own."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from distill.data.photos_pack import write_packed
from distill.data.things import Thing, things
from distill.data.unseen import part_of

STYLES = {"train": ("round", "flat"), "val": ("strange",)}
# Flags of two or three stripes.
FLAGS = {
    "France": ("blue", "white", "red"),
    "the Netherlands": ("red", "white", "blue"),
    "Mali": ("green", "yellow", "red"),
    "Poland": ("white", "red"),
}


def some_things(number_taught: int = 40, number_unseen: int = 5) -> dict[str, list[Thing]]:
    """Things by part: "taught", and never taught for "train" and "val"."""
    found: dict[str, dict[str, Thing]] = {"taught": {}, "train": {}, "val": {}}
    for thing in things().values():
        found[part_of(thing.name, taught=thing.taught)].setdefault(thing.name, thing)
    most = {"taught": number_taught, "train": number_unseen, "val": number_unseen}
    # Spread over the table, so that there are all groups and some families.
    return {part: list(of.values())[:: max(1, len(of) // most[part])] for part, of in found.items()}


def color_of(name: str) -> tuple[int, int, int]:
    number = sum(ord(c) * (i + 1) for i, c in enumerate(name))
    return 60 + number * 37 % 160, 60 + number * 71 % 160, 60 + number * 113 % 160


def icon_record(thing: Thing, style: str) -> dict[str, Any]:
    fields = {f: getattr(thing, f) for f in ("name", "noun", "plural", "groups", "maybe", "kin", "taught")}
    about = {"style": style, "source": "made", "license": "MIT", "attribution": "these tests"}
    return {"kind": "icon", "label": f"{thing.name} drawn"} | fields | about


def webp(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


def disc(name: str, width: int = 40, height: int = 30) -> Image.Image:
    image = Image.new("RGBA", (width, height))
    ImageDraw.Draw(image).ellipse((0, 0, width - 1, height - 1), fill=(*color_of(name), 255))
    return image


def flag(country: str) -> Image.Image:
    image = Image.new("RGB", (48, 36))
    stripes = FLAGS[country]
    for number, color in enumerate(stripes):
        image.paste(color, (0, 36 * number // len(stripes), 48, 36 * (number + 1) // len(stripes)))
    return image.convert("RGBA")


def write_icons(path: Path) -> Path:
    records = []
    for split, styles in STYLES.items():
        for style in styles:
            for of_part in some_things().values():
                for thing in of_part:
                    picture = webp(disc(thing.name))
                    records.append((f"{split}/{style}-{thing.name}", picture, icon_record(thing, style)))
            for country in FLAGS:
                about = {"kind": "flag", "name": country, "colors": sorted(FLAGS[country]), "style": style}
                records.append((f"{split}/{style}-flag-{country}", webp(flag(country)), about))
    write_packed(path, records, max_mib=None, what="icons")
    return path
