"""Activation checkpointing, a block at a time: its input is kept, the rest is computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmmamba.model import Block


def recompute_blocks_(networks: Iterable[nn.Module]) -> None:
    """Let every block of the networks keep only its input, where gradients are taken through it; in place."""
    for network in networks:
        for module in network.modules():
            if isinstance(module, Block) and "forward" not in vars(module):
                learns = any(p.requires_grad for p in module.parameters())
                module.forward = partial(_run, module.forward, learns)  # type: ignore[method-assign]


def _run(forward: Any, learns: bool, x: Tensor, *args: Any, **others: Any) -> Tensor:
    # Where there is no gradient there is nothing to compute again, and torch 2.13 refuses to compile it so.
    if not torch.is_grad_enabled() or not (learns or x.requires_grad):
        return forward(x, *args, **others)
    # There is nothing random in a block, and a captured graph may not look at the generator's state.
    return checkpoint(forward, x, *args, use_reentrant=False, preserve_rng_state=False, **others)
