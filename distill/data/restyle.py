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
    if rng.random() < 0.25:
        drawing = _inked(drawing, rng)
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
    """Hung askew or in folds: columns moved along a curve of up to four turns, lit as it leans; RGBA to taller RGBA."""
    pixels = np.asarray(drawing).astype(np.float32)
    height, width = pixels.shape[:2]
    across = np.linspace(-1, 1, width)
    if rng.random() < 0.4:
        curve = rng.uniform(-0.14, 0.14) * across**2
    else:
        curve = _wander(rng, width) * rng.uniform(0.04, 0.15)
    light = 0.85 + rng.uniform(-0.15, 0.15) * across + rng.uniform(0.0, 0.25) * (across - rng.uniform(-1, 1)) ** 2
    if (steepest := float(np.abs(np.gradient(curve)).max())) > 0:
        light += rng.uniform(-0.2, 0.2) * np.gradient(curve) / steepest
    shift = height * (curve + rng.uniform(-0.2, 0.2) * across)
    shift = np.round(shift - shift.min()).astype(int)
    out = np.zeros((height + int(shift.max()), width, 4), np.float32)
    out[np.arange(height)[:, None] + shift[None], np.arange(width)[None]] = pixels
    out[..., :3] *= light[None, :, None]
    return Image.fromarray(out.clip(0, 255).astype(np.uint8), "RGBA")


def _wander(rng: random.Random, width: int) -> np.ndarray:
    """A smooth curve through four to six random heights in -1 to 1, at places that are not evenly spread; (width,)."""
    number = rng.randint(4, 6)
    places = np.cumsum([0.0, *(rng.uniform(0.5, 1.5) for _ in range(number - 1))]) / (number - 1)
    heights = np.array([rng.uniform(-1, 1) for _ in range(number)])
    at = np.linspace(0, places[-1], width)
    piece = np.clip(np.searchsorted(places, at, side="right") - 1, 0, number - 2)
    part = (at - places[piece]) / (places[piece + 1] - places[piece])
    return heights[piece] + (heights[piece + 1] - heights[piece]) * part**2 * (3 - 2 * part)


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


def _inked(drawing: Image.Image, rng: random.Random) -> Image.Image:
    """Lines of one colour where colours meet, over colours as they were or paler: a cartoon, or a page to colour in."""
    alpha = drawing.getchannel("A")
    flat = Image.new("RGB", drawing.size, (255, 255, 255))
    flat.paste(drawing, mask=alpha)
    edges = flat.filter(ImageFilter.FIND_EDGES).convert("L").point([255 if v > 24 else 0 for v in range(256)])
    if rng.random() < 0.6:
        edges = edges.filter(ImageFilter.MaxFilter(3))
    paler = rng.choice((0.0, 0.0, rng.uniform(0.1, 0.6)))
    pale = Image.blend(flat, Image.new("RGB", flat.size, (255, 255, 255)), paler)
    pale.paste(rng.choice(_OUTLINES[:3]), mask=edges.filter(ImageFilter.GaussianBlur(0.5)))
    pale.putalpha(alpha)
    return pale


def _outlined(drawing: Image.Image, rng: random.Random) -> Image.Image:
    """A line around the whole, drawn where it grows."""
    size = rng.choice((3, 5, 7))
    padded = Image.new("RGBA", (drawing.width + 2 * size, drawing.height + 2 * size))
    padded.paste(drawing, (size, size))
    around = padded.getchannel("A").filter(ImageFilter.MaxFilter(size))
    line = Image.new("RGBA", padded.size, (*rng.choice(_OUTLINES), 255))
    line.putalpha(around)
    return Image.alpha_composite(line, padded)
