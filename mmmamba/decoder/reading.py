"""Prompts of a few thousand tokens read by replaying a CUDA graph: launched one by one, their kernels take longer to
start than to run.

A graph has fixed shapes. Text is padded to the next power of two; padding moves no state (`segments.Padding`), and the
logits are taken where the prompt ends. For models without attention: a cache of keys has no fixed place.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmmamba.model import MMMamba, TokenLayout, token_layout
from mmmamba.segments import Padding
from mmmamba.state import DecodeState

MIN_TEXT = 32  # tokens of text that the smallest graph has
MAX_TOKENS = 4096  # in the embedding stack: more keep the card busy without a graph
MAX_GRAPHS = 8

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shape:
    """Rows, tiles a row, their side in pixels (0 without tiles), and tokens of text a row, padding included."""

    batch: int
    tiles: int
    side: int
    text: int


class PromptReader:
    """Graphs of one model by shape, the latest used kept; their memory is shared, as one runs at a time."""

    def __init__(self) -> None:
        self._graphs: OrderedDict[Shape, _Reading] = OrderedDict()
        self._pool: Any = None
        self._failed = False

    def shape_of(
        self, model: MMMamba, input_ids: Tensor, pixel_values: Tensor | None, state: DecodeState
    ) -> Shape | None:
        """The graph that would read this prompt, or None where it has to be read without one."""
        if self._failed or input_ids.ndim != 2 or state.pending.shape[1]:
            return None
        if any(t != "mamba2" for stack in model.config.stacks for t in stack.layer_types):
            return None
        pending = state.pending
        if (state.fingerprint, pending.device, pending.dtype) != (
            model.config.fingerprint(),
            model.device,
            model.dtype,
        ):
            return None
        batch, seqlen = input_ids.shape
        config = model.config.embedding
        tiles = side = 0
        if pixel_values is not None:
            tiles, rest = divmod(len(pixel_values), batch)
            side = pixel_values.shape[-1]
            if rest or pixel_values.shape[1:] != (config.num_channels, side, side) or side % (2 * config.patch_size):
                return None
        image = tiles * (side // (2 * config.patch_size)) ** 2
        if seqlen <= image or state.batch != batch:
            return None
        text = max(MIN_TEXT, 1 << (seqlen - image - 1).bit_length())
        if batch * (image * config.stack_tokens_per_image_token + text) > MAX_TOKENS:
            return None
        if bool(((input_ids == config.img_context_token_id).sum(dim=1) != image).any()):
            return None
        return Shape(batch, tiles, side, text)

    def read(
        self, model: MMMamba, input_ids: Tensor, pixel_values: Tensor | None, state: DecodeState, shape: Shape
    ) -> Tensor | None:
        """Advance `state` by a prompt of this shape; logits of its last position (batch, vocab_size), or None if no
        graph could be made (the state is as it was then)."""
        reading = self._graphs.pop(shape, None)
        try:
            if reading is None:
                reading = self._capture(model, input_ids, pixel_values, shape)
            logits = reading.read(model, input_ids, pixel_values, state)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            # What a card has no memory for, or a driver cannot capture, is read kernel by kernel.
            log.warning("prompts are read without CUDA graphs: %s: %s", type(error).__name__, error)
            self._failed = True
            self._graphs.clear()
            return None
        self._graphs[shape] = reading
        if len(self._graphs) > MAX_GRAPHS:
            self._graphs.popitem(last=False)
        return logits

    def _capture(self, model: MMMamba, input_ids: Tensor, pixel_values: Tensor | None, shape: Shape) -> _Reading:
        if self._pool is None and model.device.type == "cuda":
            self._pool = torch.cuda.graph_pool_handle()
        return _Reading(model, input_ids, pixel_values, shape, self._pool)


class _Reading:
    """A captured forward pass with its inputs, state and logits at fixed addresses; off CUDA it just runs."""

    def __init__(self, model: MMMamba, input_ids: Tensor, pixel_values: Tensor | None, shape: Shape, pool: Any) -> None:
        self.shape = shape
        config = model.config.embedding
        self._config = config
        self._per_tile = (shape.side // (2 * config.patch_size)) ** 2
        self._seqlen = shape.tiles * self._per_tile + shape.text
        device = model.device
        self._last = torch.zeros(shape.batch, dtype=torch.int64, device=device)
        self._state = model.new_state(shape.batch)
        whole = self._counts(self._seqlen)
        self._paddings = [Padding.of([count] * shape.batch, device) for count in whole]
        self._pixels = None if pixel_values is None else pixel_values.to(device, copy=True)
        layout = self._layout_of(input_ids)
        self._flat = torch.cat([t.flatten() for t in layout]).to(device)
        pieces = self._flat.split([t.numel() for t in layout])
        self._layout = TokenLayout(*(piece.view_as(t) for piece, t in zip(pieces, layout, strict=True)))
        self._set_lengths(input_ids.shape[1])
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits = self._run(model)  # compiles everything, and lets libraries allocate what they keep
        if device.type != "cuda":
            return
        torch.cuda.synchronize(device)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads (the page loads models in one) may allocate meanwhile.
        with torch.cuda.device(device), torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._logits = self._run(model)

    def _run(self, model: MMMamba) -> Tensor:
        shape = (self.shape.batch, self._seqlen)
        of_embedding, of_language = self._paddings
        x = model.embedding.embed_layout(self._layout, shape, self._pixels, self._state, padding=of_embedding)
        hidden = model.language(x, self._state, padding=of_language)
        return model.language.output(hidden.flatten(0, 1).index_select(0, self._last))

    def read(self, model: MMMamba, input_ids: Tensor, pixel_values: Tensor | None, state: DecodeState) -> Tensor:
        seqlen = input_ids.shape[1]
        flat = torch.cat([t.flatten() for t in self._layout_of(input_ids)])
        self._flat.copy_(flat.pin_memory() if self._graph else flat, non_blocking=True)
        if self._pixels is not None:
            assert pixel_values is not None, "the shape has tiles"
            self._pixels.copy_(pixel_values, non_blocking=True)
        self._set_lengths(seqlen)
        _copy_(self._state, state)
        if self._graph is None:
            self._logits = self._run(model)
        else:
            self._graph.replay()
        _copy_(state, self._state)
        for stack, count in zip(state.stacks, self._counts(seqlen), strict=True):
            stack.seqlen += count
        state.num_image_tokens += self.shape.tiles * self._per_tile
        return self._logits.clone()

    def _layout_of(self, input_ids: Tensor) -> TokenLayout:
        """How the padded prompt's tokens lie, worked out on the host."""
        image_id = self._config.img_context_token_id
        padding = 0 if image_id else 1  # any token that asks for no pixels
        ids = torch.full((self.shape.batch, self._seqlen), padding)
        ids[:, : input_ids.shape[1]] = input_ids
        return token_layout(ids, image_id, self._config.stack_tokens_per_image_token)

    def _counts(self, seqlen: int) -> tuple[int, int]:
        """Positions of a prompt of so many tokens in (embedding stack, language model)."""
        extra = self.shape.tiles * self._per_tile * (self._config.stack_tokens_per_image_token - 1)
        return seqlen + extra, seqlen

    def _set_lengths(self, seqlen: int) -> None:
        for padding, count in zip(self._paddings, self._counts(seqlen), strict=True):
            padding.lengths.fill_(count)
            padding.real[:, :count] = True
            padding.real[:, count:] = False
        torch.arange(seqlen - 1, self.shape.batch * self._seqlen, self._seqlen, out=self._last)


def _copy_(into: DecodeState, source: DecodeState) -> None:
    """The recurrent states of all layers, a launch or two for each kind."""
    for name in ("conv_state", "ssm_state"):
        torch._foreach_copy_(_all(into, name), _all(source, name))


def _all(state: DecodeState, name: str) -> list[Tensor]:
    return [layer.tensors()[name] for stack in state.stacks for layer in stack.layers]
