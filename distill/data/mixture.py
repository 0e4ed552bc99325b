"""Sources mixed by weight into an endless, repeatable stream of batches, made by as many workers as there are cores.

Batch number k holds the samples k * batch_size and on, whoever makes it: the stream is the same for any number of
workers, and a run that starts at k sees what an unbroken one would.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from distill.data.batches import Batch, Row, Rows, stack
from distill.data.facts import PhotoFacts
from distill.data.flags import Flags
from distill.data.icons import Icons
from distill.data.named import NAMES, open_named
from distill.data.photos import Photos
from distill.data.sample import Sample, Source, Split, rng_for
from distill.data.shapes import Shapes
from distill.data.text import Conversations
from distill.data.together import join
from distill.data.unknown import Unknown

T = TypeVar("T")
_MOST_ATTEMPTS = 100


def open_sources(
    weights: Mapping[str, float],
    split: Split = "train",
    *,
    photos: str | Path | None = None,
    icons: str | Path | None = None,
    fonts: str | Path | None = None,
    text: Sequence[str | Path] = (),
    whole_pictures: bool = False,
) -> list[tuple[Source, float]]:
    """The sources that a recipe names, with their weights, for `Mixture`.

    Args:
        weights: by name: "shapes", "photos", "photo_facts", "icons", "flags", "unknown", one of `distill.data.named`
            (among them "internvl:META.json" and "webdataset:SHARDS" for data of your own), or the name of a file of
            conversations without endings, such as "gsm8k_train". A weight of 0 leaves a source out. With "unknown",
            "photos" leaves out the classes that are never taught.
        photos: where the photos lie (see `distill.data.photos.Photos`).
        icons: the file with icons and flags (see `distill.data.icons_pack`).
        fonts: a pack of fonts (see `distill.data.fonts_pack`), for "printed", "charts" and "digits".
        text: folders to look through, in order, for `NAME.jsonl.gz` and `NAME.jsonl`.
        whole_pictures: decode a user's own pictures in full, to be cut into tiles.
    Raises: ValueError for a name that is neither, and as the sources do.
    """
    used = {name: weight for name, weight in weights.items() if weight}
    places = {"photos": photos, "icons": icons}
    for name, places_needed in _NEEDS.items():
        for place in places_needed:
            if name in used and places[place] is None:
                raise ValueError(f'the weights name "{name}"; say with {place}= where the {place} lie')
    sources = []
    for name, weight in used.items():
        source = open_named(name, split, fonts=fonts, text=text, whole_pictures=whole_pictures)
        if source is None:
            source = _open(name, split, photos, icons, text, "unknown" in used)
        sources.append((source, weight))
    return sources


# What the sources that draw on files cannot do without.
_NEEDS = {
    Photos.name: ("photos",),
    PhotoFacts.name: ("photos",),
    Icons.name: ("icons",),
    Flags.name: ("icons",),
    Unknown.name: ("photos", "icons"),
}


def _open(
    name: str,
    split: Split,
    photos: str | Path | None,
    icons: str | Path | None,
    text: Sequence[str | Path],
    taught_only: bool,
) -> Source:
    if name == Shapes.name:
        return Shapes(split)
    if photos is not None and name == Photos.name:
        return Photos(photos, split, taught_only=taught_only)
    if photos is not None and name == PhotoFacts.name:
        return PhotoFacts(photos, split)
    if icons is not None and name == Icons.name:
        return Icons(icons, split)
    if icons is not None and name == Flags.name:
        return Flags(icons, split)
    if name == Unknown.name:
        return Unknown(split, icons=icons, photos=photos)
    for folder in text:
        for ending in (".jsonl.gz", ".jsonl"):
            path = Path(folder) / f"{name}{ending}"
            if path.is_file():
                # Two people's small talk has no beginning that matters; tasks and answers do.
                return Conversations(path, split, any_start=name == "topical_chat")
    places = ", ".join(map(str, text)) or "no folder given with text="
    known = ", ".join(f'"{known}"' for known in (Shapes.name, *_NEEDS, *NAMES))
    raise ValueError(f'source "{name}" is neither one of {known}, nor a .jsonl or .jsonl.gz file in {places}')


class Mixture(IterableDataset[Batch]):
    """Batches number `start`, `start` + 1, ... without end.

    Args:
        sources: sources with their weights, the mean share of each in a batch (they need not add up to 1).
        rows: makes the rows, and says by its kind whether the samples have a picture. If its rows hold several, as many
            samples of one picture are joined into a conversation (see `distill.data.together`) where `joined` is set.
        batch_size: rows a batch.
        seed: another seed is another stream.
        start: number of the first batch, to go on where a run stopped.
        rank, world_size: of several processes that train together, each takes every `world_size`-th batch; `start`
            counts the batches of one process.
        joined: sources give one picture a sample, rows hold `rows.num_images`.
    Raises: ValueError for no sources, sources of different splits, a weight below 0, only zeros, or a bad size.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Source, float]],
        rows: Rows,
        *,
        batch_size: int,
        seed: int = 0,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
        joined: bool = False,
    ) -> None:
        if not sources:
            raise ValueError("the mixture is empty; give at least one source")
        splits = sorted({source.split for source, _ in sources})
        if len(splits) > 1:
            raise ValueError(f"the sources are of splits {' and '.join(splits)}; a mixture takes one split")
        weights = {source.name: weight for source, weight in sources}
        if not all(weight >= 0 for weight in weights.values()) or not sum(weights.values()) > 0:
            raise ValueError(f"the weights are {weights}; none may be below 0 and one must be above")
        if len(weights) < len(sources):
            raise ValueError(f"two sources have the same name, of {[s.name for s, _ in sources]}; pass name= to one")
        if batch_size < 1 or start < 0 or not 0 <= rank < world_size:
            raise ValueError(
                f"batch_size={batch_size}, start={start}, rank={rank}, world_size={world_size}; "
                "batch_size must be 1 or more, start 0 or more, and rank from 0 to below world_size"
            )
        self.sources = [source for source, _ in sources]
        self.weights = [weight for _, weight in sources]
        self.rows = rows
        self.batch_size = batch_size
        self.seed = seed
        self.start = start
        self.rank = rank
        self.world_size = world_size
        self.joined = (rows.num_images or 1) if joined else 1

    def sample(self, index: int, attempt: int = 0) -> Sample:
        """Sample number `index` of the stream, of all the pictures of a row."""
        if self.joined == 1:
            return self._drawn(index, attempt)
        parts = [self._drawn(index * self.joined + i, attempt) for i in range(self.joined)]
        return join(parts, rng_for("joined", self.seed, index, attempt), chars=self.rows.chars_per_image)

    def _drawn(self, index: int, attempt: int) -> Sample:
        source = rng_for("mixture", self.seed, index).choices(self.sources, self.weights)[0]
        return source.sample(self.seed, index, attempt)

    def batch(self, number: int) -> Batch:
        """Batch `number` of this process. Samples that do not fit are replaced from the same source, and counted.

        Raises: ValueError if a source gives nothing that fits in a hundred attempts.
        """
        first = (number * self.world_size + self.rank) * self.batch_size
        rows: list[Row] = []
        num_skipped = 0
        for index in range(first, first + self.batch_size):
            for attempt in range(_MOST_ATTEMPTS):
                row = self.rows.row(self.sample(index, attempt))
                if row is not None:
                    rows.append(row)
                    num_skipped += attempt
                    break
            else:
                task = self.sample(index).task
                raise ValueError(
                    f"{_MOST_ATTEMPTS} samples of {task} do not fit seqlen={self.rows.seqlen}; make the rows longer"
                )
        return stack(rows, num_skipped)

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        number, step = (self.start, 1) if worker is None else (self.start + worker.id, worker.num_workers)
        while True:
            yield self.batch(number)
            number += step


def loader(
    mixture: IterableDataset[T], *, num_workers: int, prefetch: int = 4, pin_memory: bool | None = None
) -> DataLoader[T]:
    """Batches of a mixture in order, made ahead of time in `num_workers` processes (0: in this one, when asked for).

    A worker hands over whole batches, through shared memory: about batch_size * 150 KiB each at 224 px, of which up to
    `num_workers` * `prefetch` wait at a time.

    Args:
        pin_memory: copy batches to page-locked memory, so that `.to(device, non_blocking=True)` overlaps with work;
            None does so where CUDA is there.
    """
    if pin_memory is None:
        pin_memory = torch.cuda.is_available()
    return DataLoader(
        mixture,
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=prefetch if num_workers else None,
        pin_memory=pin_memory,
    )
