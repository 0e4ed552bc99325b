"""Draw the two example pictures of shapes: `python docs/draw_examples.py` writes them to app/examples."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw

SIDE_PX = 448
SCALE = 4  # drawn larger and reduced, for smooth edges
EXAMPLES_DIR = Path(__file__).parents[1] / "app" / "examples"


def canvas(colour: str) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (SIDE_PX * SCALE, SIDE_PX * SCALE), colour)
    return image, ImageDraw.Draw(image)


def box(x: float, y: float, size: float) -> tuple[float, float, float, float]:
    """Corners of a square around (x, y), all as fractions of the side."""
    side = SIDE_PX * SCALE
    return (x - size / 2) * side, (y - size / 2) * side, (x + size / 2) * side, (y + size / 2) * side


def triangle(draw: ImageDraw.ImageDraw, x: float, y: float, size: float, colour: str) -> None:
    left, top, right, bottom = box(x, y, size)
    draw.polygon([((left + right) / 2, top), (right, bottom), (left, bottom)], fill=colour)


def shapes() -> Image.Image:
    """Three red circles and a blue square on white."""
    image, draw = canvas("white")
    for x, y in ((0.27, 0.27), (0.71, 0.30), (0.31, 0.73)):
        draw.ellipse(box(x, y, 0.27), fill="#dc2626")
    draw.rectangle(box(0.73, 0.73, 0.25), fill="#2563eb")
    return image


def scene() -> Image.Image:
    """A house of shapes under a sun: square, triangle, circle."""
    image, draw = canvas("#dbeafe")
    side = SIDE_PX * SCALE
    draw.rectangle((0, 0.78 * side, side, side), fill="#65a30d")
    draw.rectangle((0.22 * side, 0.45 * side, 0.62 * side, 0.82 * side), fill="#f59e0b")
    triangle(draw, 0.42, 0.33, 0.52, "#b91c1c")
    draw.rectangle((0.22 * side, 0.45 * side, 0.62 * side, 0.82 * side), fill="#f59e0b")
    draw.rectangle((0.37 * side, 0.60 * side, 0.47 * side, 0.82 * side), fill="#78350f")
    draw.ellipse(box(0.82, 0.20, 0.20), fill="#facc15")
    return image


def main() -> None:
    for name, image in (("shapes", shapes()), ("scene", scene())):
        small = image.resize((SIDE_PX, SIDE_PX), Image.Resampling.LANCZOS)
        small.save(EXAMPLES_DIR / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
