"""Images: InternVL's tiling, every pixel mode, and files that are damaged, too large or no image."""

from __future__ import annotations

import contextlib
import io
import json
import warnings
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from mmmamba.config import ModelConfig
from mmmamba.image import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ImageError,
    ImageLimits,
    choose_grid,
    load_image,
    tile_image,
)

GOLDEN = Path(__file__).parent / "golden"
# 56 px tiles, up to 12, with a thumbnail
CONFIG = ModelConfig.from_dict(json.loads((GOLDEN / "post" / "linear" / "config.json").read_text()))
TILE = 56
RED, WHITE, BLACK = (255, 0, 0), (255, 255, 255), (0, 0, 0)


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def to_bytes(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def noise(width: int = 80, height: int = 60) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# --- tiling ---


@pytest.mark.parametrize(
    ("size", "max_tiles", "grid"),
    [
        # Computed with the published dynamic_preprocess (tile 448 px).
        ((800, 1300), 12, (2, 3)),
        ((1920, 1080), 12, (4, 2)),
        ((640, 480), 12, (4, 3)),
        ((448, 448), 12, (1, 1)),
        ((1344, 896), 6, (3, 2)),
        ((300, 300), 12, (1, 1)),
        ((3000, 3000), 12, (3, 3)),
        ((1000, 5), 12, (12, 1)),
        ((5, 1000), 12, (1, 12)),
        ((1000, 1000), 1, (1, 1)),
        ((1000, 500), 6, (2, 1)),
        ((500, 250), 6, (2, 1)),
    ],
)
def test_grid_is_internvl_s(size: tuple[int, int], max_tiles: int, grid: tuple[int, int]) -> None:
    assert choose_grid(*size, min_tiles=1, max_tiles=max_tiles, tile_px=448) == grid


def test_of_equally_near_grids_the_area_decides() -> None:
    half = (2 * 448) ** 2 // 2  # half the pixels of a 2 x 2 grid
    side = int(half**0.5)
    assert choose_grid(side, side, min_tiles=1, max_tiles=4, tile_px=448) == (1, 1)
    assert choose_grid(side + 1, side + 1, min_tiles=1, max_tiles=4, tile_px=448) == (2, 2)


@given(
    width=st.integers(1, 16384),
    height=st.integers(1, 16384),
    min_tiles=st.integers(1, 4),
    extra=st.integers(0, 36),
)
def test_grid_properties(width: int, height: int, min_tiles: int, extra: int) -> None:
    max_tiles = min_tiles + extra
    cols, rows = choose_grid(width, height, min_tiles=min_tiles, max_tiles=max_tiles, tile_px=448)
    assert min_tiles <= cols * rows <= max_tiles
    # No grid within the limits is nearer.
    best = abs(width / height - cols / rows)
    for c in range(1, max_tiles + 1):
        for r in range(1, max_tiles // c + 1):
            assert c * r < min_tiles or best <= abs(width / height - c / r)


@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 400), height=st.integers(1, 400), max_tiles=st.integers(1, 12))
def test_tiles_never_exceed_the_limit(width: int, height: int, max_tiles: int) -> None:
    tiles = tile_image(Image.new("RGB", (width, height)), CONFIG, max_tiles=max_tiles)
    cols, rows = choose_grid(width, height, min_tiles=1, max_tiles=max_tiles, tile_px=TILE)
    num_tiles = cols * rows
    assert tiles.shape == (num_tiles + (num_tiles > 1), 3, TILE, TILE)
    assert num_tiles <= max_tiles


def test_tiles_come_row_by_row_with_the_thumbnail_last() -> None:
    cols, rows = 3, 2
    levels = np.arange(cols * rows, dtype=np.uint8).reshape(rows, cols) * 40
    pixels = np.repeat(np.repeat(levels, TILE, axis=0), TILE, axis=1)
    image = Image.fromarray(pixels).convert("RGB")
    tiles = tile_image(image, CONFIG, max_tiles=6)
    assert tiles.shape[0] == 7
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    seen = tiles * std[:, None, None] + mean[:, None, None]
    for i in range(6):
        assert torch.allclose(seen[i], torch.tensor(i * 40 / 255), atol=1e-6), f"tile {i} is out of order"
    thumbnail = np.asarray(image.resize((TILE, TILE), Image.Resampling.BICUBIC)).transpose(2, 0, 1) / 255
    assert np.allclose(seen[6].numpy(), thumbnail, atol=1e-6)


