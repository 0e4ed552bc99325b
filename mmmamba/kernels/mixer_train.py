"""What lies around the scan when a mixer is trained to give what an attention gives, a launch each, forward and
backward; importing needs Triton.

    mix_forward   convolution and SiLU of V, K, Q, step sizes with bias and softplus     reads and writes each once
    mix_backward  their gradients, SiLU's argument made again from the inputs
    gated_mse     norm of every head times SiLU(gate), its squared error and all gradients of that in one pass

V, K, Q come as a mixer's own product (rows V, K, Q) or as that of the attention it is seeded from (`grouped`: per kv
head its query heads, then key, then value), so that frozen rows are multiplied once for both. Sums and products are in
float32, rounded once at the end. Sums over tokens are made of one partial sum a program, in a fixed order.
"""

from __future__ import annotations

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# Triton reads the annotations of a kernel as marks of compile-time constants, so its pointers and numbers have none.
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmmamba.kernels.gemv import softplus
from mmmamba.kernels.launch import next_power_of_2

TOKENS = 16  # of a program of `mix_forward`: of one head, or of the steps
TOKENS_AT_ONCE = 8  # of `mix_backward`: what it sums stays in registers, and few of them
TOKENS_SUMMED = 256  # of a program of it
ROWS = 8  # tokens of a program of `gated_mse`


