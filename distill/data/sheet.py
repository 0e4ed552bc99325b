"""A picture to write on: backgrounds, inks that stand out, sizes that fit, and a record of what was written where."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFilter, ImageFont

from distill.data.fonts import Font
from distill.data.scene import RGB, draw_background, random_look

Box = tuple[float, float, float, float]  # left, top, right, bottom

LINE = 1.25  # from baseline to baseline, over the em
_ASCENT = 0.95  # from the top of a line to its baseline, over the em
_MIN_CONTRAST = 120  # grey levels between ink and background
_LARGEST_PX = 72


class Sheet:
    """image: what has been drawn.  boxes: every text that was written, with the pixels that it covers."""

    def __init__(self, image: Image.Image) -> None:
        self.image = image
        self.draw = ImageDraw.Draw(image)
        self.boxes: list[tuple[str, Box]] = []

    def write(
        self,
        text: str,
        x: float,
        y: float,
        font: ImageFont.FreeTypeFont,
        ink: RGB,
        anchor: str = "ls",
        halo: RGB | None = None,
    ) -> None:
        """Write one line. `anchor` as in Pillow, by the baseline ("s"): "ls" from the left, "ms" centred, "rs".

        halo: a colour around the letters, which keeps lines off them.
        """
        self.boxes.append((text, self.draw.textbbox((x, y), text, font=font, anchor=anchor)))
        width = 0 if halo is None else 2
        self.draw.text((x, y), text, font=font, fill=ink, anchor=anchor, stroke_width=width, stroke_fill=halo)

    def write_turned(
        self,
        lines: Sequence[tuple[str, float, float]],
        font: ImageFont.FreeTypeFont,
        ink: RGB,
        anchor: str,
        angle: float,
    ) -> None:
        """Write lines (text, x, y) turned by `angle` degrees about the middle of the picture."""
        width, height = self.image.size
        mask = Image.new("L", self.image.size)
        draw = ImageDraw.Draw(mask)
        cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        for text, x, y in lines:
            draw.text((x, y), text, font=font, fill=255, anchor=anchor)
            left, top, right, bottom = draw.textbbox((x, y), text, font=font, anchor=anchor)
            corners = [(px - width / 2, py - height / 2) for px in (left, right) for py in (top, bottom)]
            xs = [px * cos + py * sin + width / 2 for px, py in corners]
            ys = [py * cos - px * sin + height / 2 for px, py in corners]
            self.boxes.append((text, (min(xs), min(ys), max(xs), max(ys))))
        self.image.paste(ink, mask=mask.rotate(angle, Image.Resampling.BICUBIC))

    @property
    def fits(self) -> bool:
        """Whether everything that was written lies within the picture."""
        width, height = self.image.size
        return all(
            left >= 0 and top >= 0 and right <= width and bottom <= height
            for _, (left, top, right, bottom) in self.boxes
        )


def blank_sheet(rng: random.Random, size_px: int) -> tuple[Sheet, RGB]:
    """A sheet with a background of any kind, and the background's colour."""
    look = random_look(rng)
    return Sheet(draw_background(look, size_px)), look.background


def luma(rgb: RGB) -> float:
    """Grey level, 0 to 255 (Rec. 601)."""
    return 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]


def ink_on(background: RGB, rng: random.Random, *, plain: float = 0.5) -> RGB:
    """A colour that stands out from the background, black or white with probability `plain`."""
    if rng.random() < plain:
        return (15, 15, 20) if luma(background) > 127 else (245, 245, 245)
    while True:
        ink = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
        if abs(luma(ink) - luma(background)) >= _MIN_CONTRAST:
            return ink


def pale(rng: random.Random) -> RGB:
    """The colour of paper."""
    base = rng.randint(228, 255)
    return base, base - rng.randint(0, 8), base - rng.randint(0, 18)


def strong(rng: random.Random) -> RGB:
    """A saturated colour, as of signs and headers."""
    return rng.choice(
        ((190, 25, 35), (20, 90, 170), (15, 120, 70), (235, 190, 20), (30, 30, 35), (230, 110, 20), (90, 40, 130))
    )


def room(font: Font, lines: Sequence[str], width_px: float, height_px: float) -> int:
    """The largest size at which the lines, one under another, fit into a box (at most 72 px; below 1 if none does)."""
    face = font.at(40)
    widest = max(face.getlength(line) for line in lines)
    scale = min(width_px / widest, height_px / (face.size * LINE * len(lines)))
    return min(_LARGEST_PX, math.floor(40 * scale * 0.97))


def pick_size(rng: random.Random, smallest: int, largest: int) -> int:
    """A size between the two; small ones are as frequent as large ones, or half as much."""
    if rng.random() < 0.5:
        return rng.randint(smallest, largest)
    return round(math.exp(rng.uniform(math.log(smallest), math.log(largest))))


def baseline(top: float, em_px: float, line: int = 0) -> float:
    """Where the baseline of a line stands in a block whose first line begins at `top`."""
    return top + em_px * (_ASCENT + LINE * line)


def worn(image: Image.Image, rng: random.Random) -> Image.Image:
    """The picture as a poor camera might give it: sometimes a little out of focus."""
    if rng.random() < 0.12:
        return image.filter(ImageFilter.BoxBlur(rng.uniform(0.3, 0.8)))
    return image
