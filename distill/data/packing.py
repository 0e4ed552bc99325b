"""Samples of any length packed one behind the other into rows of one length, so that no step is spent on padding.

First-fit in the order of the stream: a sample goes into the first row of the batch with room for it. One that finds no
room is held for the next batch, where it comes first; a batch is done when a few have been. What comes out depends on
nothing but the samples, and where the stream stands is a few numbers, so a run goes on exactly where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from distill.data.batches import Row, RowKind, Rows
from distill.data.sample import Sample
from mmmamba.config import ModelConfig

_MOST_UNFIT = 100
_ATTEMPTS = 10
SHORTEST = 8  # tokens a sample has at least, on average over a row: bounds the segments


@dataclass(frozen=True)
class Piece:
    """A sample without padding.

    input_ids: (length,), int64.  loss_mask: (length,), bool.  pixels: (num_tiles, side, side, 3), uint8, or None.
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray
    pixels: np.ndarray | None

    @classmethod
    def of(cls, row: Row) -> Piece:
        """The sample of a padded row: it ends with the last token to be learned.  Raises: ValueError if none is."""
        learned = np.flatnonzero(row.loss_mask)
        if not len(learned):
            raise ValueError("a row without anything to learn cannot be packed; leave the sample out")
        length = int(learned[-1]) + 1
        return cls(row.input_ids[:length], row.loss_mask[:length], row.pixels)

    @property
    def num_tiles(self) -> int:
        return 0 if self.pixels is None else len(self.pixels)


@dataclass(frozen=True, kw_only=True)
class RowShape:
    """The rows to fill.

    seqlen: tokens a row, as the language model counts them.        rows: rows a batch.
    tiles: tiles a row. Rows that come out with fewer get blank ones, so that every tensor of every batch has the same
        shape (a captured step and several rows a batch need that). None: as many as the samples bring; one row then.
    tokens_per_tile, image_token_id, pad_id: of the model.          side: of a tile, in pixels.
    """

    seqlen: int
    rows: int
    tiles: int | None
    tokens_per_tile: int
    image_token_id: int
    pad_id: int
    side: int

    @classmethod
    def of(cls, config: ModelConfig, *, seqlen: int, rows: int = 1, tiles: int | None = None, pad_id: int) -> RowShape:
        embedding = config.embedding
        return cls(
            seqlen=seqlen,
            rows=rows,
            tiles=tiles,
            tokens_per_tile=config.tokens_per_tile,
            image_token_id=embedding.img_context_token_id,
            pad_id=pad_id,
            side=config.image_size,
        )

    def __post_init__(self) -> None:
        if self.seqlen < 1 or self.rows < 1:
            raise ValueError(f"rows of seqlen={self.seqlen}, rows={self.rows}; both must be 1 or more")
        if self.tiles is None and self.rows > 1:
            raise ValueError(f"rows={self.rows} need equally many tiles each; say how many with tiles=, or use one row")
        if self.tiles is not None and not 0 <= self.tiles * self.tokens_per_tile <= self.seqlen:
            raise ValueError(
                f"tiles={self.tiles} of {self.tokens_per_tile} tokens do not fit seqlen={self.seqlen}; use from 0 to "
                f"{self.seqlen // self.tokens_per_tile}"
            )

    @property
    def segments(self) -> int:
        """Segments a row at most, blank tiles and padding among them."""
        return self.seqlen // SHORTEST + 2


class PackerState(NamedTuple):
    """Where a stream of packed batches stands: the number of the next sample, and of those that wait for room."""

    next_index: int = 0
    held: tuple[int, ...] = ()


@dataclass(frozen=True)
class Fill:
    """What the tokens of a batch are: of samples, of blank tiles, padding. `num_unfit`: samples that were passed over,
    since they are longer than a row or could not be made."""

    num_samples: int
    sample_tokens: int
    blank_tokens: int
    padding_tokens: int
    num_unfit: int

    @property
    def waste(self) -> float:
        """Share of the tokens that belong to no sample."""
        wasted = self.blank_tokens + self.padding_tokens
        return wasted / (self.sample_tokens + wasted)


class PackedBatch(NamedTuple):
    """Rows of packed samples. `input_ids`, `loss_mask` and `num_skipped` as in `Batch`.

    pixels: (num_tiles, side, side, 3), uint8, tiles of all samples in order; None without any.
    segment_ids: (rows, seqlen), int32: the number of the sample in its row; blank tiles and padding have their own.
    is_real: (rows, seqlen), bool: tokens of samples.
    max_segments: segments of the batch at most, the same for all batches.
    state: where the stream stands behind this batch.
    """

    input_ids: Tensor
    loss_mask: Tensor
    pixels: Tensor | None
    num_skipped: int
    segment_ids: Tensor
    is_real: Tensor
    max_segments: int
    fill: Fill
    state: PackerState


@dataclass
class _Bin:
    """A row as it fills."""

    shape: RowShape
    pieces: list[Piece] = field(default_factory=list)
    tokens: int = 0
    tiles: int = 0

    def takes(self, piece: Piece) -> bool:
        shape = self.shape
        tokens, tiles = self.tokens + len(piece.input_ids), self.tiles + piece.num_tiles
        if shape.tiles is not None:
            tokens += (shape.tiles - tiles) * shape.tokens_per_tile  # blank tiles must find room
            if tiles > shape.tiles:
                return False
        return tokens <= shape.seqlen and len(self.pieces) < shape.segments - 2

    def add(self, piece: Piece) -> None:
        self.pieces.append(piece)
        self.tokens += len(piece.input_ids)
        self.tiles += piece.num_tiles


