"""A small file of icons and flags, drawn here: every thing a disc of a colour of its own."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from distill.data.icons_pack import STYLES as PACKAGES
from distill.data.origins import icon_packages
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


SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 36 36"><circle cx="18" cy="18" r="9" fill="#c00"/></svg>'


def write_packages(root: Path) -> Path:
    """Every package with a dog, and those with flags with one."""
    labels = {label: f"E{number:04X}" for number, label in enumerate(things())} | {"dog": "1F415", "dog face": "1F436"}
    emoji = root / "emojibase-data/en"
    emoji.mkdir(parents=True)
    (emoji / "data.json").write_text(json.dumps([{"label": k, "hexcode": v} for k, v in labels.items()]))
    for style in PACKAGES.values():
        folder = root / style.folder
        folder.mkdir(parents=True)
        if style.folder.startswith("@iconify-json"):
            icons = {
                "dog": {"body": SVG[SVG.index("<circle") : -6]},
                "flag-for-japan": {"body": '<path d="M0 0h36v36z"/>'},
            }
            prefix = style.folder.split("/")[1]
            (folder / "icons.json").write_text(
                json.dumps({"prefix": prefix, "icons": icons, "width": 36, "height": 36})
            )
            unnamed = prefix in ("fxemoji", "streamline-emojis")
            codes = {} if unnamed else {"1f415": "dog", "1f1ef-1f1f5": "flag-for-japan"}
            (folder / "chars.json").write_text(json.dumps(codes))
    for name in ("1F415", "1F1EF-1F1F5"):
        (root / "openmoji/color/svg").mkdir(parents=True, exist_ok=True)
        (root / f"openmoji/color/svg/{name}.svg").write_text(SVG)
        (root / "@lobehub/fluent-emoji-3d/assets").mkdir(parents=True, exist_ok=True)
        disc("dog").save(root / f"@lobehub/fluent-emoji-3d/assets/{name.lower()}.webp")
    (root / "flag-icons/flags/4x3").mkdir(parents=True)
    (root / "flag-icons/flags/4x3/jp.svg").write_text(SVG)
    (root / "flag-icons/country.json").write_text(json.dumps([{"code": "jp", "name": "Japan", "iso": True}]))
    for package in icon_packages():
        (root / package.name / "package.json").write_text(json.dumps({"name": package.name}))
    return root
