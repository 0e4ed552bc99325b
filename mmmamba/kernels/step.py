"""The recurrence of one token with everything around it: state update, read-out, norm of the head, gate.

One program owns one head of one row: it holds the head's whole state, (head_dim, d_state) float32, in registers. The
state does not depend on the kernel before, so its loads start before that one has ended.
Bytes to move: the state once in and once out, 2 * head_dim * d_state * 4; the rest is small.
"""

from __future__ import annotations

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# Triton reads the annotations of a kernel as marks of compile-time constants, so its pointers and numbers have none.
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mmmamba.kernels.gemv import phase_index
from mmmamba.kernels.launch import multiprocessors, next_power_of_2


@triton.jit
def ssm_step(
    u, A, norm, state_table, alive, out, eps, U_STRIDE,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, OUT_PHASES: tl.constexpr,
    EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """h <- exp(dt A) h + (dt v) k^T,  y = h q,  out = RMSNorm(y) * norm * gate.

    u holds v, k, q, gate (after SiLU), dt.
    """
    row = tl.program_id(0) // HEADS
    head = tl.program_id(0) % HEADS
    kv = head // (HEADS // KV_HEADS)
    # Allocations begin at multiples of 16 bytes and more, and a state's size is one too: said for 16-byte loads.
    base = tl.multiple_of(tl.load(state_table + row).to(tl.pointer_type(tl.float32)), 16)
    i = tl.arange(0, BLOCK)
    ok = i < DIM
    place = head * DIM * DIM + i[:, None] * DIM + i[None, :]
    mask = ok[:, None] & ok[None, :]
    h = tl.load(base + place, mask, other=0.0)
    if EARLY:  # as in `gemv`: what no kernel writes is read before the wait
        decay = tl.load(A + head)
        weight = tl.load(norm + i, ok, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
        # Only now: what starts before this point may read a state, and must find all that was written to it before.
        gdc_launch_dependents()
    KV: tl.constexpr = KV_HEADS * DIM
    HIDDEN: tl.constexpr = HEADS * DIM
    u += row * U_STRIDE
    v = tl.load(u + kv * DIM + i, ok, other=0.0)
    k = tl.load(u + KV + kv * DIM + i, ok, other=0.0)
    q = tl.load(u + 2 * KV + head * DIM + i, ok, other=0.0)
    gate = tl.load(u + 2 * KV + HIDDEN + head * DIM + i, ok, other=0.0)
    dt = tl.load(u + 2 * KV + 2 * HIDDEN + head)
    going = tl.load(alive + row) != 0
    if not EARLY:
        decay = tl.load(A + head)
    h = h * tl.exp(dt * decay) + (dt * v)[:, None] * k[None, :]
    tl.store(base + place, h, mask & going)
    y = tl.sum(h * q[None, :], axis=1)
    y *= tl.rsqrt(tl.sum(y * y, axis=0) / DIM + eps)
    if not EARLY:
        weight = tl.load(norm + i, ok, other=0.0).to(tl.float32)
    y *= weight * gate
    at = row * HIDDEN + phase_index(head * DIM + i, HIDDEN, OUT_PHASES)
    tl.store(out + at, y.to(out.dtype.element_ty), ok)


def step(
    u: Tensor,
    A: Tensor,
    norm: Tensor,
    state_table: Tensor,
    alive: Tensor,
    out: Tensor,
    *,
    num_kv_heads: int,
    eps: float,
    out_phases: int = 1,
    pdl: bool = False,
) -> None:
    """Advance the states of all rows by one token.

    Args:
        u: (rows, mixer_dim) float32 as `gemv.project` with a mixer leaves it.
        A: (num_heads,) float32, negative.           norm: (head_dim,).
        state_table: (rows or more,) int64, addresses of float32 states (num_heads, head_dim, head_dim).
        alive: (rows,) int32; states of rows where it is 0 stay as they are.
        out: (rows, num_heads * head_dim), written in `out_phases`.
        pdl: as `gemv.project` takes it.
    Changes: `out` and the states.
    """
    rows, heads, dim = u.shape[0], A.shape[0], norm.shape[0]
    block = next_power_of_2(dim)
    # Few programs: more warps each, so that the loads of a state are in flight at once. Many: two at a time on a
    # multiprocessor, so that one loads while the other stores; for that a thread may hold 128 registers.
    few = rows * heads <= multiprocessors(u.device)
    warps = max(1, min(16 if few else 8, block * block // 1024))
    ssm_step[(rows * heads,)](
        u,
        A,
        norm,
        state_table,
        alive,
        out,
        eps,
        u.stride(0),
        HEADS=heads,
        KV_HEADS=num_kv_heads,
        DIM=dim,
        BLOCK=block,
        OUT_PHASES=out_phases,
        EARLY=few,  # many have no registers left for it
        PDL=pdl,
        num_warps=warps,
        maxnreg=None if few else 128,
        launch_pdl=pdl,
    )