@triton.jit
def _column(slot, GROUPS: tl.constexpr, REP: tl.constexpr, DIM: tl.constexpr, GROUPED: tl.constexpr):
    """Where a head of V, K, Q begins in a row; slots count the heads of V, then those of K, then those of Q."""
    head = slot
    if GROUPED:
        query = slot - 2 * GROUPS
        of_query = (query // REP) * (REP + 2) + query % REP
        of_key = (slot - GROUPS) * (REP + 2) + REP
        of_value = slot * (REP + 2) + REP + 1
        head = tl.where(slot < GROUPS, of_value, tl.where(slot < 2 * GROUPS, of_key, of_query))
    return head * DIM


@triton.jit
def _looks_back(positions, batch, seqlen, t, SEGMENTS: tl.constexpr):
    """Whether the token before t belongs to the convolution's window: of the same segment, or of the row at all."""
    back = (t > 0) & (t < seqlen)
    if SEGMENTS:
        back = back & (tl.load(positions + batch * seqlen + t, t < seqlen, other=0) > 0)
    return back


@triton.jit
def _of_heads(v, k, q, slot, rows, d, mask, GROUPS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr):
    """A tile of one head, of contiguous v, k (tokens, GROUPS, DIM) and q (tokens, HEADS, DIM)."""
    if slot < GROUPS:
        value = tl.load(v + (rows * GROUPS + slot)[:, None] * DIM + d[None, :], mask, other=0.0)
    elif slot < 2 * GROUPS:
        value = tl.load(k + (rows * GROUPS + slot - GROUPS)[:, None] * DIM + d[None, :], mask, other=0.0)
    else:
        value = tl.load(q + (rows * HEADS + slot - 2 * GROUPS)[:, None] * DIM + d[None, :], mask, other=0.0)
    return value.to(tl.float32)


@triton.jit
def _slope(x):
    """Derivative of SiLU."""
    s = tl.sigmoid(x)
    return s * (1.0 + x * (1.0 - s))


@triton.jit
def _steps(step, dt_bias, dt, t, rows, ok, step_row, HEADS: tl.constexpr, BLOCK_H: tl.constexpr):
    h = tl.arange(0, BLOCK_H)
    mask = ok[:, None] & (h < HEADS)[None, :]
    value = tl.load(step + t[:, None] * step_row + h[None, :], mask, other=0.0).to(tl.float32)
    value += tl.load(dt_bias + h, h < HEADS, other=0.0).to(tl.float32)[None, :]
    tl.store(dt + rows[:, None] * HEADS + h[None, :], softplus(value), mask)


@triton.jit
def _step_gradients(
    step, dt_bias, ddt, dstep, sums, start, end, step_row, dstep_row,
    HEADS: tl.constexpr, BLOCK_H: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    h = tl.arange(0, BLOCK_H)
    shift = tl.load(dt_bias + h, h < HEADS, other=0.0).to(tl.float32)[None, :]
    of_bias = tl.zeros((TOKENS, BLOCK_H), tl.float32)
    for at in range(start, end, TOKENS):
        t = at + tl.arange(0, TOKENS)
        mask = (t < end)[:, None] & (h < HEADS)[None, :]
        value = tl.load(step + t[:, None] * step_row + h[None, :], mask, other=0.0).to(tl.float32) + shift
        grad = tl.load(ddt + t[:, None] * HEADS + h[None, :], mask, other=0.0) * tl.sigmoid(value)
        of_bias += grad
        tl.store(dstep + t[:, None] * dstep_row + h[None, :], grad.to(dstep.dtype.element_ty), mask)
    tl.store(sums + h, tl.sum(of_bias, axis=0), h < HEADS)


@triton.jit
def mix_tiles(
    u, step, taps, bias, dt_bias, positions, v, k, q, dt, seqlen, u_batch, u_row, step_batch, step_row,
    GROUPS: tl.constexpr, REP: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr,
    TOKENS: tl.constexpr, GROUPED: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of tokens, heads of V, K, Q and one for the steps, batch)."""
    HEADS: tl.constexpr = GROUPS * REP
    slot, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    t = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    ok = t < seqlen
    rows = batch * seqlen + t
    if slot == 2 * GROUPS + HEADS:
        _steps(step + batch * step_batch, dt_bias, dt, t, rows, ok, step_row, HEADS, BLOCK_H)
    else:
        d = tl.arange(0, BLOCK_D)
        d_ok = d < DIM
        mask = ok[:, None] & d_ok[None, :]
        back = _looks_back(positions, batch, seqlen, t, SEGMENTS)[:, None] & d_ok[None, :]
        place = u + batch * u_batch + t[:, None] * u_row + (_column(slot, GROUPS, REP, DIM, GROUPED) + d)[None, :]
        now = tl.load(place, mask, other=0.0).to(tl.float32)
        before = tl.load(place - u_row, back, other=0.0).to(tl.float32)
        c = slot * DIM + d
        tap0 = tl.load(taps + 2 * c, d_ok, other=0.0).to(tl.float32)[None, :]
        tap1 = tl.load(taps + 2 * c + 1, d_ok, other=0.0).to(tl.float32)[None, :]
        mixed = tl.load(bias + c, d_ok, other=0.0).to(tl.float32)[None, :] + before * tap0 + now * tap1
        out = (mixed * tl.sigmoid(mixed)).to(v.dtype.element_ty)
        if slot < GROUPS:
            tl.store(v + (rows * GROUPS + slot)[:, None] * DIM + d[None, :], out, mask)
        elif slot < 2 * GROUPS:
            tl.store(k + (rows * GROUPS + slot - GROUPS)[:, None] * DIM + d[None, :], out, mask)
        else:
            tl.store(q + (rows * HEADS + slot - 2 * GROUPS)[:, None] * DIM + d[None, :], out, mask)


@triton.jit
def mix_gradients(
    u, step, taps, bias, dt_bias, positions, dv, dk, dq, ddt, du, dstep, sums, step_sums,
    seqlen, summed, u_batch, u_row, step_batch, step_row, dstep_batch, dstep_row,
    GROUPS: tl.constexpr, REP: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr,
    TOKENS: tl.constexpr, GROUPED: tl.constexpr, SEGMENTS: tl.constexpr, INPUT: tl.constexpr,
):  # fmt: skip
    """Grid (runs of `summed` tokens, heads of V, K, Q and one for the steps, batch). `sums` (batch, runs, 3, channels):
    those of the taps and the bias; `step_sums` (batch, runs, num_heads). With INPUT `du` (tokens, channels) too."""
    HEADS: tl.constexpr = GROUPS * REP
    CHANNELS: tl.constexpr = (2 * GROUPS + HEADS) * DIM
    slot, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * summed
    end = tl.minimum(start + summed, seqlen)
    run = batch * tl.num_programs(0) + tl.program_id(0)
    if slot == 2 * GROUPS + HEADS:
        _step_gradients(
            step + batch * step_batch, dt_bias, ddt + batch * seqlen * HEADS, dstep + batch * dstep_batch,
            step_sums + run * HEADS, start, end, step_row, dstep_row, HEADS, BLOCK_H, TOKENS,
        )  # fmt: skip
    else:
        d = tl.arange(0, BLOCK_D)
        d_ok = d < DIM
        c = slot * DIM + d
        tap0 = tl.load(taps + 2 * c, d_ok, other=0.0).to(tl.float32)[None, :]
        tap1 = tl.load(taps + 2 * c + 1, d_ok, other=0.0).to(tl.float32)[None, :]
        shift = tl.load(bias + c, d_ok, other=0.0).to(tl.float32)[None, :]
        column = _column(slot, GROUPS, REP, DIM, GROUPED) + d
        of_tap0 = tl.zeros((TOKENS, BLOCK_D), tl.float32)
        of_tap1 = tl.zeros((TOKENS, BLOCK_D), tl.float32)
        of_bias = tl.zeros((TOKENS, BLOCK_D), tl.float32)
        for at in range(start, end, TOKENS):
            t = at + tl.arange(0, TOKENS)
            rows = batch * seqlen + t
            mask = (t < end)[:, None] & d_ok[None, :]
            back = _looks_back(positions, batch, seqlen, t, SEGMENTS)[:, None] & mask
            place = u + batch * u_batch + t[:, None] * u_row + column[None, :]
            now = tl.load(place, mask, other=0.0).to(tl.float32)
            before = tl.load(place - u_row, back, other=0.0).to(tl.float32)
            grad = _of_heads(dv, dk, dq, slot, rows, d, mask, GROUPS, HEADS, DIM)
            grad *= _slope(shift + before * tap0 + now * tap1)
            of_tap0 += grad * before
            of_tap1 += grad * now
            of_bias += grad
            if INPUT:
                # The token after looks back at this one, if it is in its window; it may be another program's.
                after = _looks_back(positions, batch, seqlen, t + 1, SEGMENTS)[:, None] & mask
                later = tl.load(place + u_row, after, other=0.0).to(tl.float32)
                grad_after = _of_heads(dv, dk, dq, slot, rows + 1, d, after, GROUPS, HEADS, DIM)
                grad_after *= _slope(shift + now * tap0 + later * tap1)
                out = (grad * tap1 + grad_after * tap0).to(du.dtype.element_ty)
                tl.store(du + rows[:, None] * CHANNELS + c[None, :], out, mask)
        tl.store(sums + (run * 3) * CHANNELS + c, tl.sum(of_tap0, axis=0), d_ok)
        tl.store(sums + (run * 3 + 1) * CHANNELS + c, tl.sum(of_tap1, axis=0), d_ok)
        tl.store(sums + (run * 3 + 2) * CHANNELS + c, tl.sum(of_bias, axis=0), d_ok)


@triton.jit
def gated_errors(
    y, gate, weight, target, real, total, dy, dgate, weight_sums, losses,
    tokens, eps, factor, gate_row, dgate_row,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """ROWS tokens a program, one after the other. `weight_sums` (programs, DIM), `losses` (programs,)."""
    h, d = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    mask = (h < HEADS)[:, None] & (d < DIM)[None, :]
    place = h[:, None] * DIM + d[None, :]
    scale = tl.load(weight + d, d < DIM, other=0.0).to(tl.float32)[None, :]
    share = 1.0 / (HEADS * DIM)
    if WEIGHTED:
        share /= tl.load(total)
    else:
        share /= tokens
    of_weight = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    of_loss = tl.zeros((BLOCK_H,), tl.float32)
    for i in range(ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + i
        inside = mask & (row < tokens)
        of_token = row * (HEADS * DIM) + place
        value = tl.load(y + of_token, inside, other=0.0).to(tl.float32)
        g = tl.load(gate + row * gate_row + place, inside, other=0.0).to(tl.float32)
        wanted = tl.load(target + of_token, inside, other=0.0).to(tl.float32)
        part = share
        if WEIGHTED:
            part *= tl.load(real + row, row < tokens, other=0.0)
        inverse = tl.rsqrt(tl.sum(value * value, axis=1) / DIM + eps)[:, None]
        unit = value * inverse
        normed = unit * scale
        passed = g * tl.sigmoid(g)
        # The mixer's output as it is handed on: in the dtype of its products.
        error = (normed * passed).to(y.dtype.element_ty).to(tl.float32) - wanted
        of_loss += tl.sum(error * error, axis=1) * part
        grad = error * (2.0 * factor * part)
        grad_normed = grad * passed
        of_weight += grad_normed * unit
        grad_unit = grad_normed * scale
        grad_y = inverse * (grad_unit - unit * (tl.sum(grad_unit * unit, axis=1) / DIM)[:, None])
        tl.store(dy + of_token, grad_y.to(dy.dtype.element_ty), inside)
        grad_gate = (grad * normed * _slope(g)).to(dgate.dtype.element_ty)
        tl.store(dgate + row * dgate_row + place, grad_gate, inside)
    tl.store(weight_sums + tl.program_id(0) * DIM + d, tl.sum(of_weight, axis=0), d < DIM)
    tl.store(losses + tl.program_id(0), tl.sum(of_loss, axis=0))


class Projected(NamedTuple):
    """A mixer's projected rows and what they pass before the scan.

    u: (batch, seqlen, channels), rows of any stride: V, K, Q, or `grouped` per kv head.
    step: (batch, seqlen, num_heads), rows of any stride, before bias and softplus.
    taps: (channels, 2).    bias: (channels,).    dt_bias: (num_heads,).
    positions: (batch, seqlen) int64, of each token in its segment; None: a row is one segment.
    """

    u: Tensor
    step: Tensor
    taps: Tensor
    bias: Tensor
    dt_bias: Tensor
    positions: Tensor | None
    num_kv_heads: int
    head_dim: int
    grouped: bool

    @property
    def meta(self) -> dict[str, int | bool]:
        heads = self.dt_bias.shape[0]
        return {
            "GROUPS": self.num_kv_heads,
            "REP": heads // self.num_kv_heads,
            "DIM": self.head_dim,
            "BLOCK_D": next_power_of_2(self.head_dim),
            "BLOCK_H": next_power_of_2(heads),
            "GROUPED": self.grouped,
            "SEGMENTS": self.positions is not None,
            "num_warps": 4,
        }

    @property
    def slots(self) -> int:
        """Heads of V, K, Q, and one more for the steps."""
        return self.u.shape[2] // self.head_dim + 1

    @property
    def pointers(self) -> tuple[Tensor, ...]:
        positions = self.u if self.positions is None else self.positions  # without segments any pointer will do
        return self.u, self.step, self.taps.contiguous(), self.bias, self.dt_bias, positions

    @property
    def strides(self) -> tuple[int, ...]:
        return *self.u.stride()[:2], *self.step.stride()[:2]


class MixGradients(NamedTuple):
    """Of the taps (channels, 2), the convolution's bias, the steps' bias, float32; of u where it was asked for."""

    taps: Tensor
    bias: Tensor
    dt_bias: Tensor
    u: Tensor | None


def mix_forward(given: Projected) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """V, K (batch, seqlen, num_kv_heads, head_dim), Q (.. num_heads ..) in the dtype of u, and dt (batch, seqlen,
    num_heads) float32."""
    batch, seqlen, channels = given.u.shape
    heads, groups, dim = given.dt_bias.shape[0], given.num_kv_heads, given.head_dim
    assert channels == (2 * groups + heads) * dim
    assert given.u.stride(2) == given.step.stride(2) == 1
    v, k = (given.u.new_empty(batch, seqlen, groups, dim) for _ in range(2))
    q = given.u.new_empty(batch, seqlen, heads, dim)
    dt = torch.empty(batch, seqlen, heads, dtype=torch.float32, device=given.u.device)
    mix_tiles[triton.cdiv(seqlen, TOKENS), given.slots, batch](
        *given.pointers, v, k, q, dt, seqlen, *given.strides, TOKENS=TOKENS, **given.meta
    )
    return v, k, q, dt


def mix_backward(
    given: Projected, dv: Tensor, dk: Tensor, dq: Tensor, ddt: Tensor, dstep: Tensor, *, need_u: bool
) -> MixGradients:
    """From the gradients of what `mix_forward` returns, contiguous, to those of what trains.

    Args:
        dstep: (batch, seqlen, num_heads), rows of any stride; written.
        need_u: whether the gradient of u, contiguous, is asked for; only of a mixer's own product.
    """
    assert not (need_u and given.grouped), "what an attention projected is frozen"
    assert all(t.is_contiguous() for t in (dv, dk, dq, ddt))
    batch, seqlen, channels = given.u.shape
    runs = triton.cdiv(seqlen, TOKENS_SUMMED)
    sums = torch.empty(batch * runs, 3, channels, dtype=torch.float32, device=given.u.device)
    step_sums = torch.empty(batch * runs, given.dt_bias.shape[0], dtype=torch.float32, device=given.u.device)
    du = given.u.new_empty(given.u.shape) if need_u else None
    mix_gradients[runs, given.slots, batch](
        *given.pointers, dv, dk, dq, ddt, given.u if du is None else du, dstep, sums, step_sums,
        seqlen, TOKENS_SUMMED, *given.strides, *dstep.stride()[:2], TOKENS=TOKENS_AT_ONCE, INPUT=need_u, **given.meta,
    )  # fmt: skip
    total = sums.sum(dim=0)
    return MixGradients(total[:2].T, total[2], step_sums.sum(dim=0), du)


def gated_mse(
    y: Tensor,
    gate: Tensor,
    weight: Tensor,
    target: Tensor,
    real: Tensor | None,
    dgate: Tensor,
    *,
    eps: float,
    factor: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean squared error of RMSNorm(y) * weight * SiLU(gate), heads side by side, against `target`.

    Args:
        y: (batch, seqlen, num_heads, head_dim), contiguous.    target: (batch, seqlen, hidden_size), contiguous.
        gate, dgate: (batch, seqlen, hidden_size), rows of any stride; the second gets the gradient of the first.
        real: (batch, seqlen) float32, weights of the tokens in the mean; None: all the same.
        factor: of the loss in the gradients.
    Returns: the loss; the gradients of y, in its dtype, and of `weight`, float32.
    """
    batch, seqlen, heads, dim = y.shape
    assert all(t.is_contiguous() for t in (y, target))
    for rows in (gate, dgate):
        assert rows.stride(2) == 1
        assert batch == 1 or rows.stride(0) == seqlen * rows.stride(1), "rows stand equally far apart"
    tokens, dy = batch * seqlen, torch.empty_like(y)
    programs = triton.cdiv(tokens, ROWS)
    weight_sums = torch.empty(programs, dim, dtype=torch.float32, device=y.device)
    losses = torch.empty(programs, dtype=torch.float32, device=y.device)
    real = None if real is None else real.float().contiguous()
    total = weight_sums if real is None else real.sum().clamp(min=1.0)
    gated_errors[(programs,)](
        y, gate, weight, target, total if real is None else real, total, dy, dgate, weight_sums, losses,
        tokens, eps, factor, gate.stride(1), dgate.stride(1),
        HEADS=heads, DIM=dim, BLOCK_H=next_power_of_2(heads), BLOCK_D=next_power_of_2(dim),
        ROWS=ROWS, WEIGHTED=real is not None, num_warps=4,
    )  # fmt: skip
    return losses.sum(), dy, weight_sums.sum(dim=0)
