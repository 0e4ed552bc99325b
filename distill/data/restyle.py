"""Drawings changed as another artist might draw them, so that what is learned is the thing and not the style."""

from __future__ import annotations

import random

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

_OUTLINES = ((20, 20, 30), (60, 40, 30), (40, 50, 90), (255, 255, 255))


def restyle(drawing: Image.Image, rng: random.Random) -> Image.Image:
    """Other strength of colours, tint, flatness, outline, proportions; RGBA to RGBA, colours keep their names."""
    if rng.random() < 0.5:
        drawing = _recolored(drawing, rng)
    if rng.random() < 0.35:
        drawing = _outlined(drawing, rng)
    if rng.random() < 0.4:
        width, height = drawing.size
        wide = rng.uniform(0.82, 1.22)
        drawing = drawing.resize((max(1, round(width * wide**0.5)), max(1, round(height / wide**0.5))))
    if rng.random() < 0.15:
        drawing = drawing.filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 1.6)))
    return drawing


def bend(drawing: Image.Image, rng: random.Random) -> Image.Image:
    """Hung askew: each column moved along an arc or a slope and lit from one side; RGBA to a taller RGBA."""
    pixels = np.asarray(drawing).astype(np.float32)
    height, width = pixels.shape[:2]
    across = np.linspace(-1, 1, width)
    shift = height * (rng.uniform(-0.14, 0.14) * across**2 + rng.uniform(-0.2, 0.2) * across)
    shift = np.round(shift - shift.min()).astype(int)
    out = np.zeros((height + int(shift.max()), width, 4), np.float32)
    out[np.arange(height)[:, None] + shift[None], np.arange(width)[None]] = pixels
    light = 0.85 + rng.uniform(-0.15, 0.15) * across + rng.uniform(0.0, 0.25) * (across - rng.uniform(-1, 1)) ** 2
    out[..., :3] *= light[None, :, None]
    return Image.fromarray(out.clip(0, 255).astype(np.uint8), "RGBA")


def _recolored(drawing: Image.Image, rng: random.Random) -> Image.Image:
    alpha = drawing.getchannel("A")
    picture = drawing.convert("RGB")
    picture = ImageEnhance.Color(picture).enhance(rng.uniform(0.35, 1.7))
    picture = ImageEnhance.Brightness(picture).enhance(rng.uniform(0.8, 1.15))
    picture = ImageEnhance.Contrast(picture).enhance(rng.uniform(0.7, 1.4))
    if rng.random() < 0.25:
        picture = picture.quantize(rng.choice((4, 6, 8))).convert("RGB")  # as flat as a sticker
    if rng.random() < 0.3:
        tint = Image.new("RGB", picture.size, tuple(rng.randrange(256) for _ in range(3)))
        picture = Image.blend(picture, tint, rng.uniform(0.05, 0.15))
    picture.putalpha(alpha)
    return picture


def _outlined(drawing: Image.Image, rng: random.Random) -> Image.Image:
    """A line around the whole, drawn where it grows."""
    size = rng.choice((3, 5, 7))
    padded = Image.new("RGBA", (drawing.width + 2 * size, drawing.height + 2 * size))
    padded.paste(drawing, (size, size))
    around = padded.getchannel("A").filter(ImageFilter.MaxFilter(size))
    line = Image.new("RGBA", padded.size, (*rng.choice(_OUTLINES), 255))
    line.putalpha(around)
    return Image.alpha_composite(line, padded)
