"""Products of packed weights with few rows by torch's own kernels for CPUs: for machines without a C compiler.

They are fast in bfloat16 alone, so activations and results are rounded to it, as in a model that is in bfloat16. They
are not part of torch's public interface, so each is tried once on a small product before it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from mmmamba.packing import PackedSpec, PackedWeight, pack, split_groups, unpack_bits

INT4_GROUPS = (256, 128, 64, 32)  # that torch's kernel takes
INT4_ROWS = 16  # rows of a weight come in multiples of this
Product = Callable[[Tensor], Tensor]


def torch_product(weight: PackedWeight) -> Product | None:
    """x (n, cols) -> x W^T (n, rows) float32, or None for forms that torch has no kernel for.

    The integers are held a second time, in the order of torch's kernel.
    """
    bits, group = weight.spec.bits, weight.spec.group_size
    if bits not in (4, 8) or (bits == 4 and group % INT4_GROUPS[-1]) or not _works(bits):
        return None
    return int4_product(weight) if bits == 4 else int8_product(weight)


def int8_product(weight: PackedWeight) -> Product:
    """torch's kernel has signed integers and a scale a row: w = scale * (q - 128) + (zero + 128 scale), by groups."""
    rows, cols = weight.spec.shape
    group = weight.spec.group_size
    # Flipping the top bit subtracts 128.
    codes = (weight.qweight.view(rows, -1, group) ^ 128).view(torch.int8).transpose(0, 1).contiguous()
    scales, zeros = (t.float().view(rows, -1) for t in (weight.scales, weight.zeros))
    offsets = (zeros + 128 * scales).T
    ones = torch.ones(rows, dtype=torch.bfloat16)

    def product(x: Tensor) -> Tensor:
        x = x.bfloat16().view(len(x), -1, group)
        y = x.float().sum(dim=2) @ offsets
        for i in range(cols // group):
            y.addcmul_(torch._weight_int8pack_mm(x[:, i].contiguous(), codes[i], ones).float(), scales[:, i])
        return y

    return product


def int4_product(weight: PackedWeight) -> Product:
    """torch's kernel has w = scale * (q - 8) + zero, in groups of its own sizes: larger ones are split."""
    rows, cols = weight.spec.shape
    group = next(size for size in INT4_GROUPS if weight.spec.group_size % size == 0)
    weight = split_groups(weight, group)
    padded = -(-rows // INT4_ROWS) * INT4_ROWS
    q = torch.zeros(padded, cols, dtype=torch.int32)
    q[:rows] = unpack_bits(weight.qweight, 4).view(rows, cols)
    arranged = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
    scales, zeros = (t.float().view(rows, -1) for t in (weight.scales, weight.zeros))
    grid = torch.zeros(cols // group, padded, 2, dtype=torch.bfloat16)
    grid[:, :rows, 0], grid[:, :rows, 1] = scales.T, (zeros + 8 * scales).T

    def product(x: Tensor) -> Tensor:
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x.bfloat16(), arranged, group, grid)
        return y[:, :rows].float()

    return product


@cache
def _works(bits: int) -> bool:
    """Whether this version of torch has the kernel and it computes what is meant."""
    cols = 64
    weight = torch.linspace(-1, 1, 16 * cols).view(16, cols)
    spec = PackedSpec(bits, cols, (16, cols))
    packed = PackedWeight(*pack(weight, spec), spec)
    x = torch.linspace(-1, 2, cols).view(1, cols)
    try:
        y = (int4_product if bits == 4 else int8_product)(packed)(x)
    except (AttributeError, RuntimeError, TypeError):  # gone, moved, or not compiled for this processor
        return False
    return torch.allclose(y, x @ packed.unpack(torch.float32).T, rtol=0.03, atol=0.1)
