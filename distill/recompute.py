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
                module.forward = partial(_run, module.forward)  # type: ignore[method-assign]


def _run(forward: Any, *args: Any, **others: Any) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(*args, **others)
    # There is nothing random in a block, and a captured graph may not look at the generator's state.
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **others)
