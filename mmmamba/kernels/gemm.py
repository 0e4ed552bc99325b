"""Matrix products of decoding for many rows at once, with the epilogues of `gemv.py`, on the tensor cores.

One program owns BLOCK_N rows of W and all rows of x (BLOCK_M), and walks over K (or over one of SPLITS parts of it)
with several tiles in flight. W is the left operand, so that few rows of x fill a tensor-core tile with rows of W. An
epilogue of "parts" leaves the sums of its part of K, which `rows.finish` adds in a fixed order.
Each row of x meets the same operations in the same order whatever the other rows hold.
Bytes to move: W once, `Weight.nbytes`; x once a program, from L2: BLOCK_N is wide where x is long.
"""

from __future__ import annotations

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# Triton reads the annotations of a kernel as marks of compile-time constants, so its pointers and numbers have none.
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mmmamba.kernels.gemv import BITS, MixerRows, mixer_numbers, mixer_rows, silu
from mmmamba.kernels.launch import multiprocessors, next_power_of_2
from mmmamba.kernels.weights import Weight


@dataclass(frozen=True)
class GemmShape:
    """`block_n` rows of W a program, `block_k` columns a step, `splits` parts of K."""

    block_n: int
    block_k: int
    splits: int
    num_warps: int
    num_stages: int


