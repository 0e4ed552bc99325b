"""Attention of one token over a key-value cache, with the cache cut into splits that run side by side.

    rope      cosines and sines of the new position, or of all positions where the cache keeps keys unrotated
    attend    one program: one split of one kv head of one row, all its query heads at once on the tensor cores, so each
              key and value is read once; the program that meets the new position writes its key and value
    combine   one program: one query head; the splits' sums into one

Lengths are read on the device, so one captured graph serves every length.
Bytes to move: keys and values once, 2 * num_kv_heads * head_dim * length * size, and the rotary tables of a cache of
unrotated keys, head_dim * size a position for each kv head, mostly from L2.
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

from mmmamba.kernels.gemv import phase_index
from mmmamba.kernels.launch import multiprocessors, next_power_of_2

POSITIONS = 64  # that a program takes at once
STAGES = 3  # of such tiles in flight
QUERY_HEADS = 16  # that share a program's keys: the rows of a tensor core's tile, mostly empty
SPLITS_PER_SM = 2
MAX_SPLITS = 128


@triton.jit
def rope(
    inv_freq, seqlens, table, scale, FREQ_STRIDE, CAPACITY,
    HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr, ALL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Write (cos, sin) of position seqlens[row] to table[row, 0], or of all up to it to table[row, position] (ALL)."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0)
    now = tl.load(seqlens + row)
    i = tl.arange(0, BLOCK_H)
    frequency = tl.load(inv_freq + row * FREQ_STRIDE + i, i < HALF, other=0.0)
    at = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    position = at if ALL else at + now
    ok = (at <= now) if ALL else (at < 1)
    angle = position.to(tl.float32)[:, None] / scale * frequency[None, :]
    # To one turn, in two steps, since the fast cosine is good for small angles only: 2 pi = 6.28125 + 0.00193530718.
    turns = tl.floor(angle * 0.15915494309189535 + 0.5)
    angle = (angle - turns * 6.28125) - turns * 0.0019353071795864769
    place = (row.to(tl.int64) * CAPACITY + at)[:, None] * (2 * HALF) + i[None, :]
    mask = ok[:, None] & (i < HALF)[None, :]
    tl.store(table + place, tl.cos(angle).to(table.dtype.element_ty), mask)
    tl.store(table + place + HALF, tl.sin(angle).to(table.dtype.element_ty), mask)


@triton.jit
def _turn(a, b, cos, sin):
    """Both halves of heads, turned against each other as `layers.rotate` does."""
    return a * cos - b * sin, b * cos + a * sin


@triton.jit
def attend(
    qkv, table, k_table, v_table, capacities, seqlens, alive, sums, maxima, scale, QKV_STRIDE, TABLE_CAPACITY,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr, UNROTATED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Split program_id(1) of the heads of program_id(0): row, kv head, group of BLOCK_R query heads.

    `scale` is log2(e) / sqrt(head_dim). `sums` (rows, heads, splits, head_dim) and `maxima` (rows, heads, splits, 2:
    maximum, sum of weights), float32. An empty split writes a maximum of -inf and zeros.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    REP: tl.constexpr = HEADS // KV_HEADS
    DIM: tl.constexpr = 2 * HALF
    GROUPS: tl.constexpr = (REP + BLOCK_R - 1) // BLOCK_R
    group = tl.program_id(0) % GROUPS
    kv = (tl.program_id(0) // GROUPS) % KV_HEADS
    row = tl.program_id(0) // (GROUPS * KV_HEADS)
    split = tl.program_id(1)
    kind = table.dtype.element_ty
    now = tl.load(seqlens + row)
    head_start = tl.load(capacities + row) * (kv * DIM)
    # As in step.py: caches begin at multiples of 16 bytes, heads too.
    keys = tl.multiple_of(tl.load(k_table + row).to(tl.pointer_type(kind)), 16) + tl.multiple_of(head_start, 8)
    values = tl.multiple_of(tl.load(v_table + row).to(tl.pointer_type(kind)), 16) + tl.multiple_of(head_start, 8)
    i = tl.arange(0, BLOCK_H)
    r = group * BLOCK_R + tl.arange(0, BLOCK_R)
    i_ok = i < HALF
    r_ok = r < REP
    heads = qkv + row * QKV_STRIDE + kv * (REP + 2) * DIM
    turns = table + row.to(tl.int64) * TABLE_CAPACITY * DIM
    now_turns = turns + (now.to(tl.int64) * DIM if UNROTATED else 0)
    cos = tl.load(now_turns + i, i_ok, other=0.0).to(tl.float32)
    sin = tl.load(now_turns + HALF + i, i_ok, other=0.0).to(tl.float32)
    q_mask = r_ok[:, None] & i_ok[None, :]
    q1 = tl.load(heads + r[:, None] * DIM + i[None, :], q_mask, other=0.0)
    q2 = tl.load(heads + r[:, None] * DIM + HALF + i[None, :], q_mask, other=0.0)
    q1, q2 = _turn(q1, q2, cos[None, :], sin[None, :])
    q1 = q1.to(kind)
    q2 = q2.to(kind)

    chunk = (now // SPLITS // BLOCK_S + 1) * BLOCK_S
    start = split * chunk
    end = tl.minimum(start + chunk, now)
    maximum = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    sum1 = tl.zeros([BLOCK_R, BLOCK_H], tl.float32)
    sum2 = tl.zeros([BLOCK_R, BLOCK_H], tl.float32)
    for at in tl.range(start, end, BLOCK_S, num_stages=STAGES):
        s = at + tl.arange(0, BLOCK_S)
        place = s.to(tl.int64)[:, None] * DIM + i[None, :]
        mask = (s < now)[:, None] & i_ok[None, :]
        k1 = tl.load(keys + place, mask, other=0.0)
        k2 = tl.load(keys + place + HALF, mask, other=0.0)
        v1 = tl.load(values + place, mask, other=0.0)
        v2 = tl.load(values + place + HALF, mask, other=0.0)
        if UNROTATED:
            cos_s = tl.load(turns + place, mask, other=0.0).to(tl.float32)
            sin_s = tl.load(turns + place + HALF, mask, other=0.0).to(tl.float32)
            k1, k2 = _turn(k1.to(tl.float32), k2.to(tl.float32), cos_s, sin_s)
            k1 = k1.to(kind)
            k2 = k2.to(kind)
        score = tl.dot(q1, tl.trans(k1), input_precision="ieee")
        score = tl.dot(q2, tl.trans(k2), score, input_precision="ieee")
        score = tl.where((s < end)[None, :], score * scale, float("-inf"))
        # `at` is below `end`, so each row has a score: no maximum is -inf from here on.
        higher = tl.maximum(maximum, tl.max(score, axis=1))
        old = tl.exp2(maximum - higher)
        weight = tl.exp2(score - higher[:, None])
        total = total * old + tl.sum(weight, axis=1)
        narrow = weight.to(kind)
        sum1 = tl.dot(narrow, v1, sum1 * old[:, None], input_precision="ieee")
        sum2 = tl.dot(narrow, v2, sum2 * old[:, None], input_precision="ieee")
        maximum = higher
    if (start <= now) & (now < start + chunk):
        # The new position comes from registers: what this launch writes to the cache is for the next one.
        k1_now = tl.load(heads + REP * DIM + i, i_ok, other=0.0)
        k2_now = tl.load(heads + REP * DIM + HALF + i, i_ok, other=0.0)
        v1_now = tl.load(heads + (REP + 1) * DIM + i, i_ok, other=0.0).to(kind)
        v2_now = tl.load(heads + (REP + 1) * DIM + HALF + i, i_ok, other=0.0).to(kind)
        r1, r2 = _turn(k1_now, k2_now, cos, sin)
        if (group == 0) & (tl.load(alive + row) != 0):
            new = now.to(tl.int64) * DIM + i
            tl.store(keys + new, k1_now.to(kind) if UNROTATED else r1.to(kind), i_ok)
            tl.store(keys + new + HALF, k2_now.to(kind) if UNROTATED else r2.to(kind), i_ok)
            tl.store(values + new, v1_now, i_ok)
            tl.store(values + new + HALF, v2_now, i_ok)
        dot = q1.to(tl.float32) * r1.to(kind).to(tl.float32)[None, :]
        dot += q2.to(tl.float32) * r2.to(kind).to(tl.float32)[None, :]
        score_now = tl.sum(dot, axis=1) * scale
        higher_now = tl.maximum(maximum, score_now)
        old_now = tl.exp2(maximum - higher_now)
        weight_now = tl.exp2(score_now - higher_now)
        total = total * old_now + weight_now
        sum1 = sum1 * old_now[:, None] + weight_now[:, None] * v1_now.to(tl.float32)[None, :]
        sum2 = sum2 * old_now[:, None] + weight_now[:, None] * v2_now.to(tl.float32)[None, :]
        maximum = higher_now
    out = (row * HEADS + kv * REP + r) * SPLITS + split
    out_mask = r_ok[:, None] & i_ok[None, :]
    tl.store(sums + out[:, None] * DIM + i[None, :], sum1, out_mask)
    tl.store(sums + out[:, None] * DIM + HALF + i[None, :], sum2, out_mask)
    tl.store(maxima + 2 * out, maximum, r_ok)
    tl.store(maxima + 2 * out + 1, total, r_ok)


@triton.jit
def combine(
    sums, maxima, out,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
    OUT_PHASES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The weighted values of a query head from those of its splits."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    head = tl.program_id(0)
    i = tl.arange(0, BLOCK_D)
    s = tl.arange(0, BLOCK_SPLITS)
    maximum = tl.load(maxima + 2 * (head * SPLITS + s), s < SPLITS, other=float("-inf"))
    total = tl.load(maxima + 2 * (head * SPLITS + s) + 1, s < SPLITS, other=0.0)
    weight = tl.exp2(maximum - tl.max(maximum, axis=0))
    mask = (s < SPLITS)[:, None] & (i < DIM)[None, :]
    parts = tl.load(sums + (head * SPLITS + s)[:, None] * DIM + i[None, :], mask, other=0.0)
    y = tl.sum(parts * weight[:, None], axis=0) / tl.sum(total * weight, axis=0)
    at = (head // HEADS) * (HEADS * DIM) + phase_index((head % HEADS) * DIM + i, HEADS * DIM, OUT_PHASES)
    tl.store(out + at, y.to(out.dtype.element_ty), i < DIM)


@dataclass(frozen=True)
class Turns:
    """Rotary tables of a stack: `inv_freq` (1 or rows, head_dim / 2) float32; `table` (rows, capacity, head_dim) in the
    model's dtype, cosines then sines; capacity 1 unless keys are kept unrotated. Positions are divided by `scale`."""

    inv_freq: Tensor
    table: Tensor
    scale: float
    unrotated: bool


