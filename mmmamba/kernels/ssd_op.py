"""The training scan in Triton as an operator of torch: forward and backward, opaque to `torch.compile`, which so keeps
a block in one graph. Importing needs Triton."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from mmmamba.kernels import MAX_DIFFERENCE, fused_ops, ssd_triton
from mmmamba.kernels.chunked import ssd_scan_chunked
from mmmamba.kernels.pointwise import chunk_steps
from mmmamba.kernels.reference import check_state
from mmmamba.kernels.segmented import infers_on_cuda, product_dtype

log = logging.getLogger(__name__)

MAX_DIM = 128  # of a head and of the state: tiles of both are held whole
_STATE_BLOCK = 1024
# What is launched otherwise than `_Plan.of` says, by kernel: BLOCK (tokens of a tile), num_warps, num_stages, maxnreg.
# `benchmarks.scan_tiles` times them.
TILES: dict[str, dict[str, int]] = {}


_torch_form = torch.compiler.disable(ssd_scan_chunked)  # compiled, its gradients were wrong: see `kernels._IN_GRAPHS`


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
        return _torch_form(x, dt, A, B, C, initial_state, segment_ids=segment_ids, chunk_size=chunk_size)
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be 1 or more")
    if initial_state is not None:
        check_state(initial_state)
    narrow = (t.to(dtype) for t in (x, B, C))
    x, B, C = (t if t.stride(-1) == 1 else t.contiguous() for t in narrow)
    if infers_on_cuda(x):
        plan = _Plan.of(x, B, C, segment_ids, chunk_size)
        steps_of = chunk_steps_by_torch if fused_ops(x) is None else chunk_steps
        steps = steps_of(dt.float(), A.float(), plan.chunk_len)
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

    def launch(self, kernel: Any, heads: int, **meta: Any) -> Callable[..., Any]:
        """The kernel with one program for each tile of each chunk and head, and what it is compiled for."""
        meta = self.meta | meta | TILES.get(kernel.fn.__name__, {})
        grid = self.num_chunks * triton.cdiv(self.chunk_len, meta["BLOCK"]), heads, self.batch
        return partial(kernel[grid], **meta)

    def new_states(self, like: Tensor) -> Tensor:
        shape = (self.batch, self.num_chunks + 1, self.num_heads, self.head_dim, self.d_state)
        return torch.empty(shape, dtype=torch.float32, device=like.device)

    def steps(self, dt: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        """(dt, log decay since the chunk's start), both (batch, num_heads, padded), float32."""
        fused = _steps_run(dt.device, triton.next_power_of_2(self.chunk_len), 0)
        return (chunk_steps if fused else chunk_steps_by_torch)(dt, A, self.chunk_len)

    def fill_states(
        self,
        states: Tensor,
        x: Tensor,
        B: Tensor,
        cum: Tensor,
        dt: Tensor,
        seg: Tensor,
        *,
        forward: Tensor | None = None,
    ) -> Tensor:
        """Slots of `states` from what the chunks add and the slot that is there: the first, or the last where `forward`
        holds the states of the forward pass, whose gradients these are; x is then dy and B is C.

        Returns: of gradients, their products with those states, (batch, num_heads, num_chunks, tiles), to be summed.
        """
        reverse = forward is not None
        meta = {"SEGMENTS": self.meta["SEGMENTS"], "REVERSE": reverse}
        block_p = min(64, self.meta["BLOCK_P"])
        grid = (self.num_chunks * triton.cdiv(self.head_dim, block_p), self.num_heads, self.batch)
        tiles_of = self.meta | meta | {"BLOCK_P": block_p} | TILES.get("chunk_states", {})
        ssd_triton.chunk_states[grid](
            x, B, cum, dt, seg, states, *self.sizes, self.num_heads // x.shape[2], self.num_heads // B.shape[2],
            *x.stride()[:3], *B.stride()[:3], **tiles_of,
        )  # fmt: skip
        size = self.head_dim * self.d_state
        tiles = triton.cdiv(size, _STATE_BLOCK)
        products = cum.new_empty((self.batch, self.num_heads, self.num_chunks, tiles) if reverse else 0)
        ssd_triton.pass_states[tiles, self.num_heads, self.batch](
            states, states if forward is None else forward, products, cum, seg, *self.sizes, self.num_chunks,
            SIZE=size, BLOCK=_STATE_BLOCK, num_warps=4, **meta,
        )  # fmt: skip
        return products


class Scan:
    """A scan that trains without autograd: `y` (batch, seqlen, num_heads, head_dim), and what its gradients need.

    Arguments as `ssd_scan_ref`, x, B and C of one dtype, dt and A float32, without a state before or after.
    """

    def __init__(
        self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, segment_ids: Tensor | None, chunk_size: int
    ) -> None:
        self._plan = _Plan.of(x, B, C, segment_ids, chunk_size)
        self._steps = self._plan.steps(dt, A)
        self._given = x, B, C
        self._others = A, segment_ids
        self.y, self._states = _launch(self._plan, *self._given, *self._steps, None, segment_ids, False)

    def gradients(self, grad_y: Tensor) -> tuple[Tensor, ...]:
        """Of x, dt, A, B, C, from that of y, whose last stride is 1."""
        return _launch_backward(self._plan, grad_y, None, *self._given, *self._steps, *self._others, self._states)[:5]


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
        plan.fill_states(states, x, B, cum, dt, seg)
    y = torch.empty(plan.batch, plan.seqlen, plan.num_heads, plan.head_dim, dtype=x.dtype, device=x.device)
    plan.launch(ssd_triton.scan_forward, plan.num_heads, STATES=with_states)(
        x, B, C, cum, dt, seg, states, y, *plan.sizes, plan.num_chunks, plan.num_heads // plan.groups,
        *x.stride()[:3], *B.stride()[:3], *C.stride()[:3], *y.stride()[:3],
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
    given = plan, grad_y, grad_final, x, B, C, *plan.steps(dt, A), A, segment_ids, states
    *gradients, grad_states = _launch_backward(*given)
    dx, ddt, dA, dB, dC = gradients
    return dx, ddt, dA, dB, dC, grad_states[:, 0].clone() if grad_states.numel() else dA.new_empty(0)


def _launch_backward(
    plan: _Plan,
    grad_y: Tensor,
    grad_final: Tensor | None,
    x: Tensor,
    B: Tensor,
    C: Tensor,
    dt: Tensor,
    cum: Tensor,
    A: Tensor,
    segment_ids: Tensor | None,
    states: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of x, dt, A, B, C and of all states (empty where there are none); `dt` and `cum` as `_Plan.steps`
    gives them."""
    seg = _segments(segment_ids, cum)
    with_states = states.numel() > 0
    grad_states, products = states, cum
    if with_states:
        grad_states = plan.new_states(x)
        grad_states[:, -1] = 0.0 if grad_final is None else grad_final
        products = plan.fill_states(grad_states, grad_y, C, cum, dt, seg, forward=states)
    dx, dB, dC = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, B, C))
    ddt, dcum = torch.empty_like(dt), torch.empty_like(dt)
    strides = (*x.stride()[:3], *B.stride()[:3], *C.stride()[:3], *grad_y.stride()[:3])
    rep = plan.num_heads // plan.groups
    plan.launch(ssd_triton.scan_backward_kv, plan.groups, STATES=with_states, REP=rep)(
        x, B, C, grad_y, cum, dt, seg, grad_states, dx, dB, ddt, dcum, *plan.sizes, plan.num_chunks,
        *strides, *dx.stride()[:3], *dB.stride()[:3],
    )  # fmt: skip
    plan.launch(ssd_triton.scan_backward_q, plan.num_heads, STATES=with_states)(
        x, B, C, grad_y, cum, dt, seg, states, dC, dcum, *plan.sizes, plan.num_chunks, rep,
        *strides, *dC.stride()[:3],
    )  # fmt: skip
    given = dcum, ddt, dt, A, products if with_states else None, plan.chunk_len, plan.seqlen
    fused = _steps_run(x.device, triton.next_power_of_2(plan.chunk_len), products.shape[-1] if with_states else 0)
    grad_dt, grad_A = (_step_gradients if fused else step_gradients_by_torch)(*given)
    return dx, grad_dt, grad_A, dB, dC, grad_states


def chunk_steps_by_torch(dt: Tensor, A: Tensor, chunk_len: int) -> tuple[Tensor, Tensor]:
    """`pointwise.chunk_steps` by torch's operators: where the kernel does not run, and what it is held against."""
    steps = F.pad(dt.transpose(1, 2), (0, -dt.shape[1] % chunk_len)).contiguous()
    decays = (steps * A[:, None]).unflatten(-1, (-1, chunk_len))
    return steps, decays.cumsum(dim=-1).view_as(steps)


def _step_gradients(
    dcum: Tensor, ddt: Tensor, dt: Tensor, A: Tensor, products: Tensor | None, chunk_len: int, seqlen: int
) -> tuple[Tensor, Tensor]:
    """Gradients of dt (batch, seqlen, num_heads) and A, from those of log decays and of the steps beside them, (batch,
    num_heads, padded length), and from the products of states and their gradients, where there are states."""
    batch, heads, padded = dcum.shape
    chunks, tiles = padded // chunk_len, 1 if products is None else products.shape[-1]
    grad_dt = torch.empty(batch, seqlen, heads, dtype=torch.float32, device=dcum.device)
    grad_A = torch.empty(batch, heads, chunks, dtype=torch.float32, device=dcum.device)
    ssd_triton.step_gradients[chunks, heads, batch](
        dcum, ddt, dt, A, dcum if products is None else products, grad_dt, grad_A,
        seqlen, chunk_len, padded, heads, tiles, BLOCK=triton.next_power_of_2(chunk_len),
        TILES=triton.next_power_of_2(tiles), STATES=products is not None, num_warps=1,
    )  # fmt: skip
    return grad_dt, grad_A.sum(dim=(0, 2))


def step_gradients_by_torch(
    dcum: Tensor, ddt: Tensor, dt: Tensor, A: Tensor, products: Tensor | None, chunk_len: int, seqlen: int
) -> tuple[Tensor, Tensor]:
    """The same in some 20 launches: where the kernel does not run, and what it is held against."""
    of_chunks = dcum.unflatten(-1, (-1, chunk_len))
    if products is not None:
        # All of a state after a chunk scales with that chunk's total decay.
        last = of_chunks[..., -1] + products.sum(dim=-1)
        of_chunks = torch.cat([of_chunks[..., :-1], last[..., None]], dim=-1)
    # A step of token t is in the log decays of t and of all after it in its chunk.
    dsteps = (of_chunks.sum(dim=-1, keepdim=True) - of_chunks.cumsum(dim=-1) + of_chunks).view_as(dt)
    grad_dt = (ddt + dsteps * A[:, None])[..., :seqlen].transpose(1, 2).contiguous()
    return grad_dt, (dsteps * dt).sum(dim=(0, 2))


@cache
def _steps_run(device: torch.device, block: int, tiles: int) -> bool:
    """Whether step sizes and their gradients are those of torch's operators on a device, for chunks of up to `block`
    tokens and states of so many tiles (0: without states); looked at once."""
    draw = torch.Generator().manual_seed(0)
    chunk_len = block - block // 4
    seqlen = 2 * chunk_len - chunk_len // 2

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).to(device)

    dt, A, products = random(1, seqlen, 2).abs(), random(2), random(1, 2, 2, tiles) if tiles else None
    by_torch = chunk_steps_by_torch(dt, A, chunk_len)
    dcum, ddt = (random(1, 2, 2 * chunk_len) for _ in range(2))
    given = dcum, ddt, by_torch[0], A, products, chunk_len, seqlen
    try:
        found = *chunk_steps(dt, A, chunk_len), *_step_gradients(*given)
        pairs = zip(found, (*by_torch, *step_gradients_by_torch(*given)), strict=True)
        difference = max(float((ours - theirs).norm() / theirs.norm()) for ours, theirs in pairs)
    except Exception as error:  # whatever a broken build or compiler raises means "not here"
        log.warning("step sizes of the scan: torch (Triton fails: %s: %s)", type(error).__name__, error)
        return False
    if not difference <= MAX_DIFFERENCE:
        log.warning("step sizes of the scan: torch (the kernels differ by %.2g on this card)", difference)
        return False
    return True


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
