"""Weight matrices as the decoding kernels read them: dense, or packed in 8 or 4 bits as `mmmamba.packing` stores them.

dense  data (out, in) bfloat16, float16 or float32
int8   data (out, in) uint8
int4   data (out, in / 2) uint8, low nibble first
both   scales, zeros (out, in / group_size), any float type:     w = scale * q + zero
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmmamba.packing import PackedWeight, split_groups

Kind = Literal["dense", "int8", "int4"]
# Weights in a 32-bit word of the packed kinds: the kernels read whole words, and take activations in so many phases.
PHASES: dict[Kind, int] = {"dense": 1, "int8": 4, "int4": 8}
MIN_GROUP_WORDS = 4  # what a thread loads at once is of one group then


@dataclass(frozen=True)
class Weight:
    """A matrix (out_features, in_features) in one of the layouts above.

    Raises: ValueError if shapes and kind do not fit, or groups are cut so that the kernels cannot read them.
    """

    kind: Kind
    data: Tensor
    scales: Tensor | None = None
    zeros: Tensor | None = None
    group_size: int = 0

    def __post_init__(self) -> None:
        if self.kind not in PHASES:
            raise ValueError(f'weight kind "{self.kind}" is not known; use one of {", ".join(PHASES)}')
        if self.data.ndim != 2 or not self.data.is_contiguous():
            raise ValueError(f"weight data has shape {tuple(self.data.shape)}; use two contiguous dimensions")
        if self.kind == "dense":
            return
        rows, columns = self.shape
        words, rest = divmod(self.group_size, PHASES[self.kind])
        whole_row = self.group_size == columns
        if (
            rest
            or columns % max(1, self.group_size)
            or not (whole_row or (words >= MIN_GROUP_WORDS and _is_power(words)))
        ):
            raise ValueError(
                f"group_size={self.group_size} of an {self.kind} weight with in_features={columns} cannot be read in "
                "words; use 32, 64, 128 or a whole row, or leave this layer in bf16"
            )
        for name, tensor in (("scales", self.scales), ("zeros", self.zeros)):
            if tensor is None or tensor.shape != (rows, columns // self.group_size):
                found = None if tensor is None else tuple(tensor.shape)
                raise ValueError(f"{name} have shape {found}; one a group is {(rows, columns // self.group_size)}")

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        rows, columns = self.data.shape
        return rows, 2 * columns if self.kind == "int4" else columns

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads."""
        return sum(t.nbytes for t in (self.data, self.scales, self.zeros) if t is not None)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense matrix, (out, in): the reference that the kernels are tested against."""
        rows, columns = self.shape
        if self.kind == "dense":
            return self.data.to(dtype)
        assert self.scales is not None, "checked when made"
        assert self.zeros is not None, "checked when made"
        q = self.data if self.kind == "int8" else torch.stack([self.data & 0xF, self.data >> 4], dim=-1)
        grouped = q.reshape(rows, -1, self.group_size).to(dtype)
        return (grouped * self.scales.to(dtype)[..., None] + self.zeros.to(dtype)[..., None]).view(rows, columns)


def _is_power(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def _power_of_two_part(n: int) -> int:
    return n & -n


def from_packed(packed: PackedWeight) -> Weight:
    """A `mmmamba.packing.PackedWeight` (flat `qweight`, `scales`, `zeros`, `spec`), sharing its memory.

    Raises: ValueError for 6 bits, or for groups that the kernels cannot read.
    """
    spec = packed.spec
    kinds: dict[int, Kind] = {8: "int8", 4: "int4"}
    if spec.bits not in kinds:
        raise ValueError(f"weights of {spec.bits} bits are for storage alone; use 8 or 4 to decode from them")
    rows, columns = spec.shape
    # Groups that are no power of two in words, such as nano's 96, hold the same values in smaller ones.
    if spec.group_size not in (columns, _power_of_two_part(spec.group_size)):
        packed = split_groups(packed, _power_of_two_part(spec.group_size))
        spec = packed.spec
    scales, zeros = (t.view(rows, columns // spec.group_size) for t in (packed.scales, packed.zeros))
    return Weight(kinds[spec.bits], packed.qweight.view(rows, -1), scales, zeros, spec.group_size)


def from_signed(qweight: Tensor, scales: Tensor) -> Weight:
    """From int8 (out, in) with a scale a row, w = scale * q, to ours."""
    scales = scales.reshape(-1, 1).float()
    shifted = (qweight.to(torch.int16) + 128).to(torch.uint8)
    return Weight("int8", shifted, scales, -128 * scales, qweight.shape[1])


def round_to_nearest(dense: Tensor, kind: Kind, *, group_size: int = 64) -> Weight:
    """A quantized copy of (out, in) without any search, int8 in whole rows: for tests and timing on random weights."""
    if kind == "dense":
        return Weight("dense", dense.contiguous())
    rows, columns = dense.shape
    group, levels = (columns, 255) if kind == "int8" else (group_size, 15)
    grouped = dense.float().view(rows, -1, group)
    low, high = grouped.amin(dim=2), grouped.amax(dim=2)
    zeros = low.half()
    scales = ((high - zeros.float()) / levels).clamp(min=1e-7).half()
    q = ((grouped - zeros.float()[..., None]) / scales.float()[..., None]).round().clamp(0, levels).to(torch.uint8)
    q = q.view(rows, columns)
    data = q if kind == "int8" else (q[:, 0::2] | (q[:, 1::2] << 4)).contiguous()
    return Weight(kind, data, scales, zeros, group)


def to_phases(x: Tensor, phases: int) -> Tensor:
    """Columns of the last dimension sorted by k % phases, then by k: what one word of packed weights meets lies `K /
    phases` apart, so that neighbouring threads read neighbouring activations."""
    return x.unflatten(-1, (-1, phases)).transpose(-1, -2).flatten(-2).contiguous()
