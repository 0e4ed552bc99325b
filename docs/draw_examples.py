"""Draw the examples of shapes, of an icon and of a flag: `python docs/draw_examples.py` writes them to app/examples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

SIDE_PX = 448
SCALE = 4  # drawn larger and reduced, for smooth edges
EXAMPLES_DIR = Path(__file__).parents[1] / "app" / "examples"


RED, GREEN, BLUE, PURPLE = "#d71e23", "#23963c", "#2355d7", "#7d2da5"
VIOLET, BROWN = "#7b3fb5", "#5b3a1e"


class Canvas:
    """A square picture; centres and radii are fractions of its side."""

    def __init__(self, background: str) -> None:
        self.image = Image.new("RGB", (SIDE_PX * SCALE, SIDE_PX * SCALE), background)
        self._draw = ImageDraw.Draw(self.image)

    def circle(self, x: float, y: float, radius: float, colour: str) -> None:
        self._draw.ellipse([v * SIDE_PX * SCALE for v in (x - radius, y - radius, x + radius, y + radius)], fill=colour)

    def polygon(self, x: float, y: float, radii: Sequence[float], colour: str, turn: float = 0.0) -> None:
        """Corners at equal angles, the first one `turn` (of a full turn) from the top, at these distances."""
        points = []
        for i, radius in enumerate(radii):
            angle = 2 * math.pi * (turn + i / len(radii))
            points.append((x + radius * math.sin(angle), y - radius * math.cos(angle)))
        self._draw.polygon([(u * SIDE_PX * SCALE, v * SIDE_PX * SCALE) for u, v in points], fill=colour)

    def rectangle(self, left: float, top: float, right: float, bottom: float, colour: str) -> None:
        self._draw.rectangle([v * SIDE_PX * SCALE for v in (left, top, right, bottom)], fill=colour)

    def half_disc(self, x: float, y: float, radius: float, colour: str) -> None:
        """The upper half."""
        box = [v * SIDE_PX * SCALE for v in (x - radius, y - radius, x + radius, y + radius)]
        self._draw.pieslice(box, 180, 360, fill=colour)

    def hook(self, x: float, y: float, radius: float, colour: str, width: float) -> None:
        """The lower half of a circle's line."""
        box = [v * SIDE_PX * SCALE for v in (x - radius, y - radius, x + radius, y + radius)]
        self._draw.arc(box, 0, 180, fill=colour, width=round(width * SIDE_PX * SCALE))

    def save(self, name: str) -> None:
        small = self.image.resize((SIDE_PX, SIDE_PX), Image.Resampling.LANCZOS)
        small.save(EXAMPLES_DIR / name, optimize=True)


def shapes() -> Canvas:
    """Three red circles and a blue square on white."""
    canvas = Canvas("white")
    for x, y in ((0.27, 0.27), (0.71, 0.30), (0.31, 0.73)):
        canvas.circle(x, y, 0.13, RED)
    canvas.polygon(0.73, 0.73, [0.17] * 4, BLUE, turn=1 / 8)
    return canvas


def scene() -> Canvas:
    """Two green triangles, a purple star, a red circle, and two blue squares on pale grey-blue."""
    canvas = Canvas("#e6eef7")
    canvas.polygon(0.22, 0.25, [0.15] * 3, GREEN)
    canvas.polygon(0.79, 0.74, [0.15] * 3, GREEN)
    canvas.polygon(0.54, 0.24, [0.15, 0.062] * 5, PURPLE)
    canvas.circle(0.50, 0.62, 0.13, RED)
    canvas.polygon(0.82, 0.36, [0.14] * 4, BLUE, turn=1 / 8)
    canvas.polygon(0.20, 0.72, [0.14] * 4, BLUE, turn=1 / 8)
    return canvas


def umbrella() -> Canvas:
    """An umbrella as icons show it: half a disc, a stick, a bent handle."""
    canvas = Canvas("white")
    canvas.half_disc(0.5, 0.52, 0.36, VIOLET)
    canvas.rectangle(0.485, 0.5, 0.515, 0.82, BROWN)
    canvas.hook(0.45, 0.81, 0.065, BROWN, 0.029)
    return canvas


def flag() -> Canvas:
    """The flag of Japan on pale grey."""
    canvas = Canvas("#e9edf2")
    canvas.rectangle(0.08, 0.20, 0.92, 0.78, "white")
    canvas.circle(0.50, 0.49, 0.17, "#bc002d")
    return canvas


def main() -> None:
    for draw in (shapes, scene, umbrella, flag):
        draw().save(f"{draw.__name__}.png")


if __name__ == "__main__":
    main()
