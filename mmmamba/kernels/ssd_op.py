"""The training scan in Triton as an operator of torch: forward and backward, opaque to `torch.compile`, which so keeps
a block in one graph. Importing needs Triton."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from mmmamba.kernels import fused_ops, ssd_triton
from mmmamba.kernels.chunked import ssd_scan_chunked
from mmmamba.kernels.pointwise import chunk_steps
from mmmamba.kernels.reference import check_state
from mmmamba.kernels.segmented import infers_on_cuda, product_dtype

MAX_DIM = 128  # of a head and of the state: tiles of both are held whole
_STATE_BLOCK = 1024


def ssd_scan_triton(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None = None,
    *,
    segment_ids: Tensor | None = None,
    chunk_size: int = 64,
    need_state: bool = True,
) -> tuple[Tensor, Tensor]:
    """Arguments and results as `ssd_scan_ref`. Under autocast x, B and C are rounded to its dtype, as products would.

    float64, and heads or states wider than 128, go to the torch form.

    Args: need_state: without it the second result is empty, and a sequence of one chunk makes no states at all.
    Raises: ValueError if initial_state is narrower than float32, or chunk_size is below 1.
    """
    dtype = product_dtype(x)
    if dtype == torch.float64 or max(x.shape[-1], B.shape[-1]) > MAX_DIM:
        return ssd_scan_chunked(x, dt, A, B, C, initial_state, segment_ids=segment_ids, chunk_size=chunk_size)
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be 1 or more")
    if initial_state is not None:
        check_state(initial_state)
    narrow = (t.to(dtype) for t in (x, B, C))
    x, B, C = (t if t.stride(-1) == 1 else t.contiguous() for t in narrow)
    if infers_on_cuda(x):
        plan = _Plan.of(x, B, C, segment_ids, chunk_size)
        fused = fused_ops(x) is not None
        steps = chunk_steps(dt.float(), A.float(), plan.chunk_len) if fused else plan.steps(dt.float(), A.float())
        y, states = _launch(plan, x, B, C, *steps, initial_state, segment_ids, need_state)
        return y, states[:, -1] if states.numel() else states
    y, final, _ = torch.ops.mmmamba.ssd_forward(
        x, dt.float(), A.float(), B, C, initial_state, segment_ids, chunk_size, need_state
    )
    return y, final


class _Plan(NamedTuple):
    """Sizes of a scan and what its kernels are compiled for."""

    batch: int
    seqlen: int
    num_heads: int
    groups: int
    head_dim: int
    d_state: int
    chunk_len: int
    num_chunks: int
    meta: dict[str, Any]

    @classmethod
    def of(cls, x: Tensor, B: Tensor, C: Tensor, segment_ids: Tensor | None, chunk_size: int) -> _Plan:
        batch, seqlen, groups, head_dim = x.shape
        num_heads, d_state = C.shape[2], C.shape[3]
        chunk_len = min(chunk_size, seqlen)
        wide = max(head_dim, d_state) > 64
        tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
        # Without tensor cores a tile's products are made in registers: small ones, or they spill.
        block = 64 if tf32 or x.dtype != torch.float32 else 32
        meta = {
            "P": head_dim,
            "N": d_state,
            "BLOCK_P": max(16, triton.next_power_of_2(head_dim)),
            "BLOCK_N": max(16, triton.next_power_of_2(d_state)),
            "BLOCK": min(block, max(16, triton.next_power_of_2(chunk_len))),
            "SEGMENTS": segment_ids is not None,
            "PRECISION": "tf32" if tf32 else "ieee",
            "num_warps": 8 if wide else 4,
            "num_stages": 2,
        }
        return cls(batch, seqlen, num_heads, groups, head_dim, d_state, chunk_len, -(-seqlen // chunk_len), meta)

    @property
    def padded(self) -> int:
        return self.num_chunks * self.chunk_len

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.seqlen, self.chunk_len, self.padded, self.num_heads

    def grid(self, heads: int) -> tuple[int, int, int]:
        """One block for each tile of each chunk."""
        return self.num_chunks * triton.cdiv(self.chunk_len, self.meta["BLOCK"]), heads, self.batch

    def new_states(self, like: Tensor) -> Tensor:
        shape = (self.batch, self.num_chunks + 1, self.num_heads, self.head_dim, self.d_state)
        return torch.empty(shape, dtype=torch.float32, device=like.device)

    def steps(self, dt: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        """(dt, log decay since the chunk's start), both (batch, num_heads, padded), float32."""
        dt = F.pad(dt.transpose(1, 2), (0, self.padded - self.seqlen)).contiguous()
        steps = (dt * A[:, None]).view(self.batch, self.num_heads, self.num_chunks, self.chunk_len)
        return dt, steps.cumsum(dim=-1).view_as(dt)

    def fill_states(
        self, states: Tensor, x: Tensor, B: Tensor, cum: Tensor, dt: Tensor, seg: Tensor, *, reverse: bool
    ) -> None:
        """Slots of `states` from what the chunks add and the slot that is there: the first, or in reverse the last."""
        meta = {name: self.meta[name] for name in ("SEGMENTS",)} | {"REVERSE": reverse}
        block_p = min(64, self.meta["BLOCK_P"])
        grid = (self.num_chunks * triton.cdiv(self.head_dim, block_p), self.num_heads, self.batch)
        ssd_triton.chunk_states[grid](
            x, B, cum, dt, seg, states, *self.sizes, self.num_heads // x.shape[2], self.num_heads // B.shape[2],
            *x.stride()[:3], *B.stride()[:3], **(self.meta | meta | {"BLOCK_P": block_p}),
        )  # fmt: skip
        size = self.head_dim * self.d_state
        grid = (triton.cdiv(size, _STATE_BLOCK), self.num_heads, self.batch)
        ssd_triton.pass_states[grid](
            states, cum, seg, *self.sizes, self.num_chunks, SIZE=size, BLOCK=_STATE_BLOCK, num_warps=4, **meta
        )


def _segments(segment_ids: Tensor | None, cum: Tensor) -> Tensor:
    """Ids as the kernels read them; without segments any pointer will do."""
    return cum if segment_ids is None else segment_ids.to(torch.int32).contiguous()


@torch.library.custom_op(
    "mmmamba::ssd_forward",
    mutates_args=(),
    schema="(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? initial_state, Tensor? segment_ids, "
    "int chunk_size, bool need_state) -> (Tensor, Tensor, Tensor)",
)
def _forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
    chunk_size: int,
    need_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, state after the last token, states before every chunk and after the last); the latter two empty where there
    is no need for them."""
    plan = _Plan.of(x, B, C, segment_ids, chunk_size)
    y, states = _launch(plan, x, B, C, *plan.steps(dt, A), initial_state, segment_ids, need_state)
    # Results may not share memory.
    final = states[:, -1].clone() if need_state and states.numel() else states.new_empty(0)
    return y, final, states


def _launch(
    plan: _Plan,
    x: Tensor,
    B: Tensor,
    C: Tensor,
    dt: Tensor,
    cum: Tensor,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
    need_state: bool,
) -> tuple[Tensor, Tensor]:
    """The forward pass: y, and the states before every chunk and after the last, empty where there is no need."""
    seg = _segments(segment_ids, cum)
    with_states = _with_states(plan.num_chunks, initial_state, need_state)
    states = cum.new_empty(0)
    if with_states:
        states = plan.new_states(x)
        states[:, 0] = 0.0 if initial_state is None else initial_state
        plan.fill_states(states, x, B, cum, dt, seg, reverse=False)
    y = torch.empty(plan.batch, plan.seqlen, plan.num_heads, plan.head_dim, dtype=x.dtype, device=x.device)
    ssd_triton.scan_forward[plan.grid(plan.num_heads)](
        x, B, C, cum, dt, seg, states, y, *plan.sizes, plan.num_chunks, plan.num_heads // plan.groups,
        *x.stride()[:3], *B.stride()[:3], *C.stride()[:3], *y.stride()[:3], STATES=with_states, **plan.meta,
    )  # fmt: skip
    return y, states


def _with_states(num_chunks: int, initial_state: Tensor | None, need_state: bool) -> bool:
    return num_chunks > 1 or initial_state is not None or need_state


@_forward.register_fake
def _(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
    chunk_size: int,
    need_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, seqlen, num_heads = dt.shape
    num_chunks = -(-seqlen // min(chunk_size, seqlen))
    state = (num_heads, x.shape[3], B.shape[3])
    y = x.new_empty(batch, seqlen, num_heads, x.shape[3])
    final = dt.new_empty(batch, *state) if need_state else dt.new_empty(0)
    with_states = _with_states(num_chunks, initial_state, need_state)
    return y, final, dt.new_empty(batch, num_chunks + 1, *state) if with_states else dt.new_empty(0)


@torch.library.custom_op(
    "mmmamba::ssd_backward",
    mutates_args=(),
    schema="(Tensor grad_y, Tensor? grad_final, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, "
    "Tensor? segment_ids, Tensor states, int chunk_size) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    grad_y: Tensor,
    grad_final: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    segment_ids: Tensor | None,
    states: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C and the initial state (empty where there are no states)."""
    plan = _Plan.of(x, B, C, segment_ids, chunk_size)
    dt, cum = plan.steps(dt, A)
    seg = _segments(segment_ids, cum)
    with_states = states.numel() > 0
    grad_states = states
    if with_states:
        grad_states = plan.new_states(x)
        grad_states[:, -1] = 0.0 if grad_final is None else grad_final
        plan.fill_states(grad_states, grad_y, C, cum, dt, seg, reverse=True)
    dx, dB, dC = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, B, C))
    ddt, dcum = torch.empty_like(dt), torch.empty_like(dt)
    strides = (*x.stride()[:3], *B.stride()[:3], *C.stride()[:3], *grad_y.stride()[:3])
    meta = plan.meta | {"STATES": with_states}
    rep = plan.num_heads // plan.groups
    ssd_triton.scan_backward_kv[plan.grid(plan.groups)](
        x, B, C, grad_y, cum, dt, seg, grad_states, dx, dB, ddt, dcum, *plan.sizes, plan.num_chunks,
        *strides, *dx.stride()[:3], *dB.stride()[:3], REP=rep, **meta,
    )  # fmt: skip
    ssd_triton.scan_backward_q[plan.grid(plan.num_heads)](
        x, B, C, grad_y, cum, dt, seg, states, dC, dcum, *plan.sizes, plan.num_chunks, rep,
        *strides, *dC.stride()[:3], **meta,
    )  # fmt: skip
    # Through the log decays: a step of token t is in the cum of t and all after it.
    of_chunks = dcum.view(plan.batch, plan.num_heads, plan.num_chunks, plan.chunk_len)
    if with_states:
        # All of a state after a chunk scales with that chunk's total decay.
        through_state = (grad_states[:, 1:] * states[:, 1:]).sum(dim=(-1, -2))  # (batch, num_chunks, num_heads)
        of_chunks[..., -1] += through_state.transpose(1, 2)
    dsteps = (of_chunks.sum(dim=-1, keepdim=True) - of_chunks.cumsum(dim=-1) + of_chunks).view_as(dt)
    dA = (dsteps * dt).sum(dim=(0, 2))
    ddt = (ddt + dsteps * A[:, None])[..., : plan.seqlen].transpose(1, 2)
    initial = grad_states[:, 0].clone() if with_states else dA.new_empty(0)
    return dx, ddt.contiguous(), dA, dB, dC, initial


