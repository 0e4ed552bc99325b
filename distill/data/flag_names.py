"""Which flags are taught, what their countries are called, and which colours a flag surely has."""

from __future__ import annotations

import colorsys
import json
from pathlib import Path

import numpy as np
from PIL import Image

from distill.data.scene import COLORS

# No countries, or flying another country's flag.
_TERRITORIES = (
    "ax as ai aq aw bm bq bv io ky cx cc ck cw fk fo gf pf tf gi gl gp gu gg hm hk im je mo mq yt ms nc nu nf mp pn "
    "pr re bl sh mf pm sx gs sj tk tc tw um vg vi wf eh"
)
# Taken for another's (Chad for Romania, Monaco for Indonesia, Luxembourg for the Netherlands), or changed so lately
# that packages disagree (Afghanistan, Syria).
_UNSURE = "td mc lu af sy"
_LEFT_OUT = frozenset(f"{_TERRITORIES} {_UNSURE}".split())

# What one says instead of the formal name; "the" is part of an answer.
_SAID = {
    "bs": "the Bahamas",
    "bn": "Brunei",
    "cd": "the Democratic Republic of the Congo",
    "cf": "the Central African Republic",
    "cg": "the Republic of the Congo",
    "ci": "Ivory Coast",
    "cv": "Cape Verde",
    "cz": "the Czech Republic",
    "do": "the Dominican Republic",
    "ae": "the United Arab Emirates",
    "fm": "Micronesia",
    "gb": "the United Kingdom",
    "gm": "the Gambia",
    "km": "the Comoros",
    "mh": "the Marshall Islands",
    "mv": "the Maldives",
    "nl": "the Netherlands",
    "ph": "the Philippines",
    "ps": "Palestine",
    "sb": "the Solomon Islands",
    "sc": "the Seychelles",
    "tl": "East Timor",
    "tr": "Turkey",
    "us": "the United States",
    "va": "Vatican City",
}


def countries(path: Path) -> dict[str, str]:
    """Code and name of the countries whose flags are used, from the country.json of flag-icons."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    used = [row for row in rows if row["iso"] and len(row["code"]) == 2 and row["code"] not in _LEFT_OUT]
    return {row["code"]: _SAID.get(row["code"], row["name"]) for row in used}


def color_names(flag: Image.Image) -> list[str]:
    """The colours of a flag in the order of `COLORS`, or none where that is not certain.

    Certain means: every colour that takes 0.8 % or more takes 7 % at least, and 97 % of what is drawn has a clear name.
    """
    small = np.asarray(flag.convert("RGBA").resize((64, 48), Image.Resampling.NEAREST)).reshape(-1, 4)
    pixels = small[small[:, 3] > 250, :3]
    shares: dict[str, float] = {}
    for rgb, count in zip(*np.unique(pixels, axis=0, return_counts=True), strict=True):
        name = color_name(*(int(v) for v in rgb))
        shares[name] = shares.get(name, 0.0) + count / len(pixels)
    unclear = shares.pop("", 0.0)
    found = [name for name in COLORS if shares.get(name, 0) >= 0.008]
    return found if unclear <= 0.03 and all(shares[name] >= 0.07 for name in found) else []


def color_name(red: int, green: int, blue: int) -> str:
    """One of `COLORS`, or "" for what lies between two names."""
    hue, saturation, value = colorsys.rgb_to_hsv(red / 255, green / 255, blue / 255)
    hue *= 360
    if value < 0.16:
        return "black"
    if saturation < 0.1:
        return "white" if value > 0.92 else ""
    if saturation < 0.45 or value < 0.35:
        return ""
    for name, low, high in (("red", -15, 13), ("yellow", 43, 62), ("green", 90, 165), ("blue", 195, 250)):
        if low <= (hue - 360 if hue > 345 else hue) <= high:
            return name
    return "orange" if 22 <= hue <= 36 and saturation > 0.7 and value > 0.8 else ""
