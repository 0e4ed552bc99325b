"""The chunk scan and the step: fast against reference, the reference in float64 against a recurrence by hand."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmmamba.kernels import select_scan, ssd_scan, ssd_scan_ref, ssm_step
from mmmamba.kernels.chunked import ssd_scan_chunked
from mmmamba.kernels.upstream import load_upstream_scan
from tests import oracle
from tests.helpers import TOLERANCE, assert_near

LENGTHS = (1, 2, 63, 64, 65, 1000)
HEADS = ((4, 1), (4, 4), (6, 2))  # (query heads, kv heads)


class Inputs(NamedTuple):
    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    state: Tensor

    def to(self, dtype: torch.dtype) -> Inputs:
        """Activations in `dtype`; step sizes, decays and the state at least in float32, as the mixer passes them."""
        wide = torch.promote_types(dtype, torch.float32)
        x, B, C = (t.to(dtype) for t in (self.x, self.B, self.C))
        return Inputs(x, self.dt.to(wide), self.A.to(wide), B, C, self.state.to(wide))


def random_inputs(
    seqlen: int, num_heads: int = 6, num_kv_heads: int = 2, *, batch: int = 2, head_dim: int = 8, d_state: int = 12
) -> Inputs:
    """float64; decays from almost none to almost all within a chunk. head_dim and d_state differ, so a mix-up shows."""
    g = torch.Generator().manual_seed(seqlen * 100 + num_heads)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return Inputs(
        x=draw(batch, seqlen, num_kv_heads, head_dim),
        dt=F.softplus(2 * draw(batch, seqlen, num_heads) - 3),
        A=-torch.exp(draw(num_heads)),
        B=draw(batch, seqlen, num_kv_heads, d_state) / d_state**0.5,
        C=draw(batch, seqlen, num_heads, d_state),
        state=draw(batch, num_heads, head_dim, d_state),
    )


def by_hand(inputs: Inputs, carried: bool) -> tuple[Tensor, Tensor]:
    """The recurrence in numpy, head by head."""
    x, dt, A, B, C, state = inputs
    batch, seqlen, num_heads = dt.shape
    y = torch.empty(batch, seqlen, num_heads, x.shape[3], dtype=torch.float64)
    final = torch.empty_like(state)
    for b in range(batch):
        for h in range(num_heads):
            kv = h * x.shape[2] // num_heads
            out, last = oracle.recurrence(
                x[b, :, kv].numpy(),
                dt[b, :, h].numpy(),
                float(A[h]),
                B[b, :, kv].numpy(),
                C[b, :, h].numpy(),
                state[b, h].numpy() if carried else None,
            )
            y[b, :, h], final[b, h] = torch.from_numpy(out), torch.from_numpy(last)
    return y, final


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("seqlen", LENGTHS)
@pytest.mark.parametrize("carried", [False, True])
def test_reference_equals_the_recurrence_by_hand(heads: tuple[int, int], seqlen: int, carried: bool) -> None:
    inputs = random_inputs(min(seqlen, 100), *heads)
    y, final = ssd_scan_ref(*inputs[:5], inputs.state if carried else None)
    want_y, want_final = by_hand(inputs, carried)
    assert_near("y", y, want_y, TOLERANCE[torch.float64])
    assert_near("state", final, want_final, TOLERANCE[torch.float64])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("seqlen", LENGTHS)
def test_chunked_equals_reference(dtype: torch.dtype, heads: tuple[int, int], seqlen: int) -> None:
    exact = random_inputs(seqlen, *heads, batch=1)
    inputs = exact.to(dtype)
    # What the inputs say after rounding to `dtype` is the problem to solve.
    rounded = Inputs(*(t.double() for t in inputs))
    for state in (None, "carried"):
        want_y, want_final = ssd_scan_ref(*rounded[:5], rounded.state if state else None)
        y, final = ssd_scan_chunked(*inputs[:5], inputs.state if state else None)
        assert y.dtype == dtype
        assert final.dtype == inputs.state.dtype
        assert_near(f"y from {state}", y, want_y, TOLERANCE[dtype])
        # The sums of the state are done in float32, whatever the activations are.
        assert_near(f"state from {state}", final, want_final, min(TOLERANCE[dtype], 1e-5))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_reference_in_narrow_types(dtype: torch.dtype) -> None:
    inputs = random_inputs(200).to(dtype)
    want_y, want_final = ssd_scan_ref(*(t.double() for t in inputs))
    y, final = ssd_scan_ref(*inputs)
    assert (y.dtype, final.dtype) == (dtype, inputs.state.dtype)
    assert_near("y", y, want_y, TOLERANCE[dtype])
    assert_near("state", final, want_final, min(TOLERANCE[dtype], 1e-5))


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 16, 64, 150, 512])
def test_the_chunk_size_changes_nothing(chunk_size: int) -> None:
    inputs = random_inputs(150)
    want_y, want_final = ssd_scan_ref(*inputs)
    y, final = ssd_scan_chunked(*inputs, chunk_size=chunk_size)
    assert_near("y", y, want_y, TOLERANCE[torch.float64])
    assert_near("state", final, want_final, TOLERANCE[torch.float64])


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_a_sequence_in_two_calls_equals_one(impl: Any) -> None:
    inputs = random_inputs(100)
    want_y, want_final = ssd_scan(*inputs, impl=impl)
    for cut in (1, 37, 64, 99):
        x, dt, A, B, C, state = inputs
        y1, middle = ssd_scan(x[:, :cut], dt[:, :cut], A, B[:, :cut], C[:, :cut], state, impl=impl)
        y2, final = ssd_scan(x[:, cut:], dt[:, cut:], A, B[:, cut:], C[:, cut:], middle, impl=impl)
        assert_near(f"y cut at {cut}", torch.cat([y1, y2], dim=1), want_y, TOLERANCE[torch.float64])
        assert_near(f"state cut at {cut}", final, want_final, TOLERANCE[torch.float64])


@pytest.mark.parametrize("scan", [ssd_scan_ref, ssd_scan_chunked])
def test_a_scan_leaves_its_inputs_alone(scan: Any) -> None:
    inputs = random_inputs(70)
    before = Inputs(*(t.clone() for t in inputs))
    _, final = scan(*inputs)
    final.zero_()
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def test_a_strong_decay_neither_overflows_nor_forgets_the_present() -> None:
    inputs = random_inputs(130).to(torch.float32)
    strong = inputs._replace(A=torch.full_like(inputs.A, -1000.0), dt=torch.full_like(inputs.dt, 5.0))
    y, final = ssd_scan_chunked(*strong)
    want_y, want_final = ssd_scan_ref(*(t.double() for t in strong))
    assert_near("y", y, want_y, TOLERANCE[torch.float32])
    assert_near("state", final, want_final, TOLERANCE[torch.float32])


def test_long_sums_do_not_lose_small_terms() -> None:
    """With almost no decay 20,000 small terms add up; a bf16 state would stop growing at some 256 of them."""
    seqlen = 20_000
    x = torch.full((1, seqlen, 1, 1), 0.5, dtype=torch.bfloat16)
    B = C = torch.ones(1, seqlen, 1, 1, dtype=torch.bfloat16)
    dt = torch.full((1, seqlen, 1), 0.01)
    _, final = ssd_scan_chunked(x, dt, torch.tensor([-1e-7]), B, C)
    assert float(final) == pytest.approx(0.005 * seqlen, rel=1e-3)


def test_a_step_is_a_scan_of_one() -> None:
    for heads in HEADS:
        inputs = random_inputs(9, *heads)
        state = inputs.state.clone()
        want_y, want_final = ssd_scan_ref(*inputs)
        ys = []
        for t in range(9):
            ys.append(ssm_step(inputs.x[:, t], inputs.dt[:, t], inputs.A, inputs.B[:, t], inputs.C[:, t], state))
        assert_near("y", torch.stack(ys, dim=1), want_y, TOLERANCE[torch.float64])
        assert_near("state, changed in place", state, want_final, TOLERANCE[torch.float64])


# --- segments ---


def random_ids(batch: int, seqlen: int, *, seed: int = 0) -> Tensor:
    """Segment ids with borders drawn anywhere, other ones in each row; segments of one token among them."""
    generator = torch.Generator().manual_seed(seed + seqlen)
    return (torch.rand(batch, seqlen, generator=generator) < 0.1).int().cumsum(dim=1)


def apart(inputs: Inputs, ids: Tensor, scan: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Every segment by a call of its own, the first from the carried state."""
    ys, finals = [], []
    for row in range(len(ids)):
        state, found = inputs.state[row : row + 1], []
        for number, segment in enumerate(ids[row].unique_consecutive()):
            x, dt, B, C = (t[row, ids[row] == segment][None] for t in (inputs.x, inputs.dt, inputs.B, inputs.C))
            y, final = scan(x, dt, inputs.A, B, C, state if number == 0 else None, **options)
            found.append(y)
        ys.append(torch.cat(found, dim=1))
        finals.append(final)
    return torch.cat(ys), torch.cat(finals)


