"""Images in: any file Pillow opens to RGB, and RGB to the tiles that the model sees.

The tiling is InternVL's (`dynamic_preprocess`, arXiv:2404.16821): the image is resized to the grid of square tiles
whose aspect ratio is nearest to its own and cut; a thumbnail of the whole follows if there is more than one tile.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms
from PIL.Image import Transpose

from mmmamba.config import ModelConfig

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MOST_TILES = 64

# Formats with a signature that tells them from other files, decoded in C and by no outside program (EPS would run one).
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "ICO", "PPM", "PSD")


class ImageError(ValueError):
    """A file that is no image, a damaged one, or one over a limit, with what to do."""


@dataclass(frozen=True)
class ImageLimits:
    """What `load_image` takes; it looks at sizes before it decodes."""

    max_bytes: int = 20 * 2**20
    max_pixels: int = 50_000_000
    max_side_px: int = 16_384

    def check_bytes(self, num_bytes: int) -> None:
        if num_bytes > self.max_bytes:
            raise ImageError(
                f"the image file has more than {self.max_bytes / 2**20:g} MiB; make it smaller or save it as JPEG"
            )

    def check_size(self, width: int, height: int) -> None:
        if not (1 <= width <= self.max_side_px and 1 <= height <= self.max_side_px):
            raise ImageError(
                f"the image is {width} x {height} pixels; each side must be 1 to {self.max_side_px}: resize or crop it"
            )
        if width * height > self.max_pixels:
            raise ImageError(
                f"the image is {width} x {height} = {width * height / 1e6:.1f} megapixels; "
                f"at most {self.max_pixels / 1e6:g} fit, so make it smaller"
            )


DEFAULT_LIMITS = ImageLimits()


def load_image(source: str | Path | bytes | Image.Image, *, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """Read an image as RGB: upright by its EXIF orientation, transparency over white, first frame of an animation.

    Args:
        source: a path, a file's bytes, or a Pillow image (its current frame; it is not changed).
        limits: on bytes (not for a Pillow image), pixels and sides.
    Returns: an image of mode RGB.
    Raises: ImageError if there is no such file, it is no image or a damaged one, or is over a limit; TypeError for
        another kind of source.
    """
    if not isinstance(source, str | Path | bytes | Image.Image):
        raise TypeError(f"load_image takes a path, bytes or a Pillow image, not {type(source).__name__}")
    if isinstance(source, str | Path):
        source = _read_file(source, limits)
    # Pillow warns of large images and damaged metadata; the limits above and the errors below say it better. Only
    # its own warnings are silenced, as filters are shared by all threads.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        if isinstance(source, Image.Image):
            return _decode(source, limits)
        limits.check_bytes(len(source))
        Image.init()
        formats = [name for name in FORMATS if name in Image.OPEN]
        try:
            image = Image.open(io.BytesIO(source), formats=formats)
        except Image.DecompressionBombError as error:
            raise ImageError(f"the image is too large ({error}); make it smaller") from error
        except Exception as error:  # on a damaged header Pillow's parsers raise nearly anything
            raise ImageError(
                "the file is not an image that can be read; use PNG, JPEG, WebP, GIF, BMP, TIFF or AVIF"
            ) from error
        with image:
            return _decode(image, limits)


def choose_grid(width: int, height: int, *, min_tiles: int, max_tiles: int, tile_px: int) -> tuple[int, int]:
    """The grid of tiles whose aspect ratio is nearest to the image's, with `min_tiles` to `max_tiles` tiles.

    Of equally near ones (1 x 1 and 2 x 2, say) the larger is taken if the image has more than half its pixels.

    Returns: columns, rows.
    Raises: ValueError unless width, height >= 1 and 1 <= min_tiles <= max_tiles <= 64.
    """
    if width < 1 or height < 1:
        raise ValueError(f"an image of {width} x {height} pixels has no grid; both sides must be at least 1")
    if not 1 <= min_tiles <= max_tiles <= MOST_TILES:
        raise ValueError(
            f"min_tiles={min_tiles}, max_tiles={max_tiles}; use 1 <= min_tiles <= max_tiles <= {MOST_TILES}"
        )
    best, nearest = (1, 1), float("inf")
    for cols, rows in _grids(min_tiles, max_tiles):
        distance = abs(width / height - cols / rows)
        large_enough = width * height > 0.5 * tile_px**2 * cols * rows
        if distance < nearest or (distance == nearest and large_enough):
            best, nearest = (cols, rows), distance
    return best


def cut_tiles(image: Image.Image, config: ModelConfig, *, max_tiles: int | None = None) -> np.ndarray:
    """Cut an image into tiles, row by row, and append a thumbnail if there is more than one and the config says so.

    Args:
        image: RGB, as from `load_image`.
        max_tiles: tiles without the thumbnail; None takes `config.max_dynamic_patch`. A config without
            `dynamic_image_size` always gets one tile.
    Returns: (num_tiles, tile, tile, 3), uint8.
    Raises: ImageError if the image is not RGB; ValueError for `max_tiles` outside 1 to 64.
    """
    if image.mode != "RGB":
        raise ImageError(f"the image has mode {image.mode}, tiles need RGB; pass it through load_image first")
    if max_tiles is None:
        max_tiles = config.max_dynamic_patch
    px = config.image_size
    cols, rows = choose_grid(
        *image.size, min_tiles=min(config.min_dynamic_patch, max_tiles), max_tiles=max_tiles, tile_px=px
    )
    if not config.dynamic_image_size:
        cols, rows = 1, 1
    pixels = np.asarray(image.resize((cols * px, rows * px), Image.Resampling.BICUBIC))
    tiles = pixels.reshape(rows, px, cols, px, 3).swapaxes(1, 2).reshape(-1, px, px, 3)
    if config.use_thumbnail and len(tiles) > 1:
        thumbnail = np.asarray(image.resize((px, px), Image.Resampling.BICUBIC))
        tiles = np.concatenate([tiles, thumbnail[None]])
    return tiles


def tile_image(image: Image.Image, config: ModelConfig, *, max_tiles: int | None = None) -> torch.Tensor:
    """The tiles of an image as the model takes them.  Arguments and errors: see `cut_tiles`.

    Returns: pixel_values, (num_tiles, 3, tile, tile), float32, ImageNet-normalised.
    """
    scaled = cut_tiles(image, config, max_tiles=max_tiles).astype(np.float32) / 255
    normalised = (scaled - np.array(IMAGENET_MEAN, np.float32)) / np.array(IMAGENET_STD, np.float32)
    return torch.from_numpy(np.ascontiguousarray(normalised.transpose(0, 3, 1, 2)))  # (num_tiles, 3, tile, tile)


@lru_cache(maxsize=64)
def _grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    """All (columns, rows), smallest first: `choose_grid` prefers the first of equally near ones."""
    sides = range(1, max_tiles + 1)
    grids = [(cols, rows) for cols in sides for rows in sides if min_tiles <= cols * rows <= max_tiles]
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))


def _read_file(path: str | Path, limits: ImageLimits) -> bytes:
    try:
        if not Path(path).is_file():
            raise ImageError(f'there is no image file "{path}"; give the path of a file on this machine')
        with open(path, "rb") as file:
            return file.read(limits.max_bytes + 1)  # enough to see that it is too large
    except ImageError:
        raise
    except (OSError, ValueError) as error:
        raise ImageError(
            f'the image file "{path}" cannot be opened ({error}); check the path and its rights'
        ) from error


def _decode(image: Image.Image, limits: ImageLimits) -> Image.Image:
    """Load, convert to RGB and turn upright, with any failure as ImageError."""
    limits.check_size(*image.size)
    try:
        image.load()
        limits.check_size(*image.size)  # an ICO file's header may have promised less
        rgb = _to_rgb(image)
    except ImageError:
        raise
    except Exception as error:  # a damaged file makes Pillow's decoders raise nearly anything
        raise ImageError(
            f"the image is damaged or cut short ({str(error) or type(error).__name__}); open and save it again"
        ) from error
    turn = _TURNS.get(_orientation(image))
    return rgb if turn is None else rgb.transpose(turn)


# EXIF orientation -> what makes the image upright.
_TURNS = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}


def _orientation(image: Image.Image) -> int:
    """1 (upright) if there is none; read after loading, which for TIFF turns the image itself."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged metadata is no reason to refuse a good picture
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and not image.has_transparency_data:
        return image.copy()
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_to_8_bit(np.asarray(image))).convert("RGB")
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        rgb = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        assert rgb is not None, "profileToProfile returns an image unless it works in place"
        return rgb
    if image.has_transparency_data:
        if image.mode == "La":
            image = image.convert("LA")
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _to_8_bit(values: np.ndarray) -> np.ndarray:
    """Grey values of a wide image as uint8.

    16-bit images span 0 to 65535. Wider integers and floats have no fixed span: the smallest usual one that holds
    the values is taken (0 to 1 for floats, 0 to 255, 0 to 65535), else they are stretched from least to most.
    """
    if values.dtype.itemsize == 2:
        low, high = 0.0, 65535.0
    else:
        usual = [255.0, 65535.0]
        if values.dtype.kind == "f":
            usual.insert(0, 1.0)
            values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
        low, high = float(values.min()), float(values.max())
        fitting = [span for span in usual if low >= 0 and high <= span]
        if fitting:
            low, high = 0.0, fitting[0]
    scaled = (values.astype(np.float64) - low) * (255 / (high - low) if high > low else 0.0)
    return np.rint(scaled).astype(np.uint8)
