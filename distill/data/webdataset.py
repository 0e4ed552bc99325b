"""Training data from WebDataset shards: uncompressed tar files with KEY.jpg, .png or .webp beside KEY.json or KEY.txt.

KEY.json holds "conversations" as in InternVL's format (`distill.data.internvl`), or a "caption" or "captions"; KEY.txt
is a caption. What a caption answers is asked in one of several ways.
"""

from __future__ import annotations

import glob
import json
import re
import tarfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from distill.data.internvl import UnusableError, conversation_sample, open_image, read_conversation
from distill.data.sample import QA, Sample, Split, casual, check_split, held_out, rng_for

HELD_OUT_PERCENT = 2
_IMAGES = ("jpg", "jpeg", "png", "webp")
_TEXTS = ("json", "txt")
_MOST_TRIES = 1000
_CAPTION = (
    "Describe the picture.",
    "Describe this image.",
    "What do you see?",
    "What is in the picture?",
    "What does the image show?",
    "Give a short caption.",
    "Write a caption for this picture.",
    "What is shown here?",
)


class _Span(NamedTuple):
    """Where a file's bytes lie in a shard."""

    offset: int
    size: int
    suffix: str


class _Record(NamedTuple):
    shard: int
    image: _Span
    text: _Span


class WebDataset:
    """Pictures with conversations or captions, drawn with replacement. A `Source`.

    Only the places of the records are kept in memory. A damaged shard is named in a warning, counted in `skipped`, and
    used up to where it is whole; so are records without a picture or a text, and those that turn out broken. Held out
    are the 2 % of records whose key hashes so.
    """

    def __init__(
        self, path: str | Path, split: Split = "train", *, name: str | None = None, whole_pictures: bool = False
    ) -> None:
        """
        Args:
            path: a tar file, a folder with tar files, or a pattern such as "shards/part-{0000..0012}.tar" or "*.tar".
            name: of the source and the task of its samples; the last part of the path without endings unless given.
            whole_pictures: decode every picture in full, to be cut into tiles; else large JPEGs come smaller.
        Raises: ValueError if there are no shards or nothing in them can be used, with the reasons.
        """
        self.name = name or re.sub(r"[^\w-]+$", "", Path(path).name.removesuffix(".tar")) or "webdataset"
        self.split = check_split(split)
        self.whole_pictures = whole_pictures
        self.skipped: Counter[str] = Counter()
        self.shards = _shards(str(path))
        self._records: list[_Record] = []
        for number, shard in enumerate(self.shards):
            for key, record in self._read(number, shard):
                if held_out(key, HELD_OUT_PERCENT) == (split == "val"):
                    self._records.append(record)
        if not self._records:
            raise ValueError(
                f'{path} gives an empty mixture: {len(self.shards)} shards with no usable record of split "{split}" '
                f"({', '.join(f'{reason}: {n}' for reason, n in self.skipped.items()) or 'nothing was passed over'})"
            )

    def __len__(self) -> int:
        """Number of records."""
        return len(self._records)

    def sample(self, seed: int, index: int, attempt: int = 0) -> Sample:
        """Raises: ValueError if a thousand records in a row could not be used, with the reasons."""
        rng = rng_for(self.name, self.split, seed, index, attempt)
        for _ in range(_MOST_TRIES):
            record = rng.choice(self._records)
            try:
                with self.shards[record.shard].open("rb") as file:
                    image, text = (_bytes(file, span) for span in (record.image, record.text))
                system, turns, caption = _read_text(record.text.suffix, text)
                if caption:
                    turns = ((f"<image>\n{casual(rng, rng.choice(_CAPTION))}", caption),)
                return conversation_sample([open_image(image, whole=self.whole_pictures)], system, turns, self.name)
            except (UnusableError, OSError) as error:
                self.skipped[str(error).split(":")[0] if isinstance(error, UnusableError) else "shard missing"] += 1
        raise ValueError(f"nothing of {self.name} can be used ({dict(self.skipped)}); make its shards again")

    def _read(self, number: int, shard: Path) -> Iterator[tuple[str, _Record]]:
        """Key and places of every whole record of a shard."""
        for key, spans in _groups(shard, self._damaged):
            image = next((span for span in spans if span.suffix in _IMAGES), None)
            text = next((span for suffix in _TEXTS for span in spans if span.suffix == suffix), None)
            if image is None or text is None:
                self.skipped["record without picture or text"] += 1
            else:
                yield key, _Record(number, image, text)

    def _damaged(self, shard: Path, why: str) -> None:
        self.skipped["shard damaged"] += 1
        warnings.warn(f"shard {shard} is damaged ({why}); what follows in it is left out", stacklevel=5)


def _shards(path: str) -> list[Path]:
    """Raises: ValueError if there are none."""
    braces = re.search(r"\{(\d+)\.\.(\d+)\}", path)
    if braces:
        first, last = braces.groups()
        names = [
            f"{path[: braces.start()]}{i:0{len(first)}d}{path[braces.end() :]}"
            for i in range(int(first), int(last) + 1)
        ]
        found = [Path(name) for name in names if Path(name).is_file()]
    elif Path(path).is_dir():
        found = sorted(Path(path).glob("*.tar"))
    else:
        found = sorted(Path(name) for name in glob.glob(path))
    if not found:
        raise ValueError(f"{path} names no tar files; give a tar file, a folder with some, or a pattern")
    return found


def _groups(shard: Path, damaged: Callable[[Path, str], None]) -> Iterator[tuple[str, list[_Span]]]:
    """Files of one key, which stand together, with the key; `damaged` is called where the shard cannot be read on."""
    size = shard.stat().st_size
    key, spans = "", list[_Span]()
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                if member.offset_data + member.size > size:
                    damaged(shard, f"{member.name} is cut off")
                    return
                folder, _, file = member.name.rpartition("/")
                stem, _, suffix = file.partition(".")
                if f"{folder}/{stem}" != key:
                    if spans:
                        yield key, spans
                    key, spans = f"{folder}/{stem}", []
                spans.append(_Span(member.offset_data, member.size, suffix.lower()))
            end = tar.offset
    except (tarfile.TarError, OSError, EOFError) as error:
        damaged(shard, str(error))
        return
    if spans:
        yield key, spans
    with shard.open("rb") as file_:
        file_.seek(end)
        if file_.read(512).strip(b"\0"):  # tarfile takes a header that makes no sense for the end
            damaged(shard, f"no header at byte {end}")


def _bytes(file: BinaryIO, span: _Span) -> bytes:
    file.seek(span.offset)
    return file.read(span.size)


def _read_text(suffix: str, data: bytes) -> tuple[str | None, tuple[QA, ...], str]:
    """System message and turns, or a caption.  Raises: UnusableError."""
    try:
        text = data.decode("utf-8").strip()
        if suffix == "json":
            record = json.loads(text)
            if "conversations" in record:
                return *read_conversation(record["conversations"], 1), ""
            captions = record.get("caption") or record.get("captions") or ""
            text = (captions if isinstance(captions, str) else str(captions[0])).strip()
    except UnusableError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnusableError(f"text broken: {error!r}") from error
    if not text:
        raise UnusableError("record without a caption")
    return None, (), text
