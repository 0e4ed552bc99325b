"""Messages in a form that a browser shows as they are: text as it was typed, pictures in a format it knows. What the
model reads and what is saved stays as it came."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

from app.scratch import scratch_folder, still_used
from app.turns import open_image

# Invisible, and no tag, entity or picture of Markdown goes on after it. Escaping would show its own marks in blocks of
# code, and in the box in which a message is edited.
JOINER = "\u2060"
_BEGINS = re.compile(r"<(?=[a-zA-Z/!?])|&(?=#?\w+;)|!(?=\[)")
_JOINED = re.compile(f"([<&!]){JOINER}")

BROWSER_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "AVIF", "ICO")
SHOWN_SIDE_PX = 1600


def as_typed(text: str) -> str:
    """Markdown that shows HTML, entities and pictures of other hosts as text."""
    return _BEGINS.sub(lambda begin: begin[0] + JOINER, text)


def typed(text: str) -> str:
    """What `as_typed` was given."""
    return _JOINED.sub(r"\1", text)


def as_seen(image: str | Path) -> str:
    """A file that a browser can show: the picture's own, or a copy as PNG. What is no picture stays what it is."""
    copy = _copy(str(image))
    if copy and not Path(copy).exists():  # a day old
        _copy.cache_clear()
        copy = _copy(str(image))
    still_used([copy] if copy else [])
    return copy or str(image)


@lru_cache(1024)
def _copy(image: str) -> str:
    """The path of a copy as PNG; "" if none is needed, or can be made. Uploads are named by their content."""
    from PIL import Image

    try:
        with Image.open(image) as opened:
            if opened.format in BROWSER_FORMATS:
                return ""
        picture = open_image(image)
    except Exception:  # on a damaged header Pillow's parsers raise nearly anything; the engine says it in words
        return ""
    picture.thumbnail((SHOWN_SIDE_PX, SHOWN_SIDE_PX))
    path = scratch_folder("shown") / f"{Path(image).stem}.png"
    picture.save(path)
    return str(path)
