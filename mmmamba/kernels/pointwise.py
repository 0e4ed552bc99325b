"""What lies between the matrix products of reading a prompt, a launch each instead of many; importing needs Triton.

    rms_norm     x / rms(x) * weight over rows                                 reads and writes x once
    mix_inputs   a mixer's projected rows: convolution and SiLU of V, K, Q; step sizes with bias and softplus
    gated_norm   norm of every head times SiLU(gate)
    swiglu       SiLU(a) * b
    chunk_steps  step sizes by head in whole chunks, and their running sums of log decay

Sums and products are in float32, rounded once at the end (the torch forms round after every operation).
"""

from __future__ import annotations

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# Triton reads the annotations of a kernel as marks of compile-time constants, so its pointers and numbers have none.
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from mmmamba.kernels.launch import next_power_of_2

TOKENS = 8  # of a program of `mix_inputs`
CHANNELS = 512
ELEMENTS = 2048  # of a program of `swiglu`


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def norm_rows(x, weight, out, eps, DIM: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    ok = i < DIM
    value = tl.load(x + row * DIM + i, ok, other=0.0).to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value, axis=0) / DIM + eps)
    value *= tl.load(weight + i, ok, other=0.0).to(tl.float32)
    tl.store(out + row * DIM + i, value.to(out.dtype.element_ty), ok)


@triton.jit
def mix_rows(
    u, conv_state, taps, bias, dt_bias, lengths, vkq, dt, seqlen, u_row,
    CONV: tl.constexpr, GATE: tl.constexpr, HEADS: tl.constexpr, BLOCK_H: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of tokens, tiles of channels and one for the steps, batch). `conv_state` (batch, CONV)."""
    batch = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    t_ok = t < seqlen
    rows = (batch * seqlen + t)[:, None]
    if tl.program_id(1) == tl.num_programs(1) - 1:
        h = tl.arange(0, BLOCK_H)
        h_mask = t_ok[:, None] & (h < HEADS)[None, :]
        step = tl.load(u + rows * u_row + CONV + GATE + h[None, :], h_mask, other=0.0).to(tl.float32)
        step += tl.load(dt_bias + h, h < HEADS, other=0.0).to(tl.float32)[None, :]
        # As `gemv.softplus`: the identity above 20, a series below -5, where log(1 + e) would lose the digits of e.
        e = tl.exp(tl.minimum(step, 20.0))
        step = tl.where(step > 20.0, step, tl.where(step < -5.0, e - 0.5 * e * e, tl.log(1.0 + e)))
        if lengths is not None:  # a step of no length moves no state
            step = tl.where((t < tl.load(lengths + batch))[:, None], step, 0.0)
        tl.store(dt + rows * HEADS + h[None, :], step, h_mask)
    else:
        c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
        c_ok = c < CONV
        mask = t_ok[:, None] & c_ok[None, :]
        place = u + rows * u_row + c[None, :]
        now = tl.load(place, mask, other=0.0).to(tl.float32)
        inside = (t > 0)[:, None]
        before = tl.load(place - u_row, mask & inside, other=0.0).to(tl.float32)
        if tl.program_id(0) == 0:
            kept = tl.load(conv_state + batch * CONV + c, c_ok, other=0.0).to(tl.float32)
            before = tl.where(inside, before, kept[None, :])
        tap0 = tl.load(taps + 2 * c, c_ok, other=0.0).to(tl.float32)
        tap1 = tl.load(taps + 2 * c + 1, c_ok, other=0.0).to(tl.float32)
        shift = tl.load(bias + c, c_ok, other=0.0).to(tl.float32)
        mixed = _silu(shift[None, :] + before * tap0[None, :] + now * tap1[None, :])
        tl.store(vkq + rows * CONV + c[None, :], mixed.to(vkq.dtype.element_ty), mask)


@triton.jit
def gated_rows(
    y, gate, weight, out, eps, gate_row,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One token a program."""
    row = tl.program_id(0).to(tl.int64)
    h, d = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    mask = (h < HEADS)[:, None] & (d < DIM)[None, :]
    place = h[:, None] * DIM + d[None, :]
    value = tl.load(y + row * (HEADS * DIM) + place, mask, other=0.0).to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value, axis=1) / DIM + eps)[:, None]
    value *= tl.load(weight + d, d < DIM, other=0.0).to(tl.float32)[None, :]
    value *= _silu(tl.load(gate + row * gate_row + place, mask, other=0.0).to(tl.float32))
    tl.store(out + row * (HEADS * DIM) + place, value.to(out.dtype.element_ty), mask)