def fill_turns(turns: Turns, seqlens: Tensor, *, pdl: bool = False) -> None:
    """Write the tables that the next token needs at `seqlens` (rows,) int32: once for all layers of a stack."""
    rows, capacity, dim = turns.table.shape
    block = 64 if turns.unrotated else 1
    rope[(rows, -(-capacity // block))](
        turns.inv_freq,
        seqlens,
        turns.table,
        turns.scale,
        0 if turns.inv_freq.shape[0] == 1 else dim // 2,
        capacity,
        HALF=dim // 2,
        BLOCK_H=next_power_of_2(dim // 2),
        BLOCK_S=block,
        ALL=turns.unrotated,
        PDL=pdl,
        num_warps=4 if turns.unrotated else 1,
        launch_pdl=pdl,
    )


@dataclass(frozen=True)
class Partial:
    """Scratch of `attention`: what the splits found."""

    sums: Tensor
    maxima: Tensor

    @classmethod
    def allocate(cls, rows: int, heads: int, kv_heads: int, dim: int, device: torch.device) -> Partial:
        """As many splits as fill the card, at least 1 and at most `MAX_SPLITS`."""
        programs = rows * kv_heads * -(-(heads // kv_heads) // QUERY_HEADS)
        splits = max(1, min(MAX_SPLITS, SPLITS_PER_SM * multiprocessors(device) // programs))
        sums = torch.empty(rows, heads, splits, dim, dtype=torch.float32, device=device)
        return cls(sums, torch.empty(rows, heads, splits, 2, dtype=torch.float32, device=device))


def attention(
    qkv: Tensor,
    turns: Turns,
    k_table: Tensor,
    v_table: Tensor,
    capacities: Tensor,
    seqlens: Tensor,
    alive: Tensor,
    partial: Partial,
    out: Tensor,
    *,
    num_kv_heads: int,
    out_phases: int = 1,
    pdl: bool = False,
) -> None:
    """Attend from one token a row to all before it and itself.

    Args:
        qkv: (rows, heads * head_dim + 2 * kv_heads * head_dim) float32, grouped per kv head: its queries, key, value.
        turns: filled for `seqlens`.
        k_table, v_table, capacities: (rows or more,) int64: addresses of caches (num_kv_heads, capacity, head_dim) in
            the dtype of `turns.table`, with room for one position more.
        seqlens, alive: (rows,) int32; caches of rows where `alive` is 0 stay as they are.
        out: (rows, heads * head_dim), written in `out_phases`.
    Changes: `out`, `partial` and the caches.
    """
    rows, heads, splits, dim = partial.sums.shape
    rep = heads // num_kv_heads
    attend[(rows * num_kv_heads * -(-rep // QUERY_HEADS), splits)](
        qkv,
        turns.table,
        k_table,
        v_table,
        capacities,
        seqlens,
        alive,
        partial.sums,
        partial.maxima,
        1.4426950408889634 / dim**0.5,
        qkv.stride(0),
        turns.table.shape[1],
        HEADS=heads,
        KV_HEADS=num_kv_heads,
        HALF=dim // 2,
        BLOCK_H=max(16, next_power_of_2(dim // 2)),
        BLOCK_R=QUERY_HEADS,
        BLOCK_S=POSITIONS,
        SPLITS=splits,
        STAGES=STAGES,
        UNROTATED=turns.unrotated,
        PDL=pdl,
        num_warps=4,
        launch_pdl=pdl,
    )
    combine[(rows * heads,)](
        partial.sums,
        partial.maxima,
        out,
        HEADS=heads,
        DIM=dim,
        BLOCK_D=next_power_of_2(dim),
        SPLITS=splits,
        BLOCK_SPLITS=next_power_of_2(splits),
        OUT_PHASES=out_phases,
        PDL=pdl,
        num_warps=4,
        launch_pdl=pdl,
    )
