"""Stored form of compressed weights: integers of 4, 6 or 8 bits in groups along the input dimension, with a scale and
an offset a group. Loading turns them back into plain tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

BITS = (4, 6, 8)


@dataclass(frozen=True)
class PackedSpec:
    """How one tensor is stored: weight = scale * q + zero per group of `group_size` neighbours in a row."""

    bits: int
    group_size: int
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"bits={self.bits} is not supported; use one of {BITS}")
        if self.shape[-1] % self.group_size or self.group_size % 4:
            raise ValueError(
                f"group_size={self.group_size} does not divide rows of {self.shape[-1]} (or is no multiple of 4); "
                "use 32 or 64, or store the tensor whole"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of integers, scales and offsets."""
        numel = math.prod(self.shape)
        return numel * self.bits // 8 + 4 * (numel // self.group_size)


class PackedWeight(NamedTuple):
    """A weight as it is stored: qweight uint8 flat, scales and zeros float16, one a group."""

    qweight: Tensor
    scales: Tensor
    zeros: Tensor
    spec: PackedSpec

    def rows(self, start: int, stop: int) -> PackedWeight:
        """Rows `start` to `stop` of a matrix, sharing memory. (6 bits: whole bytes hold 4 columns, as rows do.)"""
        spec = PackedSpec(self.spec.bits, self.spec.group_size, (stop - start, self.spec.shape[1]))
        qweight, scales, zeros = (t.view(self.spec.shape[0], -1)[start:stop].flatten() for t in self[:3])
        return PackedWeight(qweight, scales, zeros, spec)

    def unpack(self, dtype: torch.dtype) -> Tensor:
        return unpack(self.qweight, self.scales, self.zeros, self.spec, dtype)


def split_groups(weight: PackedWeight, group_size: int) -> PackedWeight:
    """The same values in smaller groups, for kernels that take some sizes only: each scale and offset is repeated.

    Raises: ValueError if the groups do not divide into such.
    """
    times, rest = divmod(weight.spec.group_size, group_size)
    if rest:
        raise ValueError(f"groups of {weight.spec.group_size} do not divide into groups of {group_size}")
    spec = PackedSpec(weight.spec.bits, group_size, weight.spec.shape)
    scales, zeros = (t.repeat_interleave(times) for t in (weight.scales, weight.zeros))
    return PackedWeight(weight.qweight, scales, zeros, spec)


def pack_bits(q: Tensor, bits: int) -> Tensor:
    """Integers 0 .. 2**bits - 1, uint8 with a multiple of 4 elements, to the bytes that hold them, flat."""
    q = q.flatten()
    if bits == 8:
        return q
    if bits == 4:
        return q[0::2] | (q[1::2] << 4)
    a, b, c, d = (q[i::4] for i in range(4))  # 6 bits: 4 numbers in 3 bytes
    return torch.stack([a | (b << 6), (b >> 2) | (c << 4), (c >> 4) | (d << 2)], dim=1).flatten()


def unpack_bits(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_bits`: uint8, flat."""
    if bits == 8:
        return packed
    if bits == 4:
        return torch.stack([packed & 15, packed >> 4], dim=1).flatten()
    x, y, z = packed.view(-1, 3).unbind(1)
    return torch.stack([x & 63, (x >> 6) | ((y & 15) << 2), (y >> 4) | ((z & 3) << 4), z >> 2], dim=1).flatten()


def quantize(weight: Tensor, spec: PackedSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Round to the nearest of 2**bits levels between a group's smallest and largest weight.

    Returns: q uint8 (groups, group_size), scales and zeros (groups,) float16. Rounding twice is rounding once.
    """
    groups = weight.detach().float().reshape(-1, spec.group_size)
    low, high = groups.aminmax(dim=1)
    zeros = low.half()
    scales = ((high - zeros.float()) / (2**spec.bits - 1)).half()
    step = torch.where(scales > 0, scales, 1).float()
    q = ((groups - zeros.float()[:, None]) / step[:, None]).round_().clamp_(0, 2**spec.bits - 1)
    return q.to(torch.uint8), scales, zeros


def dequantize(q: Tensor, scales: Tensor, zeros: Tensor, spec: PackedSpec, dtype: torch.dtype) -> Tensor:
    """The weight, `spec.shape` in `dtype`, of integers q (groups, group_size)."""
    wide = torch.promote_types(dtype, torch.float32)
    weight = torch.addcmul(zeros.to(wide)[:, None], q.to(wide), scales.to(wide)[:, None])
    return weight.view(spec.shape).to(dtype)


def pack(weight: Tensor, spec: PackedSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Stored form of a weight: qweight (bytes), scales, zeros."""
    q, scales, zeros = quantize(weight, spec)
    return pack_bits(q, spec.bits), scales, zeros


def unpack(qweight: Tensor, scales: Tensor, zeros: Tensor, spec: PackedSpec, dtype: torch.dtype) -> Tensor:
    """The inverse of `pack`, up to rounding."""
    return dequantize(unpack_bits(qweight, spec.bits).view(-1, spec.group_size), scales, zeros, spec, dtype)
