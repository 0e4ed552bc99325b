"""What a training step needs of a batch, as tensors of fixed shape: computed on the CPU, sent without waiting.

Fixed shapes and no look at values on the device are what lets a whole step be captured as one CUDA graph.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from distill.data.batches import Batch, pixel_values
from mmmamba.config import ModelConfig
from mmmamba.model import MMMamba, TokenLayout, token_layout


class Inputs(NamedTuple):
    """One batch for a stage.

    layout: where its tokens lie in the embedding stack.   shape: (batch, seqlen) of the language model.
    pixels: uint8 (batch, side, side, 3), or None.
    positions, targets: (slots,) flat positions whose next token is learned, and those tokens.
    weights: (slots,) 1 for a token, 0 for an empty slot.
    """

    layout: TokenLayout
    shape: tuple[int, int]
    pixels: Tensor | None
    positions: Tensor
    targets: Tensor
    weights: Tensor

    @property
    def is_image(self) -> bool:
        return self.pixels is not None

    def tensors(self) -> list[Tensor]:
        """Every tensor, in a fixed order."""
        pixels = [] if self.pixels is None else [self.pixels]
        return [*self.layout, *pixels, self.positions, self.targets, self.weights]

    def to(self, device: torch.device) -> Inputs:
        """A copy on the device, not waited for."""
        move = [t.to(device, non_blocking=True) for t in self.tensors()]
        layout = TokenLayout(*move[: len(self.layout)])
        pixels = None if self.pixels is None else move[len(self.layout)]
        return Inputs(layout, self.shape, pixels, *move[-3:])

    def copy_(self, other: Inputs) -> None:
        """Take over the values of another batch of the same shapes.  Raises: ValueError if shapes differ."""
        for mine, new in zip(self.tensors(), other.tensors(), strict=True):
            if mine.shape != new.shape:
                raise ValueError(f"a batch has a tensor of shape {tuple(new.shape)}, the first had {tuple(mine.shape)}")
            mine.copy_(new, non_blocking=True)


def prepare(batch: Batch, config: ModelConfig, answer_tokens: int | None = None) -> Inputs:
    """Lay a batch out on the CPU.

    Args:
        answer_tokens: slots a row (on average over the batch) for learned tokens: what is over is dropped from the end,
            what is missing has weight 0. None: as many as there are.
    """
    seqlen = batch.input_ids.shape[1]
    rows, columns = batch.loss_mask[:, 1:].nonzero(as_tuple=True)
    positions, targets = rows * seqlen + columns, batch.input_ids[rows, columns + 1]
    weights = torch.ones(len(positions))
    if answer_tokens is not None:
        slots = answer_tokens * len(batch.input_ids)
        fill = max(0, slots - len(positions))
        positions, targets, weights = (torch.cat([t[:slots], t.new_zeros(fill)]) for t in (positions, targets, weights))
    embedding = config.embedding
    layout = token_layout(batch.input_ids, embedding.img_context_token_id, embedding.stack_tokens_per_image_token)
    inputs = Inputs(layout, (len(batch.input_ids), seqlen), batch.pixels, positions, targets, weights)
    if torch.cuda.is_available():
        layout = TokenLayout(*(t.pin_memory() for t in inputs.layout))
        inputs = inputs._replace(
            layout=layout, positions=positions.pin_memory(), targets=targets.pin_memory(), weights=weights.pin_memory()
        )
    return inputs


def hidden_states(model: MMMamba, inputs: Inputs) -> Tensor:
    """Hidden states before the output head, (batch, seqlen, hidden_size)."""
    pixels = None if inputs.pixels is None else pixel_values(inputs.pixels)
    return model.language(model.embedding.embed_layout(inputs.layout, inputs.shape, pixels))


def answer_hidden(model: MMMamba, inputs: Inputs) -> Tensor:
    """Hidden states at the positions that are learned, (slots, hidden_size)."""
    return hidden_states(model, inputs).flatten(0, 1).index_select(0, inputs.positions)


def weighted_mean(values: Tensor, inputs: Inputs) -> Tensor:
    """Mean over the filled slots of (slots,) values."""
    return (values * inputs.weights).sum() / inputs.weights.sum()
