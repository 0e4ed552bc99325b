"""The decoding kernels against the plain formulas in float64. On a CPU they run in Triton's interpreter:
`TRITON_INTERPRET=1 python -m pytest tests/test_kernels_decode.py`; on a GPU compiled, with `-m cuda`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmmamba.kernels.reference import ssm_step_ref
from mmmamba.kernels.weights import PHASES, Kind, Weight, round_to_nearest, to_phases
from tests.helpers import TOLERANCE, assert_near
from tests.interpreter import require_triton

DEVICE = require_triton()

from mmmamba.kernels.gemv import MixerRows, project  # noqa: E402
from mmmamba.kernels.launch import overlaps_launches  # noqa: E402
from mmmamba.kernels.step import step  # noqa: E402

KINDS: tuple[Kind, ...] = ("dense", "int8", "int4")
PDL = (False, True) if overlaps_launches(DEVICE) else (False,)
# Packed weights are met as numbers around 128 or 2048 whose offset is taken out afterwards: some bits of float32 go.
PACKED = 3e-4
SHAPES = ((40, 64), (37, 192), (70, 576), (9, 2048))  # (out, in): odd numbers of rows, K that is no power of two


def draw(*shape: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def nan(*shape: int, dtype: torch.dtype) -> Tensor:
    """Memory as `torch.empty` may hand it out: what a kernel leaves unwritten shows."""
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def addresses(*tensors: Tensor) -> Tensor:
    """A table of a row's tensors, at least two long as the decoder's are."""
    values = [t.data_ptr() for t in tensors]
    return torch.tensor([*values, *values[:1]], dtype=torch.int64, device=DEVICE)


def make_weight(kind: Kind, rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> Weight:
    dense = (draw(rows, columns, seed=seed) / columns**0.5).to(dtype)
    weight = round_to_nearest(dense, kind)
    tensors = {k: None if t is None else t.to(DEVICE) for k, t in vars(weight).items() if k in ("scales", "zeros")}
    return Weight(kind, weight.data.to(DEVICE), **tensors, group_size=weight.group_size)


def normed(x: Tensor, norm: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], norm, eps)


@pytest.mark.parametrize("pdl", PDL)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3])
def test_projection(kind: Kind, dtype: torch.dtype, shape: tuple[int, int], rows: int, pdl: bool) -> None:
    out_features, columns = shape
    weight, up = (make_weight(kind, out_features, columns, dtype, seed=s) for s in (0, 1))
    dense, dense_up = (w.dequantize(torch.float64).cpu() for w in (weight, up))
    x, norm, before = (t.to(dtype) for t in (draw(rows, columns), 1 + 0.1 * draw(columns), draw(rows, out_features)))
    wide = normed(x.double(), norm.double(), 1e-5)
    phases = PHASES[kind]
    given: dict[str, Any] = {"x_phases": phases, "pdl": pdl}
    x_in, norm_in = (to_phases(t, phases).to(DEVICE) for t in (x, norm))
    tolerance = max(TOLERANCE[dtype], PACKED if kind != "dense" else 0)

    out = nan(rows, out_features, dtype=dtype)
    project(x_in, weight, out, **given)
    assert_near("plain", out.cpu(), x.double() @ dense.T, tolerance)

    out = nan(rows, out_features, dtype=torch.float32)
    project(x_in, weight, out, norm=norm_in, eps=1e-5, **given)
    assert_near("normed", out.cpu(), wide @ dense.T, tolerance)

    out_phases = 5 if out_features % 5 == 0 else 1
    out = to_phases(before, out_phases).clone().to(DEVICE)
    project(x_in, weight, out, residual=True, out_phases=out_phases, **given)
    assert_near("residual", out.cpu(), to_phases(before.double() + x.double() @ dense.T, out_phases), tolerance)

    out = nan(rows, out_features, dtype=dtype)
    project(x_in, weight, out, norm=norm_in, eps=1e-5, gated=up, **given)
    assert_near("swiglu", out.cpu(), F.silu(wide @ dense.T) * (wide @ dense_up.T), tolerance)


def test_a_dense_weight_reads_x_in_any_phases() -> None:
    """Layers that a quantizer left alone stand beside packed ones."""
    weight = make_weight("dense", 24, 64, torch.float32)
    x = draw(2, 64).float()
    for phases in (1, 4, 8):
        out = nan(2, 24, dtype=torch.float32)
        project(to_phases(x, phases).to(DEVICE), weight, out, x_phases=phases)
        assert_near(f"{phases} phases", out.cpu(), x.double() @ weight.dequantize(torch.float64).cpu().T, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_mixers_rows(kind: Kind, dtype: torch.dtype) -> None:
    hidden, conv, heads, rows = 64, 112, 4, 3
    total = conv + hidden + heads
    weight = make_weight(kind, total, hidden, dtype)
    x = draw(rows, hidden).to(dtype)
    taps, bias, dt_bias = draw(conv, 2).to(dtype), draw(conv).to(dtype), 3 * draw(heads).float()
    states = [draw(conv, 1, seed=b).to(dtype).to(DEVICE) for b in range(rows)]
    before = [s.cpu().clone() for s in states]
    alive = torch.tensor([1, 0, 1], dtype=torch.int32, device=DEVICE)
    out = nan(rows, total, dtype=torch.float32)
    mixer = MixerRows(taps.to(DEVICE), bias.to(DEVICE), dt_bias.to(DEVICE), hidden)
    phases = PHASES[kind]
    given = {"mixer": mixer, "conv_table": addresses(*states), "alive": alive, "x_phases": phases}
    project(to_phases(x, phases).to(DEVICE), weight, out, **given)
    u = (x.double() @ weight.dequantize(torch.float64).cpu().T).to(dtype)
    for row in range(rows):
        mixed = bias.double() + before[row][:, 0].double() * taps[:, 0].double() + u[row, :conv].double() * taps[:, 1]
        dt = F.softplus(u[row, conv + hidden :].double() + dt_bias)
        want = torch.cat([F.silu(mixed), F.silu(u[row, conv : conv + hidden].double()), dt])
        assert_near(f"row {row}", out[row].cpu(), want, max(TOLERANCE[dtype], PACKED))
        moved = u[row, :conv, None] if alive[row] else before[row]
        assert_near(f"state {row}", states[row].cpu(), moved, max(TOLERANCE[dtype], PACKED))


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_its_neighbours(kind: Kind) -> None:
    """Bit for bit, alone or in a batch."""
    weight = make_weight(kind, 40, 192, torch.bfloat16)
    x = to_phases(draw(4, 192).bfloat16(), PHASES[kind]).to(DEVICE)
    together, alone = nan(4, 40, dtype=torch.bfloat16), nan(1, 40, dtype=torch.bfloat16)
    project(x, weight, together, x_phases=PHASES[kind])
    for row in range(4):
        project(x[row : row + 1], weight, alone, x_phases=PHASES[kind])
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("pdl", PDL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 6), (9, 3, 64), (2, 1, 128)])
def test_step(dtype: torch.dtype, heads: int, kv_heads: int, dim: int, pdl: bool) -> None:
    rows, hidden, kv = 3, heads * dim, kv_heads * dim
    u = draw(rows, 2 * kv + 2 * hidden + heads).float()
    u[:, -heads:] = F.softplus(u[:, -heads:])
    A, norm = -torch.exp(draw(heads)).float(), (1 + 0.1 * draw(dim)).to(dtype)
    states = [draw(heads, dim, dim, seed=b).float().to(DEVICE) for b in range(rows)]
    want_states = [s.cpu().double() for s in states]
    alive = torch.tensor([1, 1, 0], dtype=torch.int32, device=DEVICE)
    out = nan(rows, hidden, dtype=dtype)
    given = {"num_kv_heads": kv_heads, "eps": 1e-5, "out_phases": 2, "pdl": pdl}
    step(u.to(DEVICE), A.to(DEVICE), norm.to(DEVICE), addresses(*states), alive, out, **given)
    v, k, q, gate, dt = u.double().split([kv, kv, hidden, hidden, heads], dim=1)
    for row in range(rows):
        x, B = (t[row].view(1, kv_heads, dim) for t in (v, k))
        C, state = q[row].view(1, heads, dim), want_states[row][None].clone()
        y = ssm_step_ref(x, dt[row : row + 1], A.double(), B, C, state)
        y = normed(y[0], norm.double(), 1e-5).flatten() * gate[row]
        assert_near(f"row {row}", out[row].cpu(), to_phases(y, 2), TOLERANCE[dtype])
        want = state[0] if alive[row] else want_states[row]
        assert_near(f"state {row}", states[row].cpu(), want, TOLERANCE[torch.float32])
