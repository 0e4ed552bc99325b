"""What a training step needs of a batch, as tensors of fixed shape: computed on the CPU, sent without waiting.

Fixed shapes and no look at values on the device are what lets a whole step be captured as one CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from distill.data.batches import Batch, pixel_values
from distill.data.packing import PackedBatch
from mmmamba.config import ModelConfig
from mmmamba.model import MMMamba, TokenLayout, token_layout
from mmmamba.segments import Segments

_FEWEST_SLOTS = 32  # of borders


class Inputs(NamedTuple):
    """One batch for a stage.

    layout: where its tokens lie in the embedding stack.   shape: (batch, seqlen) of the language model.
    pixels: uint8 (num_tiles, side, side, 3), tiles of all samples in order, or None.
    segments: of packed rows, as the embedding stack and the language model count their tokens; None: a sample a row.
    real: 1 for a sample's token, 0 for padding and blank tiles, float, (batch, seqlen) of the embedding stack and of
        the language model; None if rows are not packed and no one asked for it.
    answers: (slots,) 1 where the next token is part of an answer; equal to `weights` unless all tokens count.
    positions, targets: (slots,) flat positions whose next token is learned, and those tokens.
    weights: (slots,) 1 for a token, 0 for an empty slot.
    """

    layout: TokenLayout
    shape: tuple[int, int]
    pixels: Tensor | None
    segments: tuple[Segments, Segments] | None
    real: tuple[Tensor, Tensor] | None
    answers: Tensor
    positions: Tensor
    targets: Tensor
    weights: Tensor

    @property
    def is_image(self) -> bool:
        return self.pixels is not None

    def tensors(self) -> list[Tensor]:
        """Every tensor, in a fixed order."""
        pixels = [] if self.pixels is None else [self.pixels]
        borders = [] if self.segments is None else [t for stack in self.segments for t in stack]
        borders += self.real or ()
        return [*self.layout, *pixels, *borders, self.answers, self.positions, self.targets, self.weights]

    def to(self, device: torch.device) -> Inputs:
        """A copy on the device, not waited for."""
        return self._map(lambda t: t.to(device, non_blocking=True))

    def pin_memory(self) -> Inputs:
        """A copy in page-locked memory, from which `to` need not wait."""
        return self._map(lambda t: t if t.is_pinned() else t.pin_memory())

    def copy_(self, other: Inputs) -> None:
        """Take over the values of another batch of the same shapes.  Raises: ValueError if shapes differ."""
        mine, others = self.tensors(), other.tensors()
        if len(mine) != len(others):
            raise ValueError(f"a batch has {len(others)} tensors, the first had {len(mine)}; keep to one kind of batch")
        for tensor, new in zip(mine, others, strict=True):
            if tensor.shape != new.shape:
                raise ValueError(
                    f"a batch has a tensor of shape {tuple(new.shape)}, the first had {tuple(tensor.shape)}"
                )
            tensor.copy_(new, non_blocking=True)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        segments = None
        if self.segments is not None:
            embedding, language = (Segments(*map(change, stack)) for stack in self.segments)
            segments = (embedding, language)
        return Inputs(
            layout=TokenLayout(*map(change, self.layout)),
            shape=self.shape,
            pixels=None if self.pixels is None else change(self.pixels),
            segments=segments,
            real=None if self.real is None else (change(self.real[0]), change(self.real[1])),
            answers=change(self.answers),
            positions=change(self.positions),
            targets=change(self.targets),
            weights=change(self.weights),
        )


def prepare(
    batch: Batch | PackedBatch,
    config: ModelConfig,
    answer_tokens: int | None = None,
    *,
    all_tokens: bool = False,
    mark_real: bool = False,
    fixed_shapes: bool = True,
) -> Inputs:
    """Lay a batch out on the CPU.

    Args:
        answer_tokens: slots a row (on average over the batch) for learned tokens: what is over is dropped from the end,
            what is missing has weight 0. None: as many as there are.
        all_tokens: a slot for every position, with weight 0 on padding alone.
        mark_real: say which positions are real where rows are not packed, too.
        fixed_shapes: the borders of packed rows have as many slots in every batch, as a captured step needs it.
            Without, their number is the next power of two: attention starts work on every slot, at a row's length.
    """
    rows, seqlen = batch.input_ids.shape
    packed = batch if isinstance(batch, PackedBatch) else None
    follows = torch.zeros(rows, seqlen, dtype=torch.bool)  # the next token is learned
    follows[:, :-1] = batch.loss_mask[:, 1:]
    if packed is not None:
        follows[:, :-1] &= packed.segment_ids[:, 1:] == packed.segment_ids[:, :-1]
    if all_tokens:
        positions = torch.arange(rows * seqlen)
        targets = batch.input_ids.roll(-1, dims=1).flatten()
        weights, answers = _is_real(batch).flatten().float(), follows.flatten().float()
    else:
        positions = follows.flatten().nonzero().squeeze(1)
        targets = batch.input_ids.flatten()[positions + 1]
        weights = torch.ones(len(positions))
        if answer_tokens is not None:
            slots = answer_tokens * rows
            fill = max(0, slots - len(positions))
            positions, targets, weights = (
                torch.cat([t[:slots], t.new_zeros(fill)]) for t in (positions, targets, weights)
            )
        answers = weights.clone()
    embedding = config.embedding
    repeat = embedding.stack_tokens_per_image_token
    layout = token_layout(batch.input_ids, embedding.img_context_token_id, repeat)
    segments = real_positions = None
    if packed is not None or mark_real:
        repeats = torch.where(batch.input_ids == embedding.img_context_token_id, repeat, 1).flatten()
        is_real = _is_real(batch).float()
        real_positions = (is_real.flatten().repeat_interleave(repeats).view(rows, -1), is_real)
    if packed is not None:
        stack_ids = packed.segment_ids.flatten().repeat_interleave(repeats).view(rows, -1)
        slots = packed.max_segments if fixed_shapes else _slots(packed.segment_ids)
        segments = Segments.of(stack_ids, slots), Segments.of(packed.segment_ids, slots)
    inputs = Inputs(
        layout, (rows, seqlen), batch.pixels, segments, real_positions, answers, positions, targets, weights
    )
    return inputs.pin_memory() if torch.cuda.is_available() else inputs


def _is_real(batch: Batch | PackedBatch) -> Tensor:
    """Which positions are no padding, (batch, seqlen): rows that are not packed end with their last learned token."""
    return batch.is_real if isinstance(batch, PackedBatch) else batch.loss_mask.flip(1).cumsum(1).flip(1) > 0


def _slots(segment_ids: Tensor) -> int:
    """Segments of packed rows, rounded up so that few numbers occur: each is a shape to compile for."""
    count = len(segment_ids) + int((segment_ids[:, 1:] != segment_ids[:, :-1]).sum())
    return max(_FEWEST_SLOTS, 1 << (count - 1).bit_length())


def hidden_states(model: MMMamba, inputs: Inputs) -> Tensor:
    """Hidden states before the output head, (batch, seqlen, hidden_size)."""
    pixels = None if inputs.pixels is None else pixel_values(inputs.pixels)
    of_embedding, of_language = (None, None) if inputs.segments is None else inputs.segments
    x = model.embedding.embed_layout(inputs.layout, inputs.shape, pixels, segments=of_embedding)
    return model.language(x, segments=of_language)


def answer_hidden(model: MMMamba, inputs: Inputs) -> Tensor:
    """Hidden states at the positions that are learned, (slots, hidden_size)."""
    return hidden_states(model, inputs).flatten(0, 1).index_select(0, inputs.positions)


def layer_outputs(model: MMMamba, inputs: Inputs) -> tuple[Tensor, list[list[Tensor]]]:
    """As `answer_hidden`, and what every layer leaves behind it: of the embedding stack and of the language model, each
    (batch, its seqlen, hidden_size)."""
    stacks = model.embedding, model.language
    for stack in stacks:
        stack.outputs = []
    try:
        hidden = answer_hidden(model, inputs)
        return hidden, [stack.outputs or [] for stack in stacks]
    finally:
        for stack in stacks:
            stack.outputs = None


def mean_weights(weights: Tensor) -> Tensor:
    """(slots,) weights that add up to 1, so that a sum by them is the mean over the filled slots."""
    return weights / weights.sum().clamp(min=1.0)
