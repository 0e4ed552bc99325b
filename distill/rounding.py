"""Training weights as they will be stored: forward and backward see rounded values, the optimizer the full ones.

The straight-through estimator (Bengio et al., arXiv:1308.3432): the model learns to live with the rounding of its own
checkpoint instead of meeting it afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mmmamba.packing import PackedSpec, dequantize, quantize

# Rows of a weight are rounded in groups, so a projection may be split by rows without changing anything.
SpecOf = dict[str, PackedSpec]


def storage_spec(name: str, tensor: Tensor) -> PackedSpec | None:
    """How nano stores a parameter of ours: 4 bits in the layers, 6 in the embedding table (it is the output head too),
    8 in the small projection behind pixel shuffle, everything else whole."""
    shape = tuple(tensor.shape)
    if tensor.ndim != 2:
        return None
    if name.endswith("embedding.text.weight"):
        return PackedSpec(6, 64, shape)
    if ".shuffle_proj." in name:
        return PackedSpec(8, 64, shape)
    if ".mlp." in name:
        return PackedSpec(4, 96, shape)
    if ".in_proj" in name or ".out_proj" in name:
        return PackedSpec(4, 64, shape)
    return None


def rounded(weight: Tensor, spec: PackedSpec) -> Tensor:
    """The weight as it comes back from storage."""
    return dequantize(*quantize(weight, spec), spec, weight.dtype)


@torch.no_grad()
def round_(parameters: dict[str, nn.Parameter]) -> None:
    """Replace every parameter that is stored rounded by its rounded value."""
    for name, parameter in parameters.items():
        if spec := storage_spec(name, parameter):
            parameter.copy_(rounded(parameter, spec))


@contextmanager
def rounded_weights(parameters: dict[str, nn.Parameter]) -> Iterator[None]:
    """Inside, the parameters hold their rounded values; gradients gathered there apply to the full ones after it."""
    stored = {name: p for name, p in parameters.items() if storage_spec(name, p)}
    with torch.no_grad():
        full = {name: p.clone() for name, p in stored.items()}
    round_(stored)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in stored.items():
                parameter.copy_(full[name])
