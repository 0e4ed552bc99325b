"""Shards of photos from the sets as their authors publish them; which photos go where is in `photo_list.json.gz`."""

from __future__ import annotations

import gzip
import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from distill.checkpoints import write_bytes_whole

_LIST = Path(__file__).with_name("photo_list.json.gz")
_SIDE_PX = 256
_NEARLY_SQUARE = 1.34  # sides up to this ratio are cut to a square
_QUALITY = 80
SETS = {
    "caltech101": ("Caltech-101", "101_ObjectCategories/CLASS/image_NNNN.jpg, doi:10.22002/D1.20086"),
    "grocery": ("Grocery Store Dataset", "dataset/train/.../CLASS_NNN.jpg, of the authors' repository"),
    "trashnet": ("TrashNet", "dataset-resized/CLASS/CLASSN.jpg, of the authors' repository"),
    "coco": ("COCO 2017", "train2017/N.jpg and val2017/N.jpg"),
}


@cache
def _listed() -> dict[str, Any]:
    return json.loads(gzip.decompress(_LIST.read_bytes()))


def shard_keys() -> dict[str, list[str]]:
    """The keys of the photos of every shard, in order, by its name without ending."""
    return _listed()["shards"]


def record_of(key: str) -> dict[str, Any]:
    """Captions, labels, source and licence of a photo."""
    return _listed()["records"][_class_of(key)]


def _class_of(key: str) -> str:
    """What shares a record: a class of a set, or one photo of COCO, whose captions are its own."""
    if key.startswith("coco_"):
        return key
    if key.startswith("grocery_"):
        return key.rsplit("_", 2)[0]
    return key.rstrip("0123456789").rstrip("_")


def find_photos(folders: Sequence[Path]) -> dict[str, Path]:
    """Every published photo in the folders, by its key; what comes first stays."""
    found: dict[str, Path] = {}
    for folder in folders:
        for path in sorted(folder.rglob("*.jpg")):
            if key := _key_of(path):
                found.setdefault(key, path)
    return found


def _key_of(path: Path) -> str | None:
    """The key of a published photo, by its name and the folders that it lies in."""
    stem, parent = path.stem.lower(), path.parent.name.lower()
    if stem.startswith("image_"):
        return f"caltech101_{parent}_{stem.removeprefix('image_')}"
    if parent in ("train2017", "val2017"):
        return f"coco_{parent}_{stem}"
    split = next((part for part in path.parts[::-1] if part in ("train", "val", "test")), None)
    if split and (numbered := re.fullmatch(r"(.+)_(\d{3})", stem)):
        return f"grocery_{numbered[1]}_{split}_{numbered[2]}"
    return f"trashnet_{stem}" if re.fullmatch(r"[a-z]+\d+", stem) else None


def missing_photos(found: Mapping[str, Path]) -> dict[str, int]:
    """How many photos are not there, by the set, as `SETS` names it."""
    wanted = (key for keys in shard_keys().values() for key in keys)
    return dict(Counter(key.partition("_")[0] for key in wanted if key not in found))


def write_shards(found: Mapping[str, Path], out: Path) -> int:
    """Write all shards into a folder; the same photos give the same bytes with the same version of Pillow.

    Returns: number of photos.
    Raises: ValueError for a photo that cannot be read; OSError as writing does.
    """
    number = 0
    for name, keys in shard_keys().items():
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for member, content in _members(keys, found):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        number += len(keys)
        write_bytes_whole(out / f"{name}.tar", buffer.getvalue())
    return number


def _members(keys: Sequence[str], found: Mapping[str, Path]) -> Iterator[tuple[str, bytes]]:
    for key in keys:
        try:
            with Image.open(found[key]) as image:
                buffer = io.BytesIO()
                shrink(image).save(buffer, "JPEG", quality=_QUALITY)
        except OSError as error:
            raise ValueError(f"{found[key]} cannot be read ({error}); get it again") from error
        yield f"{key}.jpg", buffer.getvalue()
        yield f"{key}.json", json.dumps(record_of(key), ensure_ascii=False).encode()


def shrink(image: Image.Image) -> Image.Image:
    """A photo upright, in RGB, never enlarged: nearly square ones cut to a square of at most 256 px, others whole with
    a longer side of at most 256 px."""
    image = ImageOps.exif_transpose(image).convert("RGB")
    width, height = image.size
    short, long = min(image.size), max(image.size)
    if long <= _NEARLY_SQUARE * short:
        side = min(_SIDE_PX, short)
        return ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS)
    scale = min(1.0, _SIDE_PX / long)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return image if scale == 1 else image.resize(size, Image.Resampling.LANCZOS)