@triton.jit
def swiglu_flat(a, b, out, num, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = i < num
    value = _silu(tl.load(a + i, ok, other=0.0).to(tl.float32)) * tl.load(b + i, ok, other=0.0).to(tl.float32)
    tl.store(out + i, value.to(out.dtype.element_ty), ok)


@triton.jit
def step_chunks(dt, A, steps, cum, seqlen, chunk_len, padded, num_heads, BLOCK: tl.constexpr):
    """Grid (chunks, num_heads, batch); dt (batch, seqlen, num_heads) to both results (batch, num_heads, padded)."""
    chunk, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i = tl.arange(0, BLOCK)
    t = chunk * chunk_len + i
    inside = i < chunk_len
    step = tl.load(dt + (batch * seqlen + t) * num_heads + head, inside & (t < seqlen), other=0.0)
    place = (batch * num_heads + head) * padded + t
    tl.store(steps + place, step, inside)
    tl.store(cum + place, tl.cumsum(step * tl.load(A + head), axis=0), inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `layers.RMSNorm`: x (..., dim) contiguous or not, in the dtype of `weight`."""
    x = x.contiguous()
    dim = x.shape[-1]
    out = torch.empty_like(x, dtype=weight.dtype)
    norm_rows[(x.numel() // dim,)](
        x, weight, out, eps, DIM=dim, BLOCK=next_power_of_2(dim), num_warps=8 if dim >= 2048 else 4
    )
    return out


def mix_inputs(
    u: Tensor,
    conv_state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    hidden_size: int,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Projected rows u (batch, seqlen, conv_dim + hidden_size + num_heads) to vkq (batch, seqlen, conv_dim) after
    convolution and SiLU, and dt (batch, seqlen, num_heads) float32 after softplus.

    Args:
        conv_state: (batch, conv_dim, 1), moved on to the last token.
        conv_weight: (conv_dim, 2), contiguous.
        lengths: (batch,) int64, 1 or more: tokens of a row that count, where padding follows (its dt is 0).
    """
    batch, seqlen, width = u.shape
    conv, heads = conv_bias.shape[0], dt_bias.shape[0]
    assert u.is_contiguous() and width == conv + hidden_size + heads  # noqa: PT018 (said of one tensor)
    vkq = torch.empty(batch, seqlen, conv, dtype=u.dtype, device=u.device)
    dt = torch.empty(batch, seqlen, heads, dtype=torch.float32, device=u.device)
    grid = (triton.cdiv(seqlen, TOKENS), triton.cdiv(conv, CHANNELS) + 1, batch)
    mix_rows[grid](
        u,
        conv_state,
        conv_weight,
        conv_bias,
        dt_bias,
        lengths,
        vkq,
        dt,
        seqlen,
        width,
        CONV=conv,
        GATE=hidden_size,
        HEADS=heads,
        BLOCK_H=next_power_of_2(heads),
        TOKENS=TOKENS,
        CHANNELS=CHANNELS,
        num_warps=4,
    )
    if lengths is None:
        conv_state.copy_(u[:, -1, :conv, None])
    else:
        last = (lengths - 1)[:, None, None].expand(-1, 1, conv)
        conv_state.copy_(u[..., :conv].gather(1, last).mT)
    return vkq, dt


def gated_norm(y: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `mixer.GatedRMSNorm` with the heads side by side: y (batch, seqlen, num_heads, head_dim) contiguous, gate
    (batch, seqlen, hidden_size) with rows of any stride; returns (batch, seqlen, hidden_size)."""
    batch, seqlen, heads, dim = y.shape
    assert y.is_contiguous() and gate.stride(-1) == 1  # noqa: PT018
    assert batch == 1 or gate.stride(0) == seqlen * gate.stride(1), "rows of the gate stand equally far apart"
    out = torch.empty(batch, seqlen, heads * dim, dtype=y.dtype, device=y.device)
    gated_rows[(batch * seqlen,)](
        y,
        gate,
        weight,
        out,
        eps,
        gate.stride(1),
        HEADS=heads,
        DIM=dim,
        BLOCK_H=next_power_of_2(heads),
        BLOCK_D=next_power_of_2(dim),
        num_warps=4,
    )
    return out


def swiglu(a: Tensor, b: Tensor) -> Tensor:
    """SiLU(a) * b, elementwise over contiguous tensors of one shape; written over `a`."""
    assert a.is_contiguous() and b.is_contiguous()  # noqa: PT018
    swiglu_flat[(triton.cdiv(a.numel(), ELEMENTS),)](a, b, a, a.numel(), BLOCK=ELEMENTS, num_warps=4)
    return a


def chunk_steps(dt: Tensor, A: Tensor, chunk_len: int) -> tuple[Tensor, Tensor]:
    """(step sizes, log decay since the chunk's start), both (batch, num_heads, whole chunks) float32, of dt (batch,
    seqlen, num_heads) float32; steps behind the sequence are 0."""
    batch, seqlen, heads = dt.shape
    num_chunks = triton.cdiv(seqlen, chunk_len)
    steps = torch.empty(batch, heads, num_chunks * chunk_len, dtype=torch.float32, device=dt.device)
    cum = torch.empty_like(steps)
    step_chunks[(num_chunks, heads, batch)](
        dt.contiguous(),
        A,
        steps,
        cum,
        seqlen,
        chunk_len,
        num_chunks * chunk_len,
        heads,
        BLOCK=next_power_of_2(chunk_len),
        num_warps=1,
    )
    return steps, cum


def disagreement(device: torch.device) -> float:
    """The largest relative RMS difference of any of these from torch's operators, on small random inputs; NaN if any
    result is. A kernel that is wrong on a card is off by about 1, rounding by less than 1e-5."""
    draw = torch.Generator().manual_seed(0)
    heads, dim, conv, seqlen = 3, 16, 80, 11
    hidden = heads * dim

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).to(device)

    x, weight, head_weight, y = random(2, seqlen, hidden), random(hidden), random(dim), random(2, seqlen, heads, dim)
    u, kept, taps, bias, dt_bias = (
        random(2, seqlen, conv + hidden + heads),
        random(2, conv, 1),
        random(conv, 2),
        random(conv),
        random(heads),
    )
    padded = torch.cat([kept.mT, u[..., :conv]], dim=1)
    vkq, dt = mix_inputs(u, kept.clone(), taps, bias, dt_bias, hidden)
    gate = u[..., conv : conv + hidden]
    gated = F.rms_norm(y, (dim,), head_weight, 1e-5).flatten(2) * F.silu(gate)
    A = -random(heads).abs()
    chunk = 4
    padding = (0, 0, 0, -seqlen % chunk)
    steps = (F.pad(dt, padding) * A).unflatten(1, (-1, chunk)).cumsum(2).flatten(1, 2).mT
    pairs = (
        (rms_norm(x, weight, 1e-5), F.rms_norm(x, (hidden,), weight, 1e-5)),
        (vkq, F.silu(bias + padded[:, :-1] * taps[:, 0] + padded[:, 1:] * taps[:, 1])),
        (dt, F.softplus(u[..., conv + hidden :] + dt_bias)),
        (gated_norm(y, gate, head_weight, 1e-5), gated),
        (swiglu(x.clone(), y.flatten(2)), F.silu(x) * y.flatten(2)),
        (chunk_steps(dt, A, chunk)[1], steps),
    )
    return float(torch.stack([(got - want).norm() / want.norm() for got, want in pairs]).max())
