"""Small kernels of a decoding step: one program a row of hidden_size numbers.

Bytes to move: a few rows. What they cost is a launch each, so there is one where the kernels around it cannot take its
work along.
"""

from __future__ import annotations

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# Triton reads the annotations of a kernel as marks of compile-time constants, so its pointers and numbers have none.
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mmmamba.kernels.gemv import BITS, phase_index
from mmmamba.kernels.launch import next_power_of_2
from mmmamba.kernels.weights import Weight


@triton.jit
def embed_rows(
    token, text, scales, zeros, special, out, TEXT_ROWS, SPECIAL_ROWS,
    DIM: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, PHASES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    ok = i < DIM
    # Ids outside the tables (a row that is not in use) read some row inside them.
    at = tl.maximum(tl.load(token + row), 0)
    inside = tl.minimum(at, TEXT_ROWS - 1)
    if BITS == 16:
        x = tl.load(text + inside * DIM + i, ok, other=0.0).to(tl.float32)
    else:
        A_BYTE: tl.constexpr = 8 // BITS
        byte = tl.load(text + inside * (DIM // A_BYTE) + i // A_BYTE, ok, other=0).to(tl.int32)
        q = (byte >> ((i % A_BYTE) * BITS)) & ((1 << BITS) - 1)
        group = inside * (DIM // GROUP) + i // GROUP
        x = q.to(tl.float32) * tl.load(scales + group, ok, other=0.0).to(tl.float32)
        x += tl.load(zeros + group, ok, other=0.0).to(tl.float32)
    if special is not None:
        extra = tl.minimum(tl.maximum(at - TEXT_ROWS, 0), SPECIAL_ROWS - 1)
        x = tl.where(at >= TEXT_ROWS, tl.load(special + extra * DIM + i, ok, other=0.0).to(tl.float32), x)
    tl.store(out + row * DIM + phase_index(i, DIM, PHASES), x.to(out.dtype.element_ty), ok)


@triton.jit
def finish_rows(
    parts, x, norm, normed, eps,
    DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr, UNIT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """x += sum of parts (in a fixed order); with UNIT x /= |x|; normed = RMSNorm(x) * norm."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    ok = i < DIM
    value = tl.load(x + row * DIM + i, ok, other=0.0).to(tl.float32)
    for split in tl.static_range(SPLITS):
        value += tl.load(parts + (split * ROWS + row) * DIM + i, ok, other=0.0)
    if UNIT:
        value *= tl.rsqrt(tl.sum(value * value, axis=0))
    rounded = value.to(x.dtype.element_ty)
    tl.store(x + row * DIM + i, rounded, ok)
    if norm is not None:
        value = rounded.to(tl.float32)
        value *= tl.rsqrt(tl.sum(value * value, axis=0) / DIM + eps)
        value *= tl.load(norm + i, ok, other=0.0).to(tl.float32)
        tl.store(normed + row * DIM + i, value.to(x.dtype.element_ty), ok)


def embed(
    token: Tensor, text: Weight, special: Tensor | None, out: Tensor, *, phases: int = 1, pdl: bool = False
) -> None:
    """Rows of the embedding table for `token` (rows,) int64 into `out` (rows, dim), kept in `phases`; ids past the
    table of text are those of `special`."""
    rows, dim = text.shape
    embed_rows[(token.shape[0],)](
        token,
        text.data,
        text.scales,
        text.zeros,
        special,
        out,
        rows,
        0 if special is None else special.shape[0],
        DIM=dim,
        BLOCK=next_power_of_2(dim),
        BITS=BITS[text.kind],
        GROUP=text.group_size,
        PHASES=phases,
        PDL=pdl,
        num_warps=4,
        launch_pdl=pdl,
    )


def finish(
    x: Tensor,
    *,
    parts: Tensor | None = None,
    unit: bool = False,
    norm: Tensor | None = None,
    normed: Tensor | None = None,
    eps: float = 0.0,
    pdl: bool = False,
) -> None:
    """Add `parts` (splits, rows, dim) float32 to x (rows, dim); scale rows to length 1 (`unit`); write the RMS norm
    of what came out to `normed`. Changes: `x`, `normed`. Order within a row does not matter, so
    phases need not be told."""
    rows, dim = x.shape
    finish_rows[(rows,)](
        parts,
        x,
        norm,
        normed,
        eps,
        DIM=dim,
        BLOCK=next_power_of_2(dim),
        ROWS=rows,
        SPLITS=0 if parts is None else parts.shape[0],
        UNIT=unit,
        PDL=pdl,
        num_warps=8 if dim >= 2048 else 4,
        launch_pdl=pdl,
    )
