"""Fonts for pictures of text: the file that `fonts_pack` makes, or the one font that Pillow brings along."""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal, cast, get_args

from PIL import ImageFont

from distill.data.sample import Split, check_split

FontKind = Literal["sans", "serif", "mono", "display", "hand"]
KINDS: tuple[FontKind, ...] = get_args(FontKind)
INDEX = "fonts.json"

# Sizes are of the em square, in which the letters of one font stand twice as tall as those of another. A size here is
# the size at which a font with letters of this height (of an x, in em) looks as large, and never smaller than itself.
_X_HEIGHT = 0.5


@dataclass(frozen=True, eq=False)
class Font:
    """One face of a family, such as its bold.

    caps: small letters look like capitals, so all that is printed with it is capitals.
    x_height: height of an x over the em, from the outlines.
    currencies: the signs for money that it has.
    """

    family: str
    kind: FontKind
    held_out: bool
    caps: bool
    x_height: float
    data: bytes
    currencies: str = "$£€"

    def at(self, size_px: int) -> ImageFont.FreeTypeFont:
        """Ready to draw; letters about half of `size_px` tall, whatever the font (see `_X_HEIGHT`)."""
        return _load(self, max(size_px, round(size_px * _X_HEIGHT / self.x_height)))


@lru_cache(maxsize=256)
def _load(font: Font, em_px: int) -> ImageFont.FreeTypeFont:
    # Basic layout: Latin letters need no shaping, and whether Pillow has Raqm must not change the pictures.
    return ImageFont.truetype(io.BytesIO(font.data), em_px, layout_engine=ImageFont.Layout.BASIC)


@cache
def builtin_font() -> Font:
    """Pillow's own (a subset of Aileron, CC0), for both splits.  Raises: ValueError if Pillow lacks FreeType."""
    font = ImageFont.load_default(16)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise ValueError("this Pillow was built without FreeType and draws no text; install it from PyPI")
    return Font("Aileron", "sans", False, False, 0.53, cast(io.BytesIO, font.path).getvalue(), "$")


class Fonts:
    """The faces of a pack.

    Training never sees the held-out families, which the pack names; evaluation sees those alone.
    """

    def __init__(self, path: str | Path) -> None:
        """Raises: ValueError for a file that `distill.data.fonts_pack` did not make, or a damaged one."""
        self.path = Path(path)
        self.faces: list[Font] = []
        try:
            with tarfile.open(self.path) as tar:
                records: list[dict[str, Any]] = json.load(_member(tar, INDEX))["fonts"]
                for r in records:
                    kind: FontKind = r["kind"] if r["kind"] in KINDS else "sans"
                    data = _member(tar, r["file"]).read()
                    self.faces.append(Font(r["family"], kind, r["held_out"], r["caps"], r["x_height"], data))
        except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is no pack of fonts ({error}); make one with python -m distill.data.fonts_pack"
            ) from error

    def of(self, split: Split, kinds: tuple[FontKind, ...] = KINDS) -> list[Font]:
        """The faces of a split, of these kinds or, where it has none of them, of all.

        Raises: ValueError if the split has no faces at all.
        """
        found = [face for face in self.faces if face.held_out == (check_split(split) == "val")]
        if not found:
            raise ValueError(f'{self.path} holds no fonts for split "{split}"; pack more families')
        return [face for face in found if face.kind in kinds] or found


def open_fonts(fonts: str | Path | Fonts | None, split: Split, kinds: tuple[FontKind, ...] = KINDS) -> list[Font]:
    """The faces of a pack, given or to be read, or the built-in font where there is none."""
    if fonts is None:
        return [builtin_font()]
    return (fonts if isinstance(fonts, Fonts) else Fonts(fonts)).of(split, kinds)


def _member(tar: tarfile.TarFile, name: str) -> io.BufferedReader | tarfile.ExFileObject:
    file = tar.extractfile(name)
    if file is None:
        raise KeyError(f"{name} is no file")
    return cast(tarfile.ExFileObject, file)