@_backward.register_fake
def _(
    grad_y: Tensor,
    grad_final: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    segment_ids: Tensor | None,
    states: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    initial = states.new_empty(states[:, 0].shape) if states.numel() else states.new_empty(0)
    dx, dB, dC = (t.new_empty(t.shape) for t in (x, B, C))
    return dx, dt.new_empty(dt.shape), A.new_empty(A.shape), dB, dC, initial


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, dt, A, B, C, initial_state, segment_ids, chunk_size, need_state = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, dt, A, B, C, segment_ids, output[2])
    ctx.chunk_size = chunk_size
    ctx.has_initial = initial_state is not None
    ctx.need_state = need_state


def _differentiate(
    ctx: Any, grad_y: Tensor | None, grad_final: Tensor | None, grad_states: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, dt, A, B, C, segment_ids, states = ctx.saved_tensors
    if grad_y is None:
        grad_y = torch.zeros(*dt.shape, x.shape[-1], dtype=x.dtype, device=x.device)
    grad_y = grad_y.to(x.dtype)
    if grad_y.stride(-1) != 1:
        grad_y = grad_y.contiguous()
    dx, ddt, dA, dB, dC, initial = torch.ops.mmmamba.ssd_backward(
        grad_y, grad_final if ctx.need_state else None, x, dt, A, B, C, segment_ids, states, ctx.chunk_size
    )
    return dx, ddt, dA, dB, dC, initial if ctx.has_initial else None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)
