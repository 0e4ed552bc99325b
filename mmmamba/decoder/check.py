"""Whether fused decoding agrees with the plain path on this card, a few layers at a time.

Rounding alone can drive two correct ways of computing a deep network apart (with random weights of full depth by all of
their size, in bfloat16), so agreement of the last logits would say little. A window of few layers leaves rounding where
it is, and the windows together hold every layer. The norm behind a state also blows up what nearly cancels, above all
after one or two tokens; so the middle one of several tokens counts, which a wrong kernel puts off like the others.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from mmmamba.config import StackConfig
from mmmamba.decoder.fused import FusedDecoder
from mmmamba.model import DecoderStack, MMMamba

Config = TypeVar("Config", bound=StackConfig)

WINDOW = 2  # layers of each stack
SKIPPED_TOKENS = 2
CHECKED_TOKENS = 5


@torch.inference_mode()
def disagreement(model: MMMamba, *, overlap: bool, one_launch: int = 0) -> float:
    """Relative RMS difference of logits between the two paths: the largest over windows of layers of the median over a
    few tokens; NaN if any logit is.

    Args: one_launch: so many rows (a whole workspace) in one launch a token, in place of one row in many.
    Raises: Unsupported if the kernels cannot run this model.
    """
    found = []
    for window in windows(model):
        decoder = FusedDecoder(window, overlap=overlap, one_launch=(one_launch,) if one_launch else ())
        found.append(list(_errors(window, decoder, one_launch or 1)))
    return float(torch.stack([torch.stack(errors).median() for errors in found]).max())


def _errors(model: MMMamba, decoder: FusedDecoder, rows: int) -> Iterator[Tensor]:
    mine, plain = model.new_state(rows), model.new_state(rows)
    image_id = model.config.embedding.img_context_token_id
    count = SKIPPED_TOKENS + CHECKED_TOKENS
    tokens = [token for token in range(count + rows) if token != image_id]  # each row a token ahead of the one before
    for i in range(count):
        ids = torch.tensor(tokens[i : i + rows], device=model.device)
        want = model(ids[:, None], None, plain)[:, -1].float()
        got = decoder.decode_one_token(ids, mine, graph=False).float()
        if i >= SKIPPED_TOKENS:
            yield ((got - want).square().mean() / want.square().mean()).sqrt()


def windows(model: MMMamba) -> Iterator[MMMamba]:
    """Models of `WINDOW` layers a stack that share this one's weights; every layer is in one of them at least."""
    counts = [len(stack.layers) for stack in (model.embedding, model.language)]
    for i in range(max(-(-count // WINDOW) for count in counts)):
        # The shorter stack begins again when it is through.
        starts = [WINDOW * (i % -(-count // WINDOW)) for count in counts]
        yield excerpt(model, *(range(start, min(start + WINDOW, n)) for start, n in zip(starts, counts, strict=True)))


def excerpt(model: MMMamba, embedding: range, language: range) -> MMMamba:
    """The model with some layers only, their weights shared."""
    view = copy.copy(model)
    view.config = replace(
        model.config,
        embedding=_with_layers(model.config.embedding, embedding),
        language=_with_layers(model.config.language, language),
    )
    view._modules = dict(model._modules) | {
        "embedding": _excerpt(model.embedding, embedding, view.config.embedding),
        "language": _excerpt(model.language, language, view.config.language),
    }
    return view


def _with_layers(config: Config, layers: range) -> Config:
    return replace(config, num_hidden_layers=len(layers), layer_types=tuple(config.layer_types[i] for i in layers))


def _excerpt(stack: DecoderStack, layers: range, config: StackConfig) -> DecoderStack:
    view = copy.copy(stack)
    view._modules = dict(stack._modules) | {"layers": nn.ModuleList(stack.layers[i] for i in layers)}
    view.needs_rope = "mha" in config.layer_types
    return view