def gemm_shape(weight: Weight, device: torch.device, *, split: bool = False, tiles: int = 1) -> GemmShape:
    """Enough programs to fill the card once, by splitting K where that is allowed, else by narrower blocks."""
    rows, columns = weight.shape
    programs = multiprocessors(device)
    block_n = 64 if tiles == 1 else 32
    grouped = weight.kind != "dense" and weight.group_size != columns
    block_k = min(weight.group_size, 128) if grouped else 64 if weight.kind == "int4" else 128
    block_k = max(16, min(block_k, next_power_of_2(columns)))
    splits = 1
    if split:
        while splits < 8 and -(-rows // block_n) * splits * 2 <= programs and columns // (splits * 2) >= 2 * block_k:
            splits *= 2
    while block_n > 16 and -(-rows // block_n) * splits * 2 <= programs:
        block_n //= 2
    return GemmShape(block_n, block_k, splits, 4, 4)


@triton.jit
def _tile(
    w, scales, zeros, n, k0, n_ok, kind,
    K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """W[n, k0 : k0 + BLOCK_K] in the type of x; 8 bits in whole rows stay as they are (`_scaled` follows)."""
    if BITS == 4:
        half = k0 // 2 + tl.arange(0, BLOCK_K // 2)
        mask = n_ok[:, None] & (half < K // 2)[None, :]
        q = tl.load(w + n[:, None] * (K // 2) + half[None, :], mask, other=0)
        q = tl.reshape(tl.join(q & 0xF, q >> 4), [BLOCK_N, BLOCK_K])
    else:
        k = k0 + tl.arange(0, BLOCK_K)
        q = tl.load(w + n[:, None] * K + k[None, :], n_ok[:, None] & (k < K)[None, :], other=0)
    if BITS == 16 or GROUP == K:
        return q.to(kind)
    elif BLOCK_K > GROUP:
        GROUPS: tl.constexpr = BLOCK_K // GROUP
        g = k0 // GROUP + tl.arange(0, GROUPS)
        place = n[:, None] * (K // GROUP) + g[None, :]
        inside = n_ok[:, None] & (g < K // GROUP)[None, :]
        scale = tl.load(scales + place, inside, other=0.0).to(tl.float32)
        zero = tl.load(zeros + place, inside, other=0.0).to(tl.float32)
        grouped = tl.reshape(q, [BLOCK_N, GROUPS, GROUP]).to(tl.float32)
        return tl.reshape(grouped * scale[:, :, None] + zero[:, :, None], [BLOCK_N, BLOCK_K]).to(kind)
    else:
        # A step meets one scale a row.
        place = n * (K // GROUP) + k0 // GROUP
        inside = n_ok & (k0 < K)  # parts of K may end behind it
        scale = tl.load(scales + place, inside, other=0.0).to(tl.float32)
        zero = tl.load(zeros + place, inside, other=0.0).to(tl.float32)
        return (q.to(tl.float32) * scale[:, None] + zero[:, None]).to(kind)


@triton.jit
def gemm(
    x, w, scales, zeros, w2, scales2, zeros2, out, conv_weight, conv_bias, dt_bias, conv_table, alive, N,
    K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, EPILOGUE: tl.constexpr,
    CONV: tl.constexpr, GATE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out (ROWS, N) from x (ROWS, K), or (SPLITS, ROWS, N) with the epilogue "parts"; see the module."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    n_ok = n < N
    m_ok = m < ROWS
    n_wide = n.to(tl.int64)
    WHOLE_ROWS: tl.constexpr = BITS != 16 and GROUP == K
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    acc2 = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    x_sum = tl.zeros([BLOCK_M], tl.float32)
    PART: tl.constexpr = ((K + BLOCK_K - 1) // BLOCK_K + SPLITS - 1) // SPLITS * BLOCK_K
    start = tl.program_id(1) * PART
    kind = x.dtype.element_ty
    for step in tl.range(0, PART // BLOCK_K, num_stages=STAGES):
        k0 = start + step * BLOCK_K
        k = k0 + tl.arange(0, BLOCK_K)
        x_tile = tl.load(x + m[None, :] * K + k[:, None], m_ok[None, :] & (k < K)[:, None], other=0.0)
        if WHOLE_ROWS:
            x_sum += tl.sum(x_tile.to(tl.float32), axis=0)
        tile = _tile(w, scales, zeros, n_wide, k0, n_ok, kind, K, BITS, GROUP, BLOCK_N, BLOCK_K)
        acc = tl.dot(tile, x_tile, acc, input_precision="ieee")
        if EPILOGUE == "swiglu":
            tile = _tile(w2, scales2, zeros2, n_wide, k0, n_ok, kind, K, BITS, GROUP, BLOCK_N, BLOCK_K)
            acc2 = tl.dot(tile, x_tile, acc2, input_precision="ieee")
    if WHOLE_ROWS:
        acc = acc * tl.load(scales + n, n_ok, other=0.0).to(tl.float32)[:, None]
        acc += tl.load(zeros + n, n_ok, other=0.0).to(tl.float32)[:, None] * x_sum[None, :]
        if EPILOGUE == "swiglu":
            acc2 = acc2 * tl.load(scales2 + n, n_ok, other=0.0).to(tl.float32)[:, None]
            acc2 += tl.load(zeros2 + n, n_ok, other=0.0).to(tl.float32)[:, None] * x_sum[None, :]
    mask = n_ok[:, None] & m_ok[None, :]
    at = m[None, :] * N + n_wide[:, None]
    if EPILOGUE == "swiglu":
        acc = silu(acc) * acc2
    if EPILOGUE == "parts":
        at += tl.program_id(1).to(tl.int64) * ROWS * N
    if EPILOGUE == "mixer":
        narrow = conv_bias.dtype.element_ty
        u = acc.to(narrow).to(tl.float32)  # as the state keeps it
        states = tl.load(conv_table + m, m_ok, other=0).to(tl.pointer_type(narrow))
        going = tl.load(alive + m, m_ok, other=0) != 0
        in_conv = mask & (n < CONV)[:, None]
        prev = tl.load(states[None, :] + n[:, None], in_conv, other=0.0).to(tl.float32)
        tl.store(states[None, :] + n[:, None], u.to(narrow), in_conv & going[None, :])
        tap0, tap1, bias, step_bias = mixer_numbers(n, conv_weight, conv_bias, dt_bias, n_ok, CONV, GATE)
        rows = n[:, None]
        acc = mixer_rows(u, prev, rows, tap0[:, None], tap1[:, None], bias[:, None], step_bias[:, None], CONV, GATE)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask)


def product(
    x: Tensor,
    weight: Weight,
    out: Tensor,
    *,
    gated: Weight | None = None,
    mixer: MixerRows | None = None,
    conv_table: Tensor | None = None,
    alive: Tensor | None = None,
    shape: GemmShape | None = None,
    pdl: bool = False,
) -> None:
    """Write W x into `out`, as `gemv.project` for many rows, without norms and phases.

    Args: out: (rows, out_features), or (splits, rows, out_features) float32 for the sums of each part of K.
    """
    rows, columns = weight.shape
    parts = out.ndim == 3
    shape = shape or gemm_shape(weight, x.device, split=parts, tiles=2 if gated else 1)
    splits = out.shape[0] if parts else 1
    if x.shape[1] != columns or out.shape[-2:] != (x.shape[0], rows):
        raise ValueError(f"x {tuple(x.shape)} and out {tuple(out.shape)} do not fit a weight of shape {weight.shape}")
    group = weight.group_size
    if weight.kind != "dense" and group != columns and group % shape.block_k and shape.block_k % group:
        raise ValueError(f"block_k={shape.block_k} and group_size={group}: one must divide the other")
    gemm[(-(-rows // shape.block_n), splits)](
        x,
        weight.data,
        weight.scales,
        weight.zeros,
        gated.data if gated else None,
        gated.scales if gated else None,
        gated.zeros if gated else None,
        out,
        mixer.conv_weight if mixer else None,
        mixer.conv_bias if mixer else None,
        mixer.dt_bias if mixer else None,
        conv_table,
        alive,
        rows,
        K=columns,
        BITS=BITS[weight.kind],
        GROUP=weight.group_size,
        ROWS=x.shape[0],
        EPILOGUE="parts" if parts else "swiglu" if gated else "mixer" if mixer else "plain",
        CONV=mixer.conv_bias.shape[0] if mixer else 0,
        GATE=mixer.hidden_size if mixer else 0,
        BLOCK_N=shape.block_n,
        BLOCK_M=max(16, next_power_of_2(x.shape[0])),
        BLOCK_K=shape.block_k,
        SPLITS=splits,
        STAGES=shape.num_stages,
        PDL=pdl,
        num_warps=shape.num_warps,
        launch_pdl=pdl,
    )
