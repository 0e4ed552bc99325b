"""Samples to rows of fixed length, and rows to batches: the shapes that the training loops see.

Two kinds of rows: `image` (mostly one tile, so `tokens_per_tile` image tokens and some 90 of text) and `text` (no
picture). Fixed lengths keep compiled graphs and tuned kernels few.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from distill.data.sample import IMAGE_TAG, Sample, Spelled
from mmmamba.config import ModelConfig
from mmmamba.image import IMAGENET_MEAN, IMAGENET_STD, MOST_TILES, cut_tiles
from mmmamba.prompt import TURN_END, Turn, conversation_ids
from mmmamba.tokenizer import Tokenizer

RowKind = Literal["image", "text"]
DEFAULT_SEQLEN: dict[RowKind, int] = {"image": 160, "text": 256}
_CHARS_PER_TOKEN = 3  # of questions and short answers
_LABEL_TOKENS = 8  # around an image


class Batch(NamedTuple):
    """Rows of one kind.

    input_ids: (batch, seqlen), int64, padded on the right.
    loss_mask: (batch, seqlen), bool: True at the tokens to be learned, which are the answers with the `<|im_end|>` that
        closes each. The logits that predict them stand one position to the left.
    pixels: (tiles of all rows, tile, tile, 3), uint8, in order; None for text. See `pixel_values`.
    num_skipped: samples that were passed over because not even their first turn fits.
    """

    input_ids: Tensor
    loss_mask: Tensor
    pixels: Tensor | None
    num_skipped: int


@dataclass(frozen=True)
class Row:
    """input_ids: (seqlen,), int64. loss_mask: (seqlen,), bool. pixels: (num_tiles, tile, tile, 3), uint8; or None."""

    input_ids: np.ndarray
    loss_mask: np.ndarray
    pixels: np.ndarray | None


class Rows:
    """Makes rows of one kind and length.

    Args:
        tokenizer, config: of the model that is trained.
        seqlen: tokens a row as the language model counts them; 160 for images and 256 for text unless given.
        num_images: images a row of kind "image": as many in every row, since a batch cannot mix. None: any number, to
            be packed.
        max_tiles: tiles that an image may be cut into, thumbnail apart, as `mmmamba.image.cut_tiles` does it; above 1
            rows differ in tiles, so that they can only be packed.
        text_tokens: tokens of a row that belong to no image, at most; None: only `seqlen` counts.
    Raises: ValueError for an unknown kind, a number of images or tiles below 1, or a length that leaves no room for
        text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        config: ModelConfig,
        kind: RowKind = "image",
        *,
        seqlen: int | None = None,
        num_images: int | None = 1,
        max_tiles: int = 1,
        text_tokens: int | None = None,
    ) -> None:
        if kind not in DEFAULT_SEQLEN:
            raise ValueError(f'rows of kind "{kind}" are not known; use "image" or "text"')
        self.tokenizer = tokenizer
        self.config = config
        self.kind = kind
        self.seqlen = DEFAULT_SEQLEN[kind] if seqlen is None else seqlen
        if num_images is not None and num_images < 1:
            raise ValueError(f'num_images={num_images} is below 1; for rows without images use kind "text"')
        if not 1 <= max_tiles <= MOST_TILES:
            raise ValueError(f"max_tiles={max_tiles}; use 1 to {MOST_TILES}")
        self.num_images = num_images if kind == "image" else 0
        self.max_tiles = max_tiles
        self.text_tokens = text_tokens
        images = 1 if self.num_images is None else self.num_images
        shortest, _ = conversation_ids(tokenizer, config, [Turn("?", "!", (1,) * images)])
        if self._room(images) < len(shortest):
            beside = "" if text_tokens is None else f" and text_tokens={text_tokens}"
            raise ValueError(
                f"seqlen={self.seqlen}{beside} holds no turn; the shortest {kind} row takes {len(shortest)} tokens, "
                f"{images * config.tokens_per_tile} of them of images"
            )
        # Never read by an earlier position and never learned, so any id would do.
        self.pad_id = tokenizer.token_id(TURN_END)

    @property
    def chars_per_image(self) -> int:
        """Characters of text that about fit beside each image of a row."""
        images = self.num_images or 1
        return _CHARS_PER_TOKEN * (self.seqlen // images - self.config.tokens_per_tile - _LABEL_TOKENS)

    def row(self, sample: Sample) -> Row | None:
        """The sample with as many whole turns as fit; None if the first does not, or if it leaves another number of
        images than the rows have.

        Raises: ValueError if the sample has an image and the rows are text, or the other way round.
        """
        if (sample.image is None) != (self.kind == "text"):
            has = "no image" if sample.image is None else "an image"
            raise ValueError(
                f"a sample of {sample.task} has {has}, which does not fit {self.kind} rows; mix its source elsewhere"
            )
        if self.num_images is not None and len(sample.images) != self.num_images:
            return None
        tiles = [cut_tiles(image, self.config, max_tiles=self.max_tiles) for image in sample.images]
        turns = _turns(sample, [len(of_one) for of_one in tiles])
        ids, mask = conversation_ids(self.tokenizer, self.config, turns, system=sample.system)
        # A conversation cut after the `<|im_end|>` of a reply is the shorter conversation.
        learned = np.array(mask)
        ends = np.flatnonzero(learned & ~np.append(learned[1:], False)) + 1
        fitting = ends[ends <= self._room(sum(map(len, tiles)))]
        if not len(fitting):
            return None
        if sum(len(turn.image_tiles) for turn in turns[: len(fitting)]) < len(tiles):
            return None
        length = int(fitting[-1])
        input_ids = np.full(self.seqlen, self.pad_id, np.int64)
        input_ids[:length] = ids[:length]
        loss_mask = np.zeros(self.seqlen, bool)
        loss_mask[:length] = learned[:length]
        return Row(input_ids, loss_mask, np.concatenate(tiles) if tiles else None)

    def _room(self, num_tiles: int) -> int:
        """Tokens that a row with so many tiles may have."""
        if self.text_tokens is None:
            return self.seqlen
        return min(self.seqlen, self.text_tokens + num_tiles * self.config.tokens_per_tile)


def _turns(sample: Sample, num_tiles: Sequence[int]) -> list[Turn]:
    """The turns as the prompt takes them, with the images where they stand; `num_tiles` of each image."""
    left = iter(num_tiles)
    if not sample.placed:
        new_images = sample.new_images or (len(sample.images), *[0] * (len(sample.turns) - 1))
        return [
            Turn(question, answer, tuple(itertools.islice(left, count)), spelled=isinstance(answer, Spelled))
            for (question, answer), count in zip(sample.turns, new_images, strict=True)
        ]
    turns = []
    for question, answer in sample.turns:
        pieces = question.split(IMAGE_TAG)
        places = tuple(itertools.accumulate(len(piece) for piece in pieces[:-1]))
        of_turn = tuple(itertools.islice(left, len(places)))
        turns.append(Turn("".join(pieces), answer, of_turn, places, isinstance(answer, Spelled)))
    return turns


def stack(rows: Sequence[Row], num_skipped: int = 0) -> Batch:
    """One batch of rows of the same kind and length."""
    pictures = [row.pixels for row in rows if row.pixels is not None]
    return Batch(
        torch.from_numpy(np.stack([row.input_ids for row in rows])),
        torch.from_numpy(np.stack([row.loss_mask for row in rows])),
        torch.from_numpy(np.concatenate(pictures)) if pictures else None,
        num_skipped,
    )


def pixel_values(pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """(tiles, tile, tile, 3) uint8 to (tiles, 3, tile, tile) ImageNet-normalised, as the model takes it; same device.

    Equal to `mmmamba.image.tile_image` of the same pictures at one tile each.
    """
    # Filled on the device: a captured graph may not copy from the host.
    mean, std = (
        torch.stack([torch.full((), v, device=pixels.device) for v in values])
        for values in (IMAGENET_MEAN, IMAGENET_STD)
    )
    return ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2).to(dtype).contiguous()
