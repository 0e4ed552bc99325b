"""Matrix products of decoding for many rows at once, with the epilogues of `gemv.py`, on the tensor cores.

One program owns BLOCK_N rows of W and all rows of x (BLOCK_M), and walks over K (or over one of SPLITS parts of it)
with several tiles in flight. W is the left operand, so that few rows of x fill a tensor-core tile with rows of W. An
epilogue of "parts" leaves the sums of its part of K, which `rows.finish` adds in a fixed order.
Packed weights are read in whole words, as in `gemv.py`: number J of every word of a tile is one operand, and x comes in
phases (`weights.to_phases`), so that what it meets lies side by side and no bits change places between threads.
Each row of x meets the same operations in the same order whatever the other rows hold.
Bytes to move: W once, `Weight.nbytes`; x once a program, from L2: BLOCK_N is wide where x is long.
"""

from __future__ import annotations

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# ruff: noqa: SIM108 (a conditional expression of Triton evaluates both sides)
# Triton reads the annotations of a kernel as marks of compile-time constants, so its pointers and numbers have none.
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mmmamba.kernels.gemv import (
    BITS,
    MAGIC,
    MixerRows,
    _as_float,
    mixer_numbers,
    mixer_rows,
    phase_index,
    silu,
    words_of,
)
from mmmamba.kernels.launch import multiprocessors, next_power_of_2
from mmmamba.kernels.weights import PHASES, Weight


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
    packed = weight.kind != "dense"
    # Every program reads all of x: of packed weights that would be more than the weights themselves in narrow blocks.
    block_n = 64 if tiles == 1 or packed else 32
    least = 16 * PHASES[weight.kind]  # of a product on tensor cores: 16 words
    block_k = max(least, min(128, next_power_of_2(columns)))
    splits = 1
    if split:
        while splits < 8 and -(-rows // block_n) * splits * 2 <= programs and columns // (splits * 2) >= 2 * block_k:
            splits *= 2
    while block_n > 16 and -(-rows // block_n) * splits * 2 <= programs:
        block_n //= 2
    return GemmShape(block_n, block_k, splits, 4, 3 if packed else 4)


@triton.jit
def _scale_of_words(table, n, w, mask, K: tl.constexpr, GROUP: tl.constexpr, PHASES: tl.constexpr):
    """The scale or zero that each word (BLOCK_N, BLOCK_W) of grouped weights has."""
    place = n[:, None] * (K // GROUP) + (w * PHASES // GROUP)[None, :]
    return tl.load(table + place, mask, other=0.0).to(tl.float32)


@triton.jit
def _number(words, magic, scale, zero, J: tl.constexpr, BITS: tl.constexpr, WHOLE_ROWS: tl.constexpr):
    """Weight J of every word; of whole rows as the integer that it is (the scale follows behind the sums)."""
    UNIT: tl.constexpr = 2.0 if BITS == 8 else 16.0 if J % 2 == 0 else 1.0  # as in `gemv._dot`
    value = _as_float(words, magic, J, BITS)
    if WHOLE_ROWS:
        return (value - 128.0) * UNIT
    else:
        return value * (scale * UNIT) + (zero - 128.0 * UNIT * scale)


@triton.jit
def gemm(
    x, w, scales, zeros, w2, scales2, zeros2, out, conv_weight, conv_bias, dt_bias, conv_table, alive, N, magic,
    K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, EPILOGUE: tl.constexpr,
    X_PHASES: tl.constexpr, OUT_PHASES: tl.constexpr, OUT_LENGTH: tl.constexpr,
    CONV: tl.constexpr, GATE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr,
    SPLITS: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out (ROWS, N) from x (ROWS, K), or (SPLITS, ROWS, N) with the epilogue "parts"; see the module."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    PHASES: tl.constexpr = 1 if BITS == 16 else 32 // BITS
    WORDS: tl.constexpr = K // PHASES
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    n_ok = n < N
    m_ok = m < ROWS
    n_wide = n.to(tl.int64)
    WHOLE_ROWS: tl.constexpr = BITS != 16 and GROUP == K
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    acc2 = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    x_sum = tl.zeros([BLOCK_M], tl.float32)
    PART: tl.constexpr = ((WORDS + BLOCK_W - 1) // BLOCK_W + SPLITS - 1) // SPLITS * BLOCK_W
    start = tl.program_id(1) * PART
    kind = x.dtype.element_ty
    for step in tl.range(0, PART // BLOCK_W, num_stages=STAGES):
        word = start + step * BLOCK_W + tl.arange(0, BLOCK_W)
        word_ok = word < WORDS
        mask = n_ok[:, None] & word_ok[None, :]
        place = n_wide[:, None] * WORDS + word[None, :]
        tile = tl.load(w + place, mask, other=0)
        scale, zero, scale2, zero2 = 0.0, 0.0, 0.0, 0.0
        if BITS != 16 and not WHOLE_ROWS:
            scale = _scale_of_words(scales, n_wide, word, mask, K, GROUP, PHASES)
            zero = _scale_of_words(zeros, n_wide, word, mask, K, GROUP, PHASES)
        if EPILOGUE == "swiglu":
            tile2 = tl.load(w2 + place, mask, other=0)
            if BITS != 16 and not WHOLE_ROWS:
                scale2 = _scale_of_words(scales2, n_wide, word, mask, K, GROUP, PHASES)
                zero2 = _scale_of_words(zeros2, n_wide, word, mask, K, GROUP, PHASES)
        for j in tl.static_range(PHASES):
            if X_PHASES == PHASES:
                at = j * WORDS + word
            else:
                at = phase_index(word * PHASES + j, K, X_PHASES)
            x_tile = tl.load(x + m[None, :] * K + at[:, None], m_ok[None, :] & word_ok[:, None], other=0.0)
            if WHOLE_ROWS:
                x_sum += tl.sum(x_tile.to(tl.float32), axis=0)
            if BITS == 16:
                left = tile
            else:
                left = _number(tile, magic, scale, zero, j, BITS, WHOLE_ROWS).to(kind)
            acc = tl.dot(left, x_tile, acc, input_precision="ieee")
            if EPILOGUE == "swiglu":
                if BITS == 16:
                    left2 = tile2
                else:
                    left2 = _number(tile2, magic, scale2, zero2, j, BITS, WHOLE_ROWS).to(kind)
                acc2 = tl.dot(left2, x_tile, acc2, input_precision="ieee")
    if WHOLE_ROWS:
        acc = acc * tl.load(scales + n, n_ok, other=0.0).to(tl.float32)[:, None]
        acc += tl.load(zeros + n, n_ok, other=0.0).to(tl.float32)[:, None] * x_sum[None, :]
        if EPILOGUE == "swiglu":
            acc2 = acc2 * tl.load(scales2 + n, n_ok, other=0.0).to(tl.float32)[:, None]
            acc2 += tl.load(zeros2 + n, n_ok, other=0.0).to(tl.float32)[:, None] * x_sum[None, :]
    mask = n_ok[:, None] & m_ok[None, :]
    at = m[None, :] * OUT_LENGTH + phase_index(n_wide, OUT_LENGTH, OUT_PHASES)[:, None]
    if EPILOGUE == "swiglu":
        acc = silu(acc) * acc2
    if EPILOGUE == "parts":
        at += tl.program_id(1).to(tl.int64) * ROWS * OUT_LENGTH
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
    x_phases: int = 1,
    out_phases: int = 1,
    shape: GemmShape | None = None,
    pdl: bool = False,
) -> None:
    """Write W x into `out`, as `gemv.project` for many rows, without norms.

    Args:
        x: (rows, in_features) in `x_phases`; packed weights read their own number of phases fastest.
        out: (rows, out_features) in `out_phases`, or (splits, rows, out_features) float32 for the sums of each part of
            K.
    """
    rows, columns = weight.shape
    parts = out.ndim == 3
    shape = shape or gemm_shape(weight, x.device, split=parts, tiles=2 if gated else 1)
    splits = out.shape[0] if parts else 1
    if x.shape[1] != columns or out.shape[-2:] != (x.shape[0], rows):
        raise ValueError(f"x {tuple(x.shape)} and out {tuple(out.shape)} do not fit a weight of shape {weight.shape}")
    phases = PHASES[weight.kind]
    if shape.block_k % (16 * phases):
        raise ValueError(f"block_k={shape.block_k} of {weight.kind} weights must be a multiple of {16 * phases}")
    gemm[(-(-rows // shape.block_n), splits)](
        x,
        words_of(weight),
        weight.scales,
        weight.zeros,
        words_of(gated) if gated else None,
        gated.scales if gated else None,
        gated.zeros if gated else None,
        out,
        mixer.conv_weight if mixer else None,
        mixer.conv_bias if mixer else None,
        mixer.dt_bias if mixer else None,
        conv_table,
        alive,
        rows,
        MAGIC,
        K=columns,
        BITS=BITS[weight.kind],
        GROUP=weight.group_size,
        ROWS=x.shape[0],
        EPILOGUE="parts" if parts else "swiglu" if gated else "mixer" if mixer else "plain",
        X_PHASES=x_phases,
        OUT_PHASES=out_phases,
        OUT_LENGTH=rows,
        CONV=mixer.conv_bias.shape[0] if mixer else 0,
        GATE=mixer.hidden_size if mixer else 0,
        BLOCK_N=shape.block_n,
        BLOCK_M=max(16, next_power_of_2(x.shape[0])),
        BLOCK_W=shape.block_k // phases,
        SPLITS=splits,
        STAGES=shape.num_stages,
        PDL=pdl,
        num_warps=shape.num_warps,
        launch_pdl=pdl,
    )
