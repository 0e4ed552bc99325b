"""Weights to integers with a scale and an offset a group, and back; pure functions of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from mmmamba.packing import PackedSpec, PackedWeight, pack, pack_bits, unpack_bits

SHRINKS = (1.0, 0.9, 0.8, 0.7, 0.6)  # of a group's range, where the search begins
REFITS = 3
CHUNK_NUMEL = 2**20  # weights looked at at once: scratch of a few MiB stays in caches


def nearest(weight: Tensor, spec: PackedSpec) -> PackedWeight:
    """Round to the nearest of the levels between a group's smallest and largest weight."""
    return PackedWeight(*pack(weight, spec), spec)


def search(weight: Tensor, spec: PackedSpec) -> PackedWeight:
    """As `nearest`, with the scale and offset of each group chosen for the least squared error. Needs no data.

    Between smallest and largest weight, a single large weight makes every step wide. So the range is shrunk by several
    factors, and from each the two halves of the problem are solved in turn, as k-means and HQQ do: integers for a given
    grid by rounding, the grid for given integers by least squares. Of all grids met, with scale and offset rounded to
    float16, the one of least error is kept; the plain grid is among them, so the result is never worse.
    """
    groups = weight.detach().float().reshape(-1, spec.group_size)
    parts = [_search_groups(chunk, 2**spec.bits - 1) for chunk in groups.split(max(1, CHUNK_NUMEL // spec.group_size))]
    q, scales, zeros = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return PackedWeight(pack_bits(q, spec.bits), scales, zeros, spec)


def _search_groups(groups: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Integers, scales and offsets of groups (n, group_size)."""
    low, high = groups.aminmax(dim=1, keepdim=True)
    middle = (low + high) / 2
    best: tuple[Tensor, Tensor, Tensor] | None = None
    least = torch.full_like(low, float("inf"))
    for shrink in SHRINKS:
        zero = middle + shrink * (low - middle)
        scale = shrink * (high - low) / levels
        for refit in range(REFITS + 1):
            # As they are stored. The first grid's step starts at the rounded offset, as `nearest` has it.
            zero16 = zero.half()
            if shrink == 1 and refit == 0:
                scale = (high - zero16.float()) / levels
            scale16 = scale.half()
            step, offset = scale16.float(), zero16.float()
            q = ((groups - offset) / torch.where(step > 0, step, 1)).round_().clamp_(0, levels)
            error = torch.addcmul(offset, q, step).sub_(groups).square_().sum(dim=1, keepdim=True)
            if best is None:
                best, least = (q, scale16, zero16), error
            else:
                better = error < least
                new = (q, scale16, zero16)
                best = tuple(torch.where(better, a, b) for a, b in zip(new, best, strict=True))  # type: ignore[assignment]
                least = torch.minimum(least, error)
            mean_q, mean_w = q.mean(dim=1, keepdim=True), groups.mean(dim=1, keepdim=True)
            spread = q - mean_q
            variance = spread.square().sum(dim=1, keepdim=True)
            scale = torch.where(variance > 0, (spread * groups).sum(dim=1, keepdim=True) / variance, scale)
            zero = mean_w - scale * mean_q
    assert best is not None
    q, scale, zero = best
    return q.to(torch.uint8), scale.flatten(), zero.flatten()


def widened(spec: PackedSpec) -> PackedSpec:
    """That of `widen`'s result."""
    return PackedSpec(8, spec.group_size, spec.shape) if spec.bits == 6 else spec


def widen(weight: PackedWeight) -> PackedWeight:
    """6 bits as 8, the same values: what a token reads should unpack fast. Others come back as they are."""
    if weight.spec.bits != 6:
        return weight
    spec = widened(weight.spec)
    wide = weight.qweight.new_empty(weight.qweight.numel() // 3 * 4)
    # In small pieces: a table's scratch would be the most that loading a model takes.
    piece = 2**18
    for few, many in zip(weight.qweight.split(3 * piece // 4), wide.split(piece), strict=True):
        many.copy_(unpack_bits(few, 6))
    return PackedWeight(wide, weight.scales, weight.zeros, spec)


def narrow(weight: PackedWeight) -> PackedWeight:
    """The inverse of `widen`, for storing: 8 bits as 6 where all integers fit."""
    if weight.spec.bits != 8 or int(weight.qweight.max()) >= 2**6:
        return weight
    spec = PackedSpec(6, weight.spec.group_size, weight.spec.shape)
    return PackedWeight(pack_bits(weight.qweight, 6), weight.scales, weight.zeros, spec)


def relative_error(weight: Tensor, packed: PackedWeight) -> float:
    """RMS of what rounding changed over RMS of the weight."""
    wide = weight.detach().float()
    return float((packed.unpack(torch.float32) - wide).norm() / wide.norm())
