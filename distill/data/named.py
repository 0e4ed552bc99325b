"""Sources of text in pictures and of a user's own files, by the name that a recipe gives them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from distill.data.charts import Charts
from distill.data.digits import Digits
from distill.data.fonts import Fonts
from distill.data.internvl import InternVL
from distill.data.nlvr import Nlvr
from distill.data.printed import LargePrint, Printed
from distill.data.sample import Source, Split
from distill.data.webdataset import WebDataset

NAMES = (Printed.name, LargePrint.name, Charts.name, Digits.name, Nlvr.name)
_OWN = re.compile(r"(internvl|internvl-all|internvl-text|internvl-(\d+)|webdataset):(.+)")


def open_named(
    name: str,
    split: Split,
    *,
    fonts: str | Path | Fonts | None = None,
    text: Sequence[str | Path] = (),
    whole_pictures: bool = False,
) -> Source | None:
    """The source of this name, or None if it is none of these.

    Args:
        name: one of `NAMES`; "internvl:META.json" for its lines with one image, "internvl-text:META.json" for those
            without, "internvl-2:META.json" for those with two, and so on, "internvl-all:META.json" for all of them, to
            be packed; "webdataset:SHARDS".
        fonts: a pack of fonts, or where it lies. Only printed text cannot do without.
        text: folders with the files of NLVR.
        whole_pictures: decode a user's pictures in full, to be cut into tiles.
    Raises: ValueError as the sources do.
    """
    if name == Printed.name:
        return Printed(split, fonts=fonts)
    if name == LargePrint.name:
        return LargePrint(split, fonts=fonts)
    if name == Charts.name:
        return Charts(split, fonts=fonts)
    if name == Digits.name:
        return Digits(split, fonts=fonts)
    if name == Nlvr.name:
        return Nlvr(text, split)
    own = _OWN.fullmatch(name)
    if own is None:
        return None
    kind, number, path = own.groups()
    if kind == "webdataset":
        return WebDataset(path, split, name=name, whole_pictures=whole_pictures)
    num_images = {"internvl-all": None, "internvl-text": 0}.get(kind, int(number or 1))
    return InternVL(path, split, num_images=num_images, name=name, whole_pictures=whole_pictures)
