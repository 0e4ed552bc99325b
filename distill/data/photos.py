"""Photos with labels or captions, and questions on them.

They come from WebDataset-style tar files, `KEY.jpg` beside `KEY.json`, or from the one file that `photos_pack` makes.
"""

from __future__ import annotations

import io
import json
import random
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageEnhance, ImageFilter

from distill.data.sample import QA, Sample, Split, casual, check_split, rng_for, sentence, with_article, yes_no
from distill.data.unseen import part_of

# Labels that name no single thing; the last label of some records.
BROAD_LABELS = ("fruit", "vegetable", "grocery package", "waste")

# Things that a mirror changes: they carry letters or have a side.
_NO_MIRROR = ("stop sign", "dollar bill", "yin-yang symbol", "wristwatch", "grocery package", "waste")


@dataclass(frozen=True, slots=True)
class Photo:
    """A record: an encoded picture (JPEG or WebP) and what is known of it (fields as in the shards)."""

    key: str
    data: bytes
    labels: tuple[str, ...]
    captions: tuple[str, ...]
    human_captions: bool  # written by people; else made from the label by a template

    @property
    def name(self) -> str:
        """What the photo shows, as one would answer: "a euphonium, a brass instrument", "Granny Smith apple", or ""."""
        for caption in self.captions:
            if caption.startswith("This is ") and not self.human_captions:
                return caption.removeprefix("This is ").removesuffix(".").split(", photographed")[0]
        return "" if self.human_captions or not self.labels else self.labels[0]

    @property
    def kind(self) -> str:
        """The broad label ("fruit", "waste", ...), or ""."""
        return self.labels[-1] if self.labels and self.labels[-1] in BROAD_LABELS else ""

    @property
    def class_name(self) -> str:
        """What is held out as a whole (`distill.data.unseen`): "apple" for every variety, "" where nothing is named."""
        if self.human_captions or not self.labels or self.kind == "waste":  # materials are no things
            return ""
        return (self.labels[1] if self.kind else self.labels[0]).lower()

    @property
    def accepted(self) -> tuple[str, ...]:
        """Every right answer to "What is this?": the name first, then the labels that are not broad."""
        return tuple(dict.fromkeys((self.name, *(label for label in self.labels if label not in BROAD_LABELS))))

    def open(self) -> Image.Image:
        """Raises: ValueError, naming the photo, if its bytes are no picture."""
        try:
            return Image.open(io.BytesIO(self.data)).convert("RGB")
        except OSError as error:
            raise ValueError(f"photo {self.key} cannot be decoded ({error}); make or fetch its shard again") from error


def read_photos(path: Path, split: Split | None) -> list[Photo]:
    """All photos of a split (None: of all), in the order of the shards.

    Args:
        path: a folder with shards `SPLIT-NNNN.tar`, or one file written by `photos_pack`, plain or gzipped.
    Raises: ValueError for no shards, no photos of this split, a damaged shard, or a photo without its record.
    """
    photos = []
    for _, key, data, text in read_records(path, None if split is None else check_split(split)):
        try:
            record = json.loads(text)
            human = record["caption_type"] == "human"
            photos.append(Photo(key, data, tuple(record["labels"]), tuple(record["captions"]), human))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"the record of photo {key} in {path} cannot be used ({error!r}); make its shard again"
            ) from error
    if not photos:
        raise ValueError(f"{path} holds no photos" + (f' of split "{split}"' if split else ""))
    return photos


def read_records(path: Path, split: Split | None = None) -> Iterator[tuple[Split, str, bytes, bytes]]:
    """Split, key, picture and JSON text of every record, of one split or of all; raises as `read_photos`."""
    shards = sorted(path.glob("*-*.tar")) if path.is_dir() else [path] if path.is_file() else []
    if not shards:
        raise ValueError(
            f"{path} is neither a folder with SPLIT-NNNN.tar files nor a packed file; see distill/data/README.md"
        )
    for shard in shards:
        # Shards carry the split in their name; in a packed file the members do, as SPLIT/KEY.webp.
        shard_split = check_split(shard.name.split("-")[0]) if path.is_dir() else None
        if split is None or shard_split in (None, split):
            for name, data, text in _pairs(shard):
                folder, _, key = name.rpartition("/")
                record_split = shard_split or check_split(folder)
                if split in (None, record_split):
                    yield record_split, key, data, text


