"""The data of a run: sources from the places that the command line names, and streams of batches made from them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from distill.config import STAGES, Recipe, StageConfig
from distill.data.batches import RowKind, Rows
from distill.data.mixture import Mixture, loader, open_sources
from distill.data.packed_stream import Batches, PackedBatches, PackedStream, position_of
from distill.data.packing import Pieces, RowShape
from distill.data.photos import Photos
from distill.data.sample import Source
from distill.data.text import Conversations
from distill.distributed import Processes
from distill.faults import ignore_interrupts
from mmmamba.config import ModelConfig
from mmmamba.tokenizer import Tokenizer

_NO_PLACES = {"text", "count", "batch_size", "tasks", "whole_pictures"}  # arguments beside the shared places
OWN_TEXT = Path(__file__).parent / "data"  # self.jsonl.gz, drawn from the base model by distill.sample_text


class Places(NamedTuple):
    """Where data lies.

    named: what sources share, by the names that `open_sources` and `accuracy` know: photos and so on.
    text: folders to look through for conversations.
    instead: for a source of the recipe, the file or the name to take in its place.
    """

    named: dict[str, Path]
    text: list[Path]
    instead: dict[str, str]


def places(entries: Sequence[str], *, photos: Path | None = None, text: Sequence[Path] = ()) -> Places:
    """Sort `NAME=PATH` entries: NAME is "text", one of the shared places, or a source of the recipe.

    Raises: ValueError for an entry without a name or a path.
    """
    out = Places({}, list(text), {})
    if photos is not None:
        out.named["photos"] = photos
    for entry in entries:
        name, sign, path = entry.partition("=")
        if not (name and sign and path):
            raise ValueError(f'--data "{entry}" is no NAME=PATH; write, for example, --data photos=data/photos')
        if name == "text":
            out.text.append(Path(path))
        elif name in _names(open_sources):
            out.named[name] = Path(path)
        else:
            out.instead[name] = path
    return out


def nlvr_folder(folders: Sequence[Path]) -> Path | None:
    """The first of the folders that holds the statements kept for evaluation."""
    return next((folder for folder in folders if (folder / "nlvr_hidden.jsonl.gz").is_file()), None)


def accepted(function: Callable[..., Any], named: dict[str, Path]) -> dict[str, Any]:
    """Of the shared places those that `function` takes: a new one is added there alone."""
    return {name: path for name, path in named.items() if name in _names(function)}


def _names(function: Callable[..., Any]) -> set[str]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} - _NO_PLACES


class Data:
    """The sources of a recipe and the streams of batches made from them.

    Args:
        tokenizer, config: of the model that is trained.
        workers: processes that make image batches.
        processes: those that train together; each gets batches of its own.
    Raises: ValueError for a place of a source that the recipe does not name, and as the sources do.
    """

    def __init__(
        self,
        recipe: Recipe,
        where: Places,
        tokenizer: Tokenizer,
        config: ModelConfig,
        *,
        workers: int,
        processes: Processes,
    ) -> None:
        self.recipe = recipe
        self.places = where
        self.tokenizer = tokenizer
        self.config = config
        self.workers = workers
        self.processes = processes
        self.seqlens: dict[RowKind, int] = {"image": recipe.image_seqlen, "text": recipe.text_seqlen}
        known = recipe.image_sources.keys() | recipe.text_sources.keys()
        if stray := sorted(where.instead.keys() - known):
            shared = ", ".join(["text", *sorted(_names(open_sources))])
            raise ValueError(
                f"--data names {', '.join(stray)}; it takes {shared}, or a source of recipe {recipe.name}: "
                f"{', '.join(sorted(known))}"
            )
        self.sources: dict[RowKind, list[tuple[Source, float]]] = {
            "image": _open(recipe.image_sources, where, whole_pictures=recipe.max_tiles > 1),
            "text": _open(recipe.text_sources, where),
        }
        self.val_photos = Photos(where.named["photos"], "val") if "photos" in where.named else None

    def rows(self, kind: RowKind, *, pictures: int | None = None) -> Rows:
        """What makes rows of a kind, of as many pictures as the recipe says, or another number of one tile each.

        Raises: ValueError if the recipe's rows are too short.
        """
        recipe = self.recipe
        if not recipe.packed or pictures is not None:
            num_images = pictures or recipe.pictures
            return Rows(self.tokenizer, self.config, kind, seqlen=self.seqlens[kind], num_images=num_images)
        blank = (recipe.packed_tiles or 0) * self.config.tokens_per_tile  # tokens of a row that no text can have
        return Rows(
            self.tokenizer,
            self.config,
            kind,
            seqlen=min(self.seqlens[kind], recipe.image_seqlen - (blank if kind == "text" else 0)),
            num_images=None,
            max_tiles=recipe.max_tiles,
            text_tokens=recipe.image_seqlen - blank,
        )

    def batches(
        self, kind: RowKind, stage: str, *, start: int = 0, kept: Sequence[dict[str, Any]] = ()
    ) -> Batches | None:
        """An endless stream from batch `start` on; None if the stage takes none of this kind.

        Another seed a stage, since a stage need not see again what the last one saw. Packed rows hold both kinds, come
        as "image", and go on from what `PackedStream.position` was in each process.

        Raises: ValueError if a stage takes image batches and the recipe has no source for them.
        """
        config: StageConfig = self.recipe.stages[stage]
        size = config.image_batch if kind == "image" else config.text_batch
        if not size:
            return None
        seed = self.recipe.seed * 10 + STAGES.index(stage)
        if self.recipe.packed:
            return self._packed(size, seed, kept)
        if not self.sources[kind]:
            raise ValueError(
                f"recipe {self.recipe.name} has no {kind}_sources, and {stage} takes {kind}_batch={size} rows of them"
            )
        mixture = Mixture(
            self.sources[kind],
            self.rows(kind),
            batch_size=size,
            seed=seed,
            start=start,
            rank=self.processes.rank,
            world_size=self.processes.world_size,
            joined=kind == "image",
        )
        made = loader(mixture, num_workers=self.workers if kind == "image" else min(1, self.workers))
        made.worker_init_fn = ignore_interrupts
        return iter(made)

    def _packed(self, rows_a_batch: int, seed: int, kept: Sequence[dict[str, Any]]) -> PackedStream:
        recipe, processes = self.recipe, self.processes
        rows: dict[RowKind, Rows] = {"image": self.rows("image"), "text": self.rows("text")}
        shape = RowShape.of(
            self.config,
            seqlen=recipe.image_seqlen,
            rows=rows_a_batch,
            tiles=recipe.packed_tiles,
            pad_id=rows["text"].pad_id,
        )
        mixture = Mixture([*self.sources["image"], *self.sources["text"]], rows["image"], batch_size=1, seed=seed)
        at = position_of(kept, rank=processes.rank, world_size=processes.world_size, parts=self.parts)
        pieces = Pieces(mixture.sample, rows)
        packed = PackedBatches(pieces, shape, rank=processes.rank, world_size=processes.world_size, at=at)
        made = loader(packed, num_workers=self.workers)
        made.worker_init_fn = ignore_interrupts
        return PackedStream(iter(made), at)

    @property
    def parts(self) -> int:
        """Parts of a packed stream, each of which stands somewhere."""
        return max(1, self.workers)


def _open(weights: dict[str, float], where: Places, *, whole_pictures: bool = False) -> list[tuple[Source, float]]:
    """The sources of `weights`, with files in place of some."""
    files = {n: p for n, p in where.instead.items() if n in weights and p.endswith((".jsonl", ".jsonl.gz"))}
    own: list[tuple[Source, float]] = [(Conversations(path, name=n), weights[n]) for n, path in files.items()]
    rest = {where.instead.get(n, n): weight for n, weight in weights.items() if n not in files}
    # Sources among pictures may read from the folders of conversations too.
    folders = [*where.text, OWN_TEXT]
    shared = accepted(open_sources, where.named)
    return own + open_sources(rest, text=folders, whole_pictures=whole_pictures, **shared)
