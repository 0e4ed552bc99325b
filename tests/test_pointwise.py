"""The fused operators of reading a prompt against torch's; see test_kernels_decode.py for how to run them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmmamba.kernels import fused_ops
from tests.helpers import TOLERANCE, assert_near
from tests.interpreter import require_triton

DEVICE = require_triton()

from mmmamba.kernels import pointwise  # noqa: E402
from mmmamba.kernels.ssd_op import _Plan, chunk_steps_by_torch  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16]


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [24, 576])
def test_rms_norm(dtype: torch.dtype, dim: int) -> None:
    x, weight = draw(2, 3, dim, dtype=dtype), draw(dim, dtype=dtype)
    want = F.rms_norm(x.double(), (dim,), weight.double(), 1e-5)
    assert_near("normed", pointwise.rms_norm(x, weight, 1e-5), want, TOLERANCE[dtype])
    turned = draw(dim, 5, dtype=dtype).T
    assert_near(
        "turned",
        pointwise.rms_norm(turned, weight, 1e-5),
        F.rms_norm(turned.double(), (dim,), weight.double(), 1e-5),
        TOLERANCE[dtype],
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swiglu(dtype: torch.dtype) -> None:
    a, b = draw(3, 1000, dtype=dtype), draw(3, 1000, dtype=dtype, seed=1)
    want = F.silu(a.double()) * b.double()
    assert_near("gated", pointwise.swiglu(a, b), want, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seqlen", [1, 7, 8, 19])
def test_mix_inputs(dtype: torch.dtype, seqlen: int) -> None:
    batch, conv, hidden, heads = 2, 600, 40, 5
    u = draw(batch, seqlen, conv + hidden + heads, dtype=dtype)
    u[..., -heads:] *= 10  # both ends of softplus
    state, taps = draw(batch, conv, 1, dtype=dtype), draw(conv, 2, dtype=dtype)
    bias, dt_bias = draw(conv, dtype=dtype), draw(heads)
    padded = torch.cat([state.mT, u[..., :conv]], dim=1).double()
    mixed = padded[:, :-1] * taps[:, 0].double() + padded[:, 1:] * taps[:, 1].double() + bias.double()
    vkq, dt = pointwise.mix_inputs(u, state, taps, bias, dt_bias, hidden)
    assert_near("vkq", vkq, F.silu(mixed), TOLERANCE[dtype])
    assert_near("dt", dt, F.softplus(u[..., -heads:].double() + dt_bias.double()), TOLERANCE[torch.float32])
    assert torch.equal(state, u[:, -1, :conv, None])

    # Rows that are filled up behind their ends.
    lengths = torch.tensor([seqlen, max(1, seqlen - 3)], device=u.device)
    real = torch.arange(seqlen, device=u.device) < lengths[:, None]
    state.copy_(padded[:, 0, :, None])
    same, steps = pointwise.mix_inputs(u, state, taps, bias, dt_bias, hidden, lengths)
    assert torch.equal(same, vkq)
    assert torch.equal(steps, dt * real[..., None])
    assert torch.equal(state[:, :, 0], u[torch.arange(batch, device=u.device), lengths - 1, :conv])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads_dim", [(9, 64), (3, 6)], ids=str)
def test_gated_norm(dtype: torch.dtype, heads_dim: tuple[int, int]) -> None:
    heads, dim = heads_dim
    y, u, weight = draw(2, 3, heads, dim, dtype=dtype), draw(2, 3, heads * dim + 7, dtype=dtype), draw(dim, dtype=dtype)
    gate = u[..., 7:]
    normed = F.rms_norm(y.double(), (dim,), weight.double(), 1e-5).flatten(2)
    got = pointwise.gated_norm(y, gate, weight, 1e-5)
    assert_near("gated", got, normed * F.silu(gate.double()), TOLERANCE[dtype])


@pytest.mark.parametrize(("seqlen", "chunk_size"), [(5, 64), (64, 64), (130, 64), (75, 36)])
def test_chunk_steps(seqlen: int, chunk_size: int) -> None:
    x, C = draw(2, seqlen, 1, 16), draw(2, seqlen, 3, 16)
    plan = _Plan.of(x, x, C, None, chunk_size)
    dt, A = draw(2, seqlen, 3).abs(), -draw(3).abs()
    wanted = chunk_steps_by_torch(dt, A, plan.chunk_len)
    for name, got, want in zip(("dt", "cum"), pointwise.chunk_steps(dt, A, plan.chunk_len), wanted, strict=True):
        assert_near(name, got, want, TOLERANCE[torch.float32])


def test_where_torch_is_taken() -> None:
    x = torch.zeros(2, device=DEVICE)
    assert fused_ops(x) is None, "outside of inference mode gradients may be asked for"
    with torch.inference_mode():
        assert (fused_ops(x) is not None) == x.is_cuda
        assert fused_ops(x.double()) is None


def test_the_look_that_is_taken_before_use(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pointwise.disagreement(DEVICE) < 1e-5
    real = pointwise.swiglu
    monkeypatch.setattr(pointwise, "swiglu", lambda a, b: real(a, b) * 1.1)
    assert pointwise.disagreement(DEVICE) > 1e-2