def _pairs(shard: Path) -> Iterator[tuple[str, bytes, bytes]]:
    """Name, picture and JSON text of each record of a tar file."""
    waiting: dict[str, tuple[str, bytes]] = {}
    try:
        with tarfile.open(shard) as tar:
            for member in tar:
                name, _, suffix = member.name.rpartition(".")
                file = tar.extractfile(member)
                if file is None:  # a folder
                    continue
                data = file.read()
                if name not in waiting:
                    waiting[name] = (suffix, data)
                    continue
                other_suffix, other = waiting.pop(name)
                if (suffix == "json") == (other_suffix == "json"):
                    raise ValueError(f"{shard}: {name} has .{other_suffix} and .{suffix}, not a picture and .json")
                yield (name, other, data) if suffix == "json" else (name, data, other)
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{shard} is not a tar file that can be read ({error}); make or fetch it again") from error
    if waiting:
        raise ValueError(f"{shard}: {next(iter(waiting))} lacks its picture or its .json; make or fetch the file again")


# -- questions ---------------------------------------------------------------------------------------------------------

LABEL_QUESTIONS = (
    "What is this?",
    "What do you see?",
    "What is in the picture?",
    "What does the image show?",
    "What is shown here?",
    "What can you see in this photo?",
    "What is the main object in this picture?",
    "Name the thing in the photo.",
    "Can you tell me what this is?",
    "Identify the object.",
    "What am I looking at?",
    "What's in the image?",
    "What is depicted here?",
    "Which object is this?",
)
_DESCRIBE = (
    "Describe the picture.",
    "Describe this image.",
    "Describe the photo in one sentence.",
    "Give a short caption.",
    "Write a caption for this picture.",
    "What is happening in this picture?",
)
_YES_NO = (
    "Is this {}?",
    "Does the picture show {}?",
    "Is there {} in the photo?",
    "Do you see {}?",
    "Would you say this is {}?",
)


class Photos:
    """Photos drawn with replacement, with one to three questions each. A `Source`.

    For training, every drawing is cut, mirrored and lit a little differently.
    """

    name = "photos"

    def __init__(
        self, path: str | Path, split: Split = "train", *, size_px: int = 224, taught_only: bool = False
    ) -> None:
        """Reads all shards at `path` into memory (see `read_photos`, also for what is raised).

        Args:
            taught_only: leave out the classes that are never taught (`distill.data.unseen`), which the source `Unknown`
                shows without a name.
        """
        self.split = check_split(split)
        self.size_px = size_px
        self.path = Path(path)
        self.photos = read_photos(self.path, split)
        if taught_only:
            self.photos = [photo for photo in self.photos if part_of(photo.class_name) == "taught"]
        # One photo for each thing, to ask "Is this a ...?" of other photos.
        self._others = list({photo.name: photo for photo in self.photos if photo.name}.values())

    def sample(self, seed: int, index: int, attempt: int = 0) -> Sample:
        rng = rng_for(self.name, self.split, seed, index, attempt)
        photo = rng.choice(self.photos)
        image = photo.open()
        if self.split == "train":
            image = augment(image, rng, self.size_px, mirror=not set(photo.labels) & set(_NO_MIRROR))
        return Sample(squash(image, self.size_px), self._turns(photo, rng), self.name)

    def _turns(self, photo: Photo, rng: random.Random) -> tuple[QA, ...]:
        if photo.human_captions:
            return ((casual(rng, rng.choice(_DESCRIBE)), _clean(rng.choice(photo.captions))),)
        asks = [label_question(photo, rng)]
        if rng.random() < 0.35:
            asks.append(self._yes_no(photo, rng))
        if rng.random() < 0.35 and (more := _kind_question(photo, rng)) is not None:
            asks.append(more)
        if rng.random() < 0.2:
            asks.append((rng.choice(_DESCRIBE[:5]), _clean(photo.captions[0])))
        if rng.random() < 0.3:
            rng.shuffle(asks)
        return tuple((casual(rng, question), answer) for question, answer in asks[:3])

    def _yes_no(self, photo: Photo, rng: random.Random) -> QA:
        truth = rng.random() < 0.5
        other = photo
        while not truth and _words(other) & _words(photo):  # "a chair" would be no wrong name for a Windsor chair
            other = rng.choice(self._others)
        noun = other.name if other.name != other.labels[0] else _noun(other.name)
        return rng.choice(_YES_NO).format(noun), yes_no(truth)