def test_pixel_values_are_imagenet_normalised() -> None:
    tiles = tile_image(Image.new("RGB", (TILE, TILE), RED), CONFIG, max_tiles=1)
    expected = [(1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225]
    assert tiles.dtype == torch.float32
    assert tiles.is_contiguous()
    assert torch.allclose(tiles[0].mean(dim=(1, 2)), torch.tensor(expected), atol=1e-5)


def test_config_decides_on_tiles_and_thumbnail() -> None:
    wide = Image.new("RGB", (800, 200))
    assert len(tile_image(wide, replace(CONFIG, max_dynamic_patch=4))) == 5
    assert len(tile_image(wide, replace(CONFIG, max_dynamic_patch=4, use_thumbnail=False))) == 4
    assert len(tile_image(wide, replace(CONFIG, dynamic_image_size=False))) == 1
    assert len(tile_image(wide, replace(CONFIG, max_dynamic_patch=1), max_tiles=2)) == 3
    assert len(tile_image(wide, replace(CONFIG, min_dynamic_patch=4), max_tiles=1)) == 1


def test_tiling_refuses_what_does_not_fit() -> None:
    image = Image.new("RGB", (10, 10))
    for bad in (0, -1, 65):
        with pytest.raises(ValueError, match=f"max_tiles={bad}; use 1 <= min_tiles"):
            tile_image(image, CONFIG, max_tiles=bad)
    with pytest.raises(ImageError, match="mode L, tiles need RGB"):
        tile_image(image.convert("L"), CONFIG)
    with pytest.raises(ValueError, match="0 x 5 pixels"):
        choose_grid(0, 5, min_tiles=1, max_tiles=2, tile_px=448)


# --- modes ---


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_png_modes_show_the_same_picture(mode: str) -> None:
    grey = Image.new("L", (8, 6), 0)
    grey.paste(255, (0, 0, 4, 6))
    wide = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    image = wide if mode == "I;16" else grey.convert(mode)
    assert image.mode == mode
    loaded = load_image(to_bytes(image))
    assert loaded.mode == "RGB"
    assert np.array_equal(np.asarray(loaded), np.asarray(grey.convert("RGB")))


@pytest.mark.parametrize(
    "mode", ["CMYK", "YCbCr", "HSV", "LAB", "RGBX", "RGBa", "La", "PA", "I", "F", "I;16B", "I;16L"]
)
def test_other_modes_convert(mode: str) -> None:
    grey = Image.new("L", (8, 6), 0)
    grey.paste(255, (0, 0, 4, 6))
    if mode == "LAB":
        image = Image.new("LAB", (8, 6), (0, 128, 128))
        image.paste((255, 128, 128), (0, 0, 4, 6))
        image = Image.open(io.BytesIO(to_bytes(image, "TIFF")))
        assert image.mode == "LAB"
    elif mode.startswith("I;16"):
        data = np.asarray(grey).astype(">u2" if mode.endswith("B") else "<u2") * 257
        image = Image.frombytes(mode, grey.size, data.astype(">u2" if mode.endswith("B") else "<u2").tobytes())
    else:
        via = {"La": "LA", "RGBa": "RGBA", "PA": "P", "YCbCr": "RGB", "HSV": "RGB", "CMYK": "RGB", "RGBX": "RGB"}
        image = grey.convert(via.get(mode, "L")).convert(mode)
    assert image.mode == mode
    loaded = load_image(image)
    assert np.abs(np.asarray(loaded).astype(int) - np.asarray(grey.convert("RGB"))).max() <= 2


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 65535]], np.uint16), [0, 255]),
        (np.array([[0, 255]], np.int32), [0, 255]),
        (np.array([[0, 65535]], np.int32), [0, 255]),
        (np.array([[-1000, 1000]], np.int32), [0, 255]),
        (np.array([[0, 1_000_000]], np.int32), [0, 255]),
        (np.array([[0.0, 1.0]], np.float32), [0, 255]),
        (np.array([[0.0, 0.5]], np.float32), [0, 128]),
        (np.array([[0.0, 128.0]], np.float32), [0, 128]),
        (np.array([[np.nan, 1.0]], np.float32), [0, 255]),
        (np.array([[np.inf, 0.5]], np.float32), [0, 128]),
        (np.array([[-5.0, -5.0]], np.float32), [0, 0]),
        (np.array([[1e30, 3e38]], np.float32), [0, 255]),
    ],
)
def test_wide_values_are_scaled(values: np.ndarray, expected: list[int]) -> None:
    assert np.asarray(load_image(Image.fromarray(values)))[0, :, 0].tolist() == expected


