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
    # All tensors of a format at once: groups know nothing of the tensor they are in, and hundreds of small launches
    # would take longer than the work.
    formats: dict[tuple[int, int], list[Tensor]] = {}
    for name, parameter in parameters.items():
        if spec := storage_spec(name, parameter):
            formats.setdefault((spec.bits, spec.group_size), []).append(parameter)
    for (bits, group_size), members in formats.items():
        groups = torch.cat([p.reshape(-1, group_size) for p in members])
        values = rounded(groups, PackedSpec(bits, group_size, tuple(groups.shape)))
        parts = values.split([p.numel() // group_size for p in members])
        torch._foreach_copy_(members, [part.view_as(p) for part, p in zip(parts, members, strict=True)])


@contextmanager
def rounded_weights(parameters: dict[str, nn.Parameter]) -> Iterator[None]:
    """Inside, the parameters hold their rounded values; gradients gathered there apply to the full ones after it."""
    stored = {name: p for name, p in parameters.items() if storage_spec(name, p)}
    full = [p.detach().clone() for p in stored.values()]
    round_(stored)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(stored.values(), full, strict=True):
                parameter.copy_(value)