def label_question(photo: Photo, rng: random.Random) -> QA:
    """What is this?  `photo` has a name."""
    return rng.choice(LABEL_QUESTIONS), sentence(photo.name)


def squash(image: Image.Image, size_px: int) -> Image.Image:
    """Resize to a square without keeping the aspect ratio: what InternVL's tiling does to an image of one tile."""
    if image.size == (size_px, size_px):
        return image
    return image.resize((size_px, size_px), Image.Resampling.BICUBIC)


def _kind_question(photo: Photo, rng: random.Random) -> QA | None:
    """A broader or finer question than the label's, where the record has more than one label."""
    if photo.kind in ("fruit", "vegetable"):
        if photo.labels[0].lower() != photo.labels[1] and rng.random() < 0.5:
            templates = ("Which variety of {} is this?", "What kind of {} is it?", "What sort of {} do you see?")
            return rng.choice(templates).format(photo.labels[1]), sentence(photo.labels[0])
        templates = ("Is this a fruit or a vegetable?", "Fruit or vegetable?", "Is it a vegetable or a fruit?")
        return rng.choice(templates), sentence(with_article(photo.kind))
    if photo.kind == "grocery package":
        templates = ("What kind of product is this?", "What is in the package?", "What type of product do you see?")
        return rng.choice(templates), sentence(photo.labels[1])
    if photo.kind == "waste" and photo.labels[0] != "trash":
        templates = ("What is it made of?", "What material is this?", "Which material is it?")
        return rng.choice(templates), sentence(photo.labels[0])
    return None


def _noun(label: str) -> str:
    """A shop's label in a question: without an article where it is a plural or a brand."""
    bare = label.endswith("s") or (label.istitle() and " " in label)
    return label if bare else with_article(label)


def _words(photo: Photo) -> set[str]:
    return {word for text in photo.accepted for word in text.lower().replace(",", "").split()} - {"a", "an", "of", "or"}


def _clean(caption: str) -> str:
    caption = " ".join(caption.split())
    return sentence(caption.lower() if caption.isupper() else caption)


def augment(image: Image.Image, rng: random.Random, size_px: int, *, mirror: bool) -> Image.Image:
    """Another cut, mirrored or not, turned, in another light, in part covered.

    The cut keeps at least 45 % of the picture. One in fourteen turns grey: ask nothing about colours behind it. Some 50
    photos a class, unchanged, would be learned by heart.
    """
    width, height = image.size
    low = 0.67 if rng.random() < 0.6 else 0.85
    cut_width, cut_height = width * rng.uniform(low, 1), height * rng.uniform(low, 1)
    left, top = rng.uniform(0, width - cut_width), rng.uniform(0, height - cut_height)
    box = (left, top, left + cut_width, top + cut_height)
    image = image.resize((size_px, size_px), Image.Resampling.BICUBIC, box=box)
    if mirror and rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.3:
        fill = tuple(rng.randrange(256) for _ in range(3))
        image = image.rotate(rng.uniform(-15, 15), Image.Resampling.BILINEAR, fillcolor=fill)
    if rng.random() < 0.6:
        image = ImageEnhance.Color(image).enhance(0.0 if rng.random() < 0.12 else rng.uniform(0.5, 1.5))
    if rng.random() < 0.6:
        gain, lift = rng.uniform(0.7, 1.3), rng.uniform(-30, 30)
        image = image.point([min(255, max(0, round(v * gain + lift))) for v in range(256)] * 3)
    if rng.random() < 0.1:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 1.6)))
    if rng.random() < 0.3:
        _cover(image, rng)
    return image


def _cover(image: Image.Image, rng: random.Random) -> None:
    """A rectangle of one colour over 2 to 16 % of the picture (random erasing, arXiv:1708.04896)."""
    width, height = (round(side * rng.uniform(0.14, 0.4)) for side in image.size)
    left, top = rng.randrange(image.width - width), rng.randrange(image.height - height)
    image.paste(tuple(rng.randrange(256) for _ in range(3)), (left, top, left + width, top + height))