def test_16_bit_tiff_and_png_files() -> None:
    for format in ("PNG", "TIFF"):
        image = Image.fromarray(np.array([[0, 32768, 65535]], np.uint16))
        assert np.asarray(load_image(to_bytes(image, format)))[0, :, 0].tolist() == [0, 128, 255]


def test_transparency_lies_over_white() -> None:
    rgba = Image.new("RGBA", (2, 1), (*RED, 255))
    rgba.putpixel((1, 0), (0, 0, 0, 0))
    for format in ("PNG", "WEBP", "TIFF"):
        options = {"lossless": True} if format == "WEBP" else {}
        loaded = load_image(to_bytes(rgba, format, **options))
        assert [loaded.getpixel((x, 0)) for x in (0, 1)] == [RED, WHITE]
    half = load_image(to_bytes(Image.new("RGBA", (1, 1), (0, 0, 0, 128))))
    assert half.getpixel((0, 0)) == (127, 127, 127)


def test_transparent_palette_and_key_colours_lie_over_white() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([*RED, *BLACK])
    palette.putpixel((1, 0), 1)
    for file in (
        to_bytes(palette, transparency=1),
        to_bytes(palette, transparency=b"\xff\x00"),
        to_bytes(palette, "GIF", transparency=1),
    ):
        loaded = load_image(file)
        assert [loaded.getpixel((x, 0)) for x in (0, 1)] == [RED, WHITE]
    key = Image.new("RGB", (2, 1), RED)
    key.putpixel((1, 0), (1, 2, 3))
    assert load_image(to_bytes(key, transparency=(1, 2, 3))).getpixel((1, 0)) == WHITE
    assert load_image(to_bytes(Image.new("L", (1, 1), 7), transparency=7)).getpixel((0, 0)) == WHITE


def test_cmyk_jpeg() -> None:
    loaded = load_image(to_bytes(Image.new("RGB", (16, 16), RED).convert("CMYK"), "JPEG"))
    assert np.abs(np.asarray(loaded).astype(int) - RED).max() <= 4


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize(
    ("orientation", "corner"),  # where the top left corner of the stored pixels belongs: column, row
    [(1, (0, 0)), (2, (1, 0)), (3, (1, 1)), (4, (0, 1)), (5, (0, 0)), (6, (1, 0)), (7, (1, 1)), (8, (0, 1))],
)
def test_exif_orientation(format: str, orientation: int, corner: tuple[int, int]) -> None:
    stored = Image.new("RGB", (32, 16))
    stored.paste(WHITE, (0, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    loaded = load_image(to_bytes(stored, format, exif=exif))
    assert loaded.size == ((32, 16) if orientation < 5 else (16, 32))
    bright = np.asarray(loaded.resize((2, 2), Image.Resampling.BOX))[..., 0] > 128
    assert np.argwhere(bright).tolist() == [[corner[1], corner[0]]]


def test_damaged_exif_is_no_reason_to_refuse() -> None:
    loaded = load_image(to_bytes(noise(), "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff"))
    assert loaded.size == (80, 60)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_an_animation(format: str) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, BLACK, WHITE)]
    options = {"lossless": True} if format == "WEBP" else {}
    file = to_bytes(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert load_image(file).getpixel((0, 0)) == RED


def test_source_kinds_agree_and_stay_as_they_were(tmp_path: Path) -> None:
    image = noise()
    path = tmp_path / "picture.png"
    path.write_bytes(to_bytes(image))
    for source in (path, str(path), path.read_bytes(), image):
        assert load_image(source).tobytes() == image.tobytes()
    loaded = load_image(image)
    loaded.putpixel((0, 0), RED)
    assert image.tobytes() == noise().tobytes()
    with pytest.raises(TypeError, match="not int"):
        load_image(5)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (2, 400), (400, 2), (1, 16384)])