def pack(bins: Sequence[Sequence[Piece]], shape: RowShape, state: PackerState, num_unfit: int = 0) -> PackedBatch:
    """Lay samples out, each list of them in a row.  Raises: ValueError if image tokens and tiles do not match."""
    input_ids = np.full((shape.rows, shape.seqlen), shape.pad_id, np.int64)
    loss_mask = np.zeros((shape.rows, shape.seqlen), bool)
    segment_ids = np.zeros((shape.rows, shape.seqlen), np.int32)
    is_real = np.zeros((shape.rows, shape.seqlen), bool)
    pixels: list[np.ndarray] = []
    blank_tokens = 0
    for row, pieces in enumerate(bins):
        end = tiles = 0
        for number, piece in enumerate(pieces):
            _check(piece, shape)
            place = row, slice(end, end := end + len(piece.input_ids))
            input_ids[place], loss_mask[place], segment_ids[place] = piece.input_ids, piece.loss_mask, number
            is_real[place] = True
            tiles += piece.num_tiles
            if piece.pixels is not None:
                pixels.append(piece.pixels)
        if shape.tiles is not None and (missing := shape.tiles - tiles):
            place = row, slice(end, end := end + missing * shape.tokens_per_tile)
            input_ids[place], segment_ids[place] = shape.image_token_id, len(pieces)
            pixels.append(np.zeros((missing, shape.side, shape.side, 3), np.uint8))
            blank_tokens += missing * shape.tokens_per_tile
        segment_ids[row, end:] = len(pieces) + 1
    sample_tokens = int(is_real.sum())
    fill = Fill(
        sum(map(len, bins)), sample_tokens, blank_tokens, input_ids.size - sample_tokens - blank_tokens, num_unfit
    )
    return PackedBatch(
        torch.from_numpy(input_ids),
        torch.from_numpy(loss_mask),
        torch.from_numpy(np.concatenate(pixels)) if pixels else None,
        num_unfit,
        torch.from_numpy(segment_ids),
        torch.from_numpy(is_real),
        shape.rows * shape.segments,
        fill,
        state,
    )


def _check(piece: Piece, shape: RowShape) -> None:
    tokens, needed = int((piece.input_ids == shape.image_token_id).sum()), piece.num_tiles * shape.tokens_per_tile
    if tokens != needed:
        raise ValueError(f"a sample holds {tokens} image tokens, but its {piece.num_tiles} tiles make {needed}")


class Pieces:
    """Numbered samples as pieces, for `Packer`: pictures and text of one mixture in one stream.

    Args:
        sample: of a `Mixture`, say: (index, attempt) to sample.
        rows: what makes rows, by kind; their `seqlen` is the longest sample there may be.
    """

    def __init__(self, sample: Callable[[int, int], Sample], rows: Mapping[RowKind, Rows]) -> None:
        self.sample = sample
        self.rows = dict(rows)

    def __call__(self, index: int) -> Piece | None:
        """The sample, or another draw of it if it is too long; None if none of several fits."""
        for attempt in range(_ATTEMPTS):
            sample = self.sample(index, attempt)
            row = self.rows["text" if sample.image is None else "image"].row(sample)
            if row is not None:
                return Piece.of(row)
        return None


class Packer:
    """Batches of packed rows from numbered samples.

    Args:
        fetch: sample number to piece, or None for a number to pass over; the same for the same number.
        shape: of the rows.
        patience: samples that may find no room before a batch is done; with more less is wasted and more is looked at
            again.
        state: where to go on.
    Raises: ValueError (from `batch`) if a hundred samples one after the other would not even fit an empty row.
    """

    def __init__(
        self,
        fetch: Callable[[int], Piece | None],
        shape: RowShape,
        *,
        patience: int = 16,
        state: PackerState = PackerState(),  # noqa: B008 (immutable)
    ) -> None:
        if patience < 1:
            raise ValueError(f"patience={patience} must be 1 or more")
        self.fetch = fetch
        self.shape = shape
        self.patience = patience
        self.state = PackerState(state.next_index, tuple(state.held))
        self._waiting: dict[int, Piece] = {}

    def batch(self) -> PackedBatch:
        """The next batch; moves `state` on."""
        bins = [_Bin(self.shape) for _ in range(self.shape.rows)]
        held: list[int] = []
        num_unfit = unfit_run = 0
        next_index = self.state.next_index
        coming = iter(self.state.held)
        while len(held) < self.patience:
            index = next(coming, None)
            if index is None:
                index, next_index = next_index, next_index + 1
            piece = self._waiting.pop(index, None) or self.fetch(index)
            room = None if piece is None else next((b for b in bins if b.takes(piece)), None)
            if piece is not None and room is not None:
                room.add(piece)
            elif piece is not None and _Bin(self.shape).takes(piece):
                held.append(index)
                self._waiting[index] = piece
            else:
                num_unfit, unfit_run = num_unfit + 1, unfit_run + 1
                if unfit_run >= _MOST_UNFIT:
                    raise ValueError(
                        f"{unfit_run} samples one after the other are missing or do not fit a row of "
                        f"seqlen={self.shape.seqlen} and tiles={self.shape.tiles}; make the rows longer"
                    )
                continue
            unfit_run = 0
        self.state = PackerState(next_index, (*held, *coming))
        return pack([b.pieces for b in bins], self.shape, self.state, num_unfit)