@pytest.mark.parametrize("scan", [ssd_scan_ref, ssd_scan_chunked])
@pytest.mark.parametrize("chunk_size", [1, 4, 16, 512])
def test_segments_together_equal_each_alone(scan: Any, chunk_size: int) -> None:
    for seqlen in (1, 15, 16, 17, 70):
        inputs, ids = random_inputs(seqlen), random_ids(2, seqlen)
        want_y, want_final = apart(inputs, ids, ssd_scan_ref)
        y, final = scan(*inputs, segment_ids=ids, chunk_size=chunk_size)
        assert_near("y", y, want_y, TOLERANCE[torch.float64])
        assert_near("state", final, want_final, TOLERANCE[torch.float64])


def test_gradients_stop_at_borders() -> None:
    ids = random_ids(2, 70)
    weights = torch.randn(2, 70, 6, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found: list[Inputs] = []
    for together in (True, False):
        leaves = Inputs(*(t.requires_grad_() for t in random_inputs(70)))
        if together:
            y, final = ssd_scan_chunked(*leaves, segment_ids=ids, chunk_size=16)
        else:
            y, final = apart(leaves, ids, ssd_scan_chunked)
        ((y * weights).sum() + final.square().sum()).backward()
        found.append(Inputs(*(t.grad for t in leaves)))  # type: ignore[arg-type]
    for name, got, want in zip(Inputs._fields, *found, strict=True):
        assert_near(f"gradient of {name}", got, want, TOLERANCE[torch.float64])


def test_strong_decays_make_no_nan_at_borders() -> None:
    inputs = random_inputs(130).to(torch.float32)
    strong = inputs._replace(A=torch.full_like(inputs.A, -1e4), dt=torch.full_like(inputs.dt, 5.0))
    leaves = [t.requires_grad_() for t in strong]
    y, final = ssd_scan_chunked(*leaves, segment_ids=random_ids(2, 130), chunk_size=64)
    (y.sum() + final.sum()).backward()
    assert all(bool(torch.isfinite(t.grad).all()) for t in leaves if t.grad is not None)


# --- gradients ---


def test_gradients_of_the_chunked_scan_equal_the_references() -> None:
    leaves = [t.clone().requires_grad_() for t in random_inputs(70)]
    wanted = [t.clone().requires_grad_() for t in random_inputs(70)]
    weights = torch.randn(2, 70, 6, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for tensors, scan in ((leaves, ssd_scan_chunked), (wanted, ssd_scan_by_operators)):
        y, final = scan(*tensors, chunk_size=16)
        ((y * weights).sum() + final.square().sum()).backward()
    for name, leaf, want in zip(Inputs._fields, leaves, wanted, strict=True):
        assert leaf.grad is not None, name
        assert want.grad is not None, name
        assert_near(f"gradient of {name}", leaf.grad, want.grad, TOLERANCE[torch.float64])


def ssd_scan_by_operators(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, *, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """The recurrence without in-place updates, which autograd can follow."""
    rep = dt.shape[2] // x.shape[2]
    ys = []
    for t in range(dt.shape[1]):
        v, k = (u[:, t].repeat_interleave(rep, dim=1) for u in (x, B))
        decay = torch.exp(dt[:, t] * A)[..., None, None]
        state = decay * state + dt[:, t, :, None, None] * v[..., :, None] * k[..., None, :]
        ys.append((state * C[:, t, :, None, :]).sum(dim=-1))
    return torch.stack(ys, dim=1), state


@pytest.mark.parametrize("carried", [False, True])
def test_gradcheck_of_the_chunked_scan(carried: bool) -> None:
    inputs = [t.requires_grad_() for t in random_inputs(5, 2, 1, batch=1, head_dim=2, d_state=3)]

    def scan(
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return ssd_scan_chunked(x, dt, A, B, C, state, chunk_size=2)

    assert torch.autograd.gradcheck(scan, inputs if carried else inputs[:5])


# --- what is refused, and which implementation runs ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_state_is_refused(dtype: torch.dtype) -> None:
    inputs = random_inputs(3)
    narrow = inputs.state.to(dtype)
    with pytest.raises(ValueError, match=rf"ssm_state has dtype {dtype}; use float32"):
        ssm_step(inputs.x[:, 0], inputs.dt[:, 0], inputs.A, inputs.B[:, 0], inputs.C[:, 0], narrow)
    for scan in (ssd_scan_ref, ssd_scan_chunked):
        with pytest.raises(ValueError, match="long sums lose small terms"):
            scan(*inputs[:5], narrow)


def test_a_chunk_size_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="chunk_size=0 must be 1 or more"):
        ssd_scan_chunked(*random_inputs(3), chunk_size=0)


@pytest.fixture
def fresh_choice() -> Iterator[None]:
    """The choice of an implementation is cached; forget it before and after."""
    select_scan.cache_clear()
    yield
    select_scan.cache_clear()


@pytest.mark.usefixtures("fresh_choice")
def test_the_choice_and_its_reason(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)  # as if it were not installed
    monkeypatch.setitem(sys.modules, "mmmamba.kernels.ssd_op", None)  # as if there were no Triton
    assert select_scan("cpu", "reference") is ssd_scan_ref
    assert select_scan("cpu", "chunked") is ssd_scan_chunked
    with caplog.at_level(logging.INFO, logger="mmmamba.kernels"):
        for _ in range(2):  # said once
            assert select_scan("cpu") is ssd_scan_chunked
            assert select_scan("cuda") is ssd_scan_chunked
    assert len(caplog.messages) == 2
    needs = "device is cpu, our Triton scan needs cuda; device is cpu, mamba-ssm needs cuda"
    assert caplog.messages[0] == f"chunk scan: torch chunked ({needs})"
    assert caplog.messages[1].startswith("chunk scan: torch chunked (Triton does not import: ModuleNotFoundError: ")
    scan, reason = load_upstream_scan()
    assert scan is None
    assert reason in caplog.messages[1]
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="mmmamba.kernels"):
        assert select_scan("cuda", training=True) is ssd_scan_chunked
        assert select_scan("cpu", training=True) is ssd_scan_chunked
    assert caplog.messages[0].startswith("chunk scan for training: torch chunked (Triton does not import: ")
    assert reason in caplog.messages[0], "both reasons are said"
    with pytest.raises(ValueError, match=r'impl "triton" cannot run: device is cpu, our Triton scan needs cuda'):
        ssd_scan(*random_inputs(2), impl="triton")

    with pytest.raises(ValueError, match=r'impl "mamba_ssm" cannot run: device is cpu.*use "auto" or "chunked"'):
        ssd_scan(*random_inputs(2), impl="mamba_ssm")
    with pytest.raises(ValueError, match="cannot run: mamba-ssm does not import: ModuleNotFoundError"):
        select_scan("cuda", "mamba_ssm")
    with pytest.raises(
        ValueError, match='impl "fast" is not known; use "auto", "reference", "chunked", "triton" or "mamba_ssm"'
    ):
        ssd_scan(*random_inputs(2), impl="fast")  # type: ignore[arg-type]


@pytest.mark.usefixtures("fresh_choice")
def test_a_broken_upstream_build_is_a_reason_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise OSError("libcudart.so.12: cannot open shared object file")

    monkeypatch.setitem(sys.modules, "mmmamba.kernels.ssd_op", None)
    fake_upstream(monkeypatch, Broken("mamba_ssm.ops.triton.ssd_combined"))
    assert select_scan("cuda") is ssd_scan_chunked
    assert load_upstream_scan()[1].startswith("mamba-ssm does not import: OSError: libcudart")


@pytest.mark.usefixtures("fresh_choice")
def test_our_inputs_reach_upstream_in_its_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Upstream's signature, played by the recurrence: heads repeated, decays in float32, chunks of 2^n >= 16."""
    calls: list[dict[str, Any]] = []

    def mamba_chunk_scan_combined(
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        chunk_size: int,
        D: Tensor | None = None,
        z: Tensor | None = None,
        dt_bias: Tensor | None = None,
        initial_states: Tensor | None = None,
        dt_softplus: bool = False,
        return_final_states: bool = False,
        seq_idx: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        calls.append({"dt": dt.dtype, "A": A.dtype, "heads": (x.shape[2], B.shape[2], C.shape[2]), "chunk": chunk_size})
        assert C.is_contiguous()
        assert return_final_states
        y, state = ssd_scan_ref(x, dt, A, B, C, initial_states, segment_ids=seq_idx)
        assert seq_idx is None or (seq_idx.dtype == torch.int32 and not seq_idx[:, 0].any())
        return y.float(), state  # wider than asked for, as some versions return it

    module = ModuleType("mamba_ssm.ops.triton.ssd_combined")
    module.mamba_chunk_scan_combined = mamba_chunk_scan_combined  # type: ignore[attr-defined]
    fake_upstream(monkeypatch, module)
    scan = select_scan("cuda", "mamba_ssm")
    for chunk_size, used in ((1, 16), (16, 16), (17, 32), (64, 64), (100, 128)):
        inputs = random_inputs(40).to(torch.bfloat16)
        y, final = scan(*inputs, chunk_size=chunk_size)
        assert calls[-1] == {"dt": torch.float32, "A": torch.float32, "heads": (6, 6, 6), "chunk": used}
        want_y, want_final = ssd_scan_ref(*inputs)
        assert y.dtype == torch.bfloat16
        assert_near("y", y, want_y, TOLERANCE[torch.bfloat16])
        assert_near("state", final, want_final, TOLERANCE[torch.float32])
    ids = random_ids(2, 40) + 3
    y, final = scan(*inputs, segment_ids=ids)
    want_y, want_final = ssd_scan_ref(*inputs, segment_ids=ids)
    assert_near("y of segments", y, want_y, TOLERANCE[torch.bfloat16])
    assert_near("state of segments", final, want_final, TOLERANCE[torch.float32])


def fake_upstream(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.triton.ssd_combined", module)