def test_small_and_narrow_images_work(size: tuple[int, int]) -> None:
    image = load_image(to_bytes(Image.new("RGB", size, RED)))
    tiles = tile_image(image, CONFIG)
    assert torch.isfinite(tiles).all()
    assert torch.allclose(tiles[:, 0], torch.tensor((1 - 0.485) / 0.229), atol=1e-5)


# --- refusals ---


def test_limits() -> None:
    limits = ImageLimits(max_bytes=2**19, max_pixels=500, max_side_px=100)
    with pytest.raises(ImageError, match=r"more than 0\.5 MiB"):
        load_image(to_bytes(noise(600, 400)), limits=limits)
    with pytest.raises(ImageError, match="101 x 1 pixels; each side must be 1 to 100"):
        load_image(to_bytes(Image.new("L", (101, 1))), limits=limits)
    with pytest.raises(ImageError, match=r"30 x 20 = 0\.0 megapixels; at most 0\.0005 fit"):
        load_image(Image.new("L", (30, 20)), limits=limits)
    with pytest.raises(ImageError, match="0 x 5 pixels"):
        load_image(Image.new("L", (0, 5)))
    assert load_image(to_bytes(Image.new("L", (25, 20))), limits=limits).size == (25, 20)


def test_file_over_the_limit_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "huge.png"
    with open(path, "wb") as file:
        file.truncate(10 * 2**30)  # sparse
    with pytest.raises(ImageError, match="more than 20 MiB"):
        load_image(path)


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises `width` x `height` pixels and holds few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\x00\x00\x00"
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [8000, 12000, 16384, 30000, 2**30])
def test_decompression_bombs_are_refused_before_decoding(side: int) -> None:
    with pytest.raises(ImageError, match=r"megapixels|each side must be|too large"):
        load_image(png_header(side, side))


def test_a_promise_of_pixels_that_do_not_come() -> None:
    with pytest.raises(ImageError, match="damaged or cut short"):
        load_image(png_header(500, 500))


FILE_FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"] + (["AVIF"] if features.check("avif") else [])


@pytest.mark.parametrize("format", FILE_FORMATS)
@pytest.mark.parametrize("kept", [0.0, 0.02, 0.3, 0.7, 0.95])
def test_truncated_files(format: str, kept: float) -> None:
    file = to_bytes(noise(), format)
    with pytest.raises(ImageError, match=r"damaged or cut short|not an image that can be read"):
        load_image(file[: int(len(file) * kept)])


@pytest.mark.parametrize("format", FILE_FORMATS)
@settings(max_examples=60, deadline=None)
@given(changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=12))
def test_damaged_files_load_or_are_refused(format: str, changes: list[tuple[int, int]]) -> None:
    file = bytearray(to_bytes(noise(), format))
    for at, value in changes:
        file[at] = value
    with contextlib.suppress(ImageError):  # any other exception is a crash
        assert load_image(bytes(file)).mode == "RGB"


def test_other_files_are_no_images(tmp_path: Path) -> None:
    text = tmp_path / "notes.jpg"
    text.write_text("no picture at all")
    for source in (text, b"", b"\x00" * 100, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"<svg/>"):
        with pytest.raises(ImageError, match="not an image that can be read; use PNG"):
            load_image(source)


@pytest.mark.parametrize("path", ["missing.png", "", ".", "a\x00b", "x" * 5000])
def test_paths_that_are_no_files(path: str) -> None:
    with pytest.raises(ImageError, match=r"no image file|cannot be opened"):
        load_image(path)
