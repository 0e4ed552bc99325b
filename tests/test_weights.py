"""Packed layers as the decoding kernels read them: the same numbers, in the memory that they lie in."""

from __future__ import annotations

import pytest
import torch

from mmmamba.kernels.weights import from_packed
from mmmamba.packing import PackedSpec, PackedWeight, pack


@pytest.mark.parametrize(
    ("bits", "group", "read"), [(4, 64, 64), (4, 96, 32), (4, 192, 192), (8, 192, 192), (8, 96, 32)]
)
def test_packed_weights_are_read_as_they_are(bits: int, group: int, read: int) -> None:
    """Groups that are no power of two, such as nano's 96, are read as smaller ones."""
    spec = PackedSpec(bits, group, (5, 192))
    packed = PackedWeight(*pack(torch.randn(5, 192), spec), spec)
    weight = from_packed(packed)
    assert weight.group_size == read
    assert weight.data.data_ptr() == packed.qweight.data_ptr()
    assert torch.allclose(weight.dequantize(), packed.unpack(torch.float32), atol=1e-6)
