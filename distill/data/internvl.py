"""Training data in InternVL's format: a meta file that names data sets, and JSON Lines with images and conversations.

    {"my_set": {"root": "images/", "annotation": "my_set.jsonl", "repeat_time": 1, "data_augment": false, ...}, ...}

Each line of an annotation: {"image": "a.jpg" | ["a.jpg", "b.jpg"], "conversations": [{"from": "human", "value":
"<image>\\nWhat is this?"}, {"from": "gpt", "value": "..."}, ...]}, without "image" for text alone. The format is that
of github.com/OpenGVLab/InternVL (internvl_chat/shell/data).
"""

from __future__ import annotations

import io
import json
import math
import struct
import warnings
import zlib
from bisect import bisect
from collections import Counter
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from distill.data.sample import IMAGE_TAG, QA, Sample, Split, check_split, held_out, rng_for

HELD_OUT_PERCENT = 2
_MOST_TRIES = 1000  # lines drawn for one sample before the source is given up as unusable
_SIDE_PX = 448  # a JPEG for one tile is decoded at no less than this, which is faster than all of it


class UnusableError(ValueError):
    """A line, a picture or a conversation that cannot be trained on; it is passed over and counted."""


class _Set(NamedTuple):
    """One data set. spans: (offset, length) of the lines that are used.  weight: how often, over all its lines."""

    name: str
    root: Path
    annotation: Path
    spans: list[tuple[int, int]]
    weight: float


class InternVL:
    """Conversations from the data sets of a meta file, each as often as its `repeat_time` says. A `Source`.

    What cannot be used is passed over and counted in `skipped`, by reason: when lines are read, and when pictures are.
    A `repeat_time` below 1 takes that share of the lines, spread evenly; above 1 (fractions too) it draws them more
    often. `data_augment` and InternVL's other fields change nothing here. Held out are 2 %, chosen by the name of the
    first image or, without images, by the first question: no picture is in both splits.
    """

    def __init__(
        self,
        meta: str | Path,
        split: Split = "train",
        *,
        num_images: int | None = 1,
        name: str | None = None,
        whole_pictures: bool = False,
    ) -> None:
        """
        Args:
            meta: the meta file. Paths in it are taken as they stand, or from the meta file's folder.
            num_images: only lines with as many images, since a batch holds the same number in every row (see `Rows`);
                0: lines without; None: all.
            name: of the source and the task of its samples; the file's name without endings unless given.
            whole_pictures: decode every picture in full, to be cut into tiles; else large JPEGs come smaller.
        Raises: ValueError for a meta file that cannot be read or is no such object, and if nothing can be used.
        """
        path = Path(meta)
        self.name = name or path.stem
        self.split = check_split(split)
        self.num_images = num_images
        self.whole_pictures = whole_pictures
        self.skipped: Counter[str] = Counter()
        self.sets = []
        for key, entry in _read_meta(path).items():
            root, annotation = _resolve(path, str(entry.get("root") or "")), _resolve(path, entry["annotation"])
            repeat = entry.get("repeat_time", 1)
            if not isinstance(repeat, int | float) or not 0 <= repeat < math.inf:
                raise ValueError(f'{path}: repeat_time of "{key}" is {repeat!r}; use a number of 0 or more')
            spans = self._spans(annotation) if repeat else []
            if repeat < 1:
                share = range(math.ceil(len(spans) * repeat))
                spans = [spans[min(int(i / repeat), len(spans) - 1)] for i in share]
            if spans:
                self.sets.append(_Set(key, root, annotation, spans, len(spans) * max(1.0, repeat)))
        if not self.sets:
            raise ValueError(
                f'{path} gives an empty mixture: no usable conversation of split "{split}" with '
                f"{'any number of' if num_images is None else num_images} images ({_told(self.skipped)})"
            )
        self._bounds = list(accumulate(s.weight for s in self.sets))

    def __len__(self) -> int:
        """Number of different lines that are used."""
        return sum(len(s.spans) for s in self.sets)

    def sample(self, seed: int, index: int, attempt: int = 0) -> Sample:
        """Raises: ValueError if a thousand lines in a row could not be used, with the reasons."""
        rng = rng_for(self.name, self.split, seed, index, attempt)
        for _ in range(_MOST_TRIES):
            chosen = self.sets[min(bisect(self._bounds, rng.random() * self._bounds[-1]), len(self.sets) - 1)]
            offset, length = rng.choice(chosen.spans)
            try:
                with chosen.annotation.open("rb") as file:
                    file.seek(offset)
                    names, system, turns = read_line(file.read(length))
                images = [open_image(chosen.root / name, whole=self.whole_pictures) for name in names]
            except (UnusableError, OSError) as error:
                self.skipped[_reason(error)] += 1
                continue
            return conversation_sample(images, system, turns, self.name)
        raise ValueError(f"nothing of {self.name} can be used ({_told(self.skipped)}); mend its paths")

    def _spans(self, annotation: Path) -> list[tuple[int, int]]:
        """Where the lines of this split stand in a file."""
        spans, offset = [], 0
        try:
            with annotation.open("rb") as file:
                for line in file:
                    span, offset = (offset, len(line)), offset + len(line)
                    if not line.strip():
                        continue
                    try:
                        names, _, turns = read_line(line)
                    except UnusableError as error:
                        self.skipped[_reason(error)] += 1
                        continue
                    if self.num_images not in (None, len(names)):
                        self.skipped["another number of images"] += 1
                    elif held_out(names[0] if names else turns[0][0], HELD_OUT_PERCENT) == (self.split == "val"):
                        spans.append(span)
        except OSError as error:
            self.skipped["annotation missing"] += 1
            warnings.warn(f"{annotation} cannot be read ({error}); its data set is left out", stacklevel=3)
        return spans


