"""Layers that student and teacher share: RMS norm, rotary positions, gated MLP, pixel shuffle."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmmamba.config import StackConfig
from mmmamba.kernels import fused_ops
from mmmamba.segments import Segments


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in float32 at least whatever the input's dtype."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        ops = fused_ops(x)
        if ops is not None:
            return ops.rms_norm(x, self.weight, self.eps)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.weight * F.rms_norm(wide, wide.shape[-1:], eps=self.eps).to(self.weight.dtype)


class GatedMLP(nn.Module):
    """w2(SiLU(w1 x) * w3 x)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.w3 = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.w2 = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        ops = fused_ops(x)
        if ops is not None:
            return self.w2(ops.swiglu(self.w1(x), self.w3(x)))
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class RopeTables(NamedTuple):
    """Cosines and sines of one forward pass, (length, head_dim) each; (batch, 1, length, head_dim) for packed rows.

    `q_*` are those of the new positions. `k_*` are those of every cached position too where the cache holds keys
    before rotation (`keys_unrotated`); otherwise they equal `q_*`.
    """

    q_cos: Tensor
    q_sin: Tensor
    k_cos: Tensor
    k_sin: Tensor
    keys_unrotated: bool


class Rotary:
    """Rotary position tables as a pure function of positions and the current length: nothing is cached or learned.

    Dynamic NTK scaling (as in the published models): for a sequence of n > max_position_embeddings tokens the base is
    theta * (factor * n / max - (factor - 1)) ** (d / (d - 2)). The base moves with the length, so keys rotated earlier
    would go stale: with `dynamic` scaling the cache keeps keys unrotated and all of them are rotated at each pass.
    """

    def __init__(self, config: StackConfig) -> None:
        self.head_dim = config.head_dim
        self.theta = config.rope_theta
        self.max_positions = config.max_position_embeddings
        self.scaling = config.rope_scaling

    @property
    def keys_unrotated(self) -> bool:
        return self.scaling is not None and self.scaling.type == "dynamic"

    def base(self, total_seqlen: int) -> float:
        """The rotary base for a sequence of `total_seqlen` tokens."""
        if self.scaling is None or self.scaling.type != "dynamic" or total_seqlen <= self.max_positions:
            return self.theta
        stretch = self.scaling.factor * total_seqlen / self.max_positions - (self.scaling.factor - 1)
        return self.theta * stretch ** (self.head_dim / (self.head_dim - 2))

    def tables(
        self, seqlen_offset: int, seqlen: int, *, total_seqlen: int, device: torch.device, dtype: torch.dtype
    ) -> RopeTables:
        """Tables for positions seqlen_offset .. seqlen_offset + seqlen - 1 of a sequence of `total_seqlen` tokens."""
        wide = torch.promote_types(dtype, torch.float32)
        exponent = torch.arange(0, self.head_dim, 2, device=device, dtype=wide) / self.head_dim
        inv_freq = self.base(total_seqlen) ** -exponent
        first = 0 if self.keys_unrotated else seqlen_offset
        positions = torch.arange(first, seqlen_offset + seqlen, device=device, dtype=wide)
        if self.scaling is not None and self.scaling.type == "linear":
            positions = positions / self.scaling.factor
        cos, sin = _turns(torch.outer(positions, inv_freq), dtype)
        new = slice(seqlen_offset - first, None)
        return RopeTables(cos[new], sin[new], cos, sin, self.keys_unrotated)

    def segment_tables(self, segments: Segments, dtype: torch.dtype) -> RopeTables:
        """Tables for packed rows: every segment counts its positions, and its length for dynamic scaling, alone."""
        wide = torch.promote_types(dtype, torch.float32)
        positions = segments.positions.to(wide)[:, None, :, None]
        exponent = torch.arange(0, self.head_dim, 2, device=positions.device, dtype=wide) / self.head_dim
        inv_freq = self.theta**-exponent
        if self.scaling is not None and self.scaling.type == "linear":
            positions = positions / self.scaling.factor
        if self.scaling is not None and self.scaling.type == "dynamic":
            over = (segments.lengths.to(wide) / self.max_positions).clamp(min=1.0)[:, None, :, None]
            stretch = self.scaling.factor * over - (self.scaling.factor - 1)
            inv_freq = (self.theta * stretch ** (self.head_dim / (self.head_dim - 2))) ** -exponent
        cos, sin = _turns(positions * inv_freq, dtype)
        return RopeTables(cos, sin, cos, sin, False)


def _turns(angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines for whole heads: both halves of one turn by the same angles."""
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the two halves of every head against each other; x is (..., length, head_dim)."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


def pixel_shuffle(x: Tensor) -> Tensor:
    """Space to channels by two: (n, h * w, c) of a square grid, row by row, to (n, h/2 * w/2, 4 c).

    Output (row q, column p) holds inputs (2q, 2p), (2q, 2p+1), (2q+1, 2p), (2q+1, 2p+1), one after the other.
    """
    n, length, c = x.shape
    side = int(length**0.5)
    x = x.view(n, side // 2, 2, side // 2, 2, c).transpose(2, 3)
    return x.reshape(n, length // 4, 4 * c)
