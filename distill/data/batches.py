"""Samples to rows of fixed length, and rows to batches: the shapes that the training loops see.

Two kinds of rows: `image` (one tile, so `tokens_per_tile` image tokens and some 90 of text) and `text` (no picture).
Fixed lengths keep compiled graphs and tuned kernels few.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from distill.data.photos import squash
from distill.data.sample import Sample
from mmmamba.config import ModelConfig
from mmmamba.image import IMAGENET_MEAN, IMAGENET_STD
from mmmamba.prompt import TURN_END, Turn, conversation_ids
from mmmamba.tokenizer import Tokenizer

RowKind = Literal["image", "text"]
DEFAULT_SEQLEN: dict[RowKind, int] = {"image": 160, "text": 256}


class Batch(NamedTuple):
    """Rows of one kind.

    input_ids: (batch, seqlen), int64, padded on the right.
    loss_mask: (batch, seqlen), bool: True at the tokens to be learned, which are the answers with the `<|im_end|>` that
        closes each. The logits that predict them stand one position to the left.
    pixels: (batch, tile, tile, 3), uint8, one tile a row in order; None for text. See `pixel_values`.
    num_skipped: samples that were passed over because not even their first turn fits.
    """

    input_ids: Tensor
    loss_mask: Tensor
    pixels: Tensor | None
    num_skipped: int


@dataclass(frozen=True)
class Row:
    """input_ids: (seqlen,), int64.  loss_mask: (seqlen,), bool.  pixels: (tile, tile, 3), uint8, or None."""

    input_ids: np.ndarray
    loss_mask: np.ndarray
    pixels: np.ndarray | None


class Rows:
    """Makes rows of one kind and length.

    Args:
        tokenizer, config: of the model that is trained.
        seqlen: tokens a row as the language model counts them; 160 for images and 256 for text unless given.
    Raises: ValueError for an unknown kind, or a length that leaves no room for text.
    """

    def __init__(
        self, tokenizer: Tokenizer, config: ModelConfig, kind: RowKind = "image", *, seqlen: int | None = None
    ) -> None:
        if kind not in DEFAULT_SEQLEN:
            raise ValueError(f'rows of kind "{kind}" are not known; use "image" or "text"')
        self.tokenizer = tokenizer
        self.config = config
        self.kind = kind
        self.seqlen = DEFAULT_SEQLEN[kind] if seqlen is None else seqlen
        self.image_tiles = (1,) if kind == "image" else ()
        shortest, _ = conversation_ids(tokenizer, config, [Turn("?", "!", self.image_tiles)])
        if self.seqlen < len(shortest):
            raise ValueError(
                f"seqlen={self.seqlen} holds no turn; the shortest {kind} row takes {len(shortest)} tokens"
            )
        # Never read by an earlier position and never learned, so any id would do.
        self.pad_id = tokenizer.token_id(TURN_END)

    def row(self, sample: Sample) -> Row | None:
        """The sample with as many whole turns as fit, or None if the first does not.

        Raises: ValueError if the sample has an image and the rows are text, or the other way round.
        """
        if (sample.image is None) != (self.kind == "text"):
            has = "no image" if sample.image is None else "an image"
            raise ValueError(
                f"a sample of {sample.task} has {has}, which does not fit {self.kind} rows; mix its source elsewhere"
            )
        first, *others = sample.turns
        turns = [Turn(*first, self.image_tiles), *(Turn(*turn) for turn in others)]
        ids, mask = conversation_ids(self.tokenizer, self.config, turns)
        # A conversation cut after the `<|im_end|>` of a reply is the shorter conversation.
        learned = np.array(mask)
        ends = np.flatnonzero(learned & ~np.append(learned[1:], False)) + 1
        fitting = ends[ends <= self.seqlen]
        if not len(fitting):
            return None
        length = int(fitting[-1])
        input_ids = np.full(self.seqlen, self.pad_id, np.int64)
        input_ids[:length] = ids[:length]
        loss_mask = np.zeros(self.seqlen, bool)
        loss_mask[:length] = learned[:length]
        pixels = None if sample.image is None else np.asarray(squash(sample.image, self.config.image_size))
        return Row(input_ids, loss_mask, pixels)


def stack(rows: Sequence[Row], num_skipped: int = 0) -> Batch:
    """One batch of rows of the same kind and length."""
    pictures = [row.pixels for row in rows if row.pixels is not None]
    return Batch(
        torch.from_numpy(np.stack([row.input_ids for row in rows])),
        torch.from_numpy(np.stack([row.loss_mask for row in rows])),
        torch.from_numpy(np.stack(pictures)) if pictures else None,
        num_skipped,
    )


def pixel_values(pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """(batch, tile, tile, 3) uint8 to (batch, 3, tile, tile) ImageNet-normalised, as the model takes it; same device.

    Equal to `mmmamba.image.tile_image` of the same pictures at one tile each.
    """
    # Filled on the device: a captured graph may not copy from the host.
    mean, std = (
        torch.stack([torch.full((), v, device=pixels.device) for v in values])
        for values in (IMAGENET_MEAN, IMAGENET_STD)
    )
    return ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2).to(dtype).contiguous()