def read_line(line: bytes) -> tuple[list[str], str | None, tuple[QA, ...]]:
    """Image names, system message and turns of one line.  Raises: UnusableError."""
    try:
        record = json.loads(line)
        image = record.get("image") or []
        names = [image] if isinstance(image, str) else [str(name) for name in image]
        system, turns = read_conversation(record["conversations"], len(names))
    except UnusableError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnusableError(f"line broken: {error!r}") from error
    return names, system, turns


def read_conversation(messages: list[dict[str, Any]], num_images: int) -> tuple[str | None, tuple[QA, ...]]:
    """System message (None if there is none) and turns, in which `num_images` places "<image>" stand.

    Messages of one side in a row are joined by a line break; an answer without a question and a question without an
    answer are left out. Without any "<image>" the images come first, as InternVL puts them.

    Raises: UnusableError if the places and the images differ in number, or no whole turn is there.
    """
    system, joined = None, list[tuple[str, str]]()
    for message in messages:
        side, text = message["from"], message["value"].strip()
        if side == "system" and not joined:
            system = text
        elif side not in ("human", "gpt"):
            raise UnusableError(f'line broken: "from" is "{side}"')
        elif joined and joined[-1][0] == side:
            joined[-1] = (side, f"{joined[-1][1]}\n{text}".strip())
        elif text and (joined or side == "human"):
            joined.append((side, text))
    turns = [(question, answer) for (_, question), (_, answer) in zip(joined[::2], joined[1::2], strict=False)]
    if not turns:
        raise UnusableError("conversation without a whole turn")
    if num_images and not any(IMAGE_TAG in question for question, _ in turns):
        turns[0] = (f"{IMAGE_TAG}\n" * num_images + turns[0][0], turns[0][1])
    if sum(question.count(IMAGE_TAG) for question, _ in turns) != num_images:
        raise UnusableError("number of images and of <image> differ")
    return system, tuple(turns)


def conversation_sample(images: list[Image.Image], system: str | None, turns: tuple[QA, ...], task: str) -> Sample:
    """The sample of a conversation as `read_conversation` gives it."""
    if not images:
        return Sample(None, turns, task, system=system)
    return Sample(images[0], turns, task, tuple(images[1:]), placed=True, system=system)


def open_image(data: Path | bytes, *, whole: bool = False) -> Image.Image:
    """A picture in mode RGB, from a file or its bytes; a large JPEG smaller unless `whole`.

    Raises: UnusableError if it is missing or broken.
    """
    try:
        image = Image.open(io.BytesIO(data) if isinstance(data, bytes) else data)
        if not whole:
            image.draft("RGB", (_SIDE_PX, _SIDE_PX))
        return image.convert("RGB")
    except FileNotFoundError as error:
        raise UnusableError(f"image missing: {data!r}") from error
    # Whatever decoders throw at damaged files, and what Pillow does at ones made to fill the memory.
    except (
        OSError,
        ValueError,
        SyntaxError,
        EOFError,
        struct.error,
        zlib.error,
        Image.DecompressionBombError,
    ) as error:
        raise UnusableError(f"image broken: {error!r}") from error


def _read_meta(path: Path) -> dict[str, dict[str, Any]]:
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}); see distill/data/README.md for its form") from error
    if not isinstance(meta, dict) or not all(isinstance(e, dict) and "annotation" in e for e in meta.values()):
        raise ValueError(f'{path} is no meta file; it must map names to objects with "root" and "annotation"')
    return meta


def _resolve(meta: Path, written: str) -> Path:
    return Path(written) if Path(written).exists() and written else meta.parent / written


def _reason(error: Exception) -> str:
    return str(error).split(":")[0] if isinstance(error, UnusableError) else "annotation missing"


def _told(skipped: Counter[str]) -> str:
    return ", ".join(f"{reason}: {number}" for reason, number in skipped.most_common()) or "nothing was passed over"
