"""Products for many rows and attention over a cache against float64; see test_kernels_decode.py for how to run them.

Triton's interpreter multiplies bf16 as if it were whole numbers, so the narrow type is fp16 there.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmmamba.kernels.weights import Kind
from tests.helpers import assert_near
from tests.interpreter import INTERPRETED, require_triton

DEVICE = require_triton()

from mmmamba.kernels.gemm import GemmShape, gemm_shape, product  # noqa: E402
from mmmamba.kernels.gemv import MixerRows  # noqa: E402
from mmmamba.kernels.launch import overlaps_launches  # noqa: E402
from mmmamba.kernels.rows import finish  # noqa: E402
from mmmamba.kernels.split_kv import Partial, Turns, attention, fill_turns  # noqa: E402
from tests.test_kernels_decode import KINDS, addresses, draw, make_weight, nan  # noqa: E402

NARROW = torch.float16 if INTERPRETED else torch.bfloat16
DTYPES = (torch.float32, NARROW)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 1e-2}
PDL = (False, True) if overlaps_launches(DEVICE) else (False,)
ROWS = (6, 17) if INTERPRETED else (6, 8, 17, 64)


@pytest.mark.parametrize("pdl", PDL)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(40, 64), (37, 576)], ids=str)
def test_products(shape: tuple[int, int], dtype: torch.dtype, kind: Kind, rows: int, pdl: bool) -> None:
    out_features, columns = shape
    weight, up = (make_weight(kind, out_features, columns, dtype, seed=s) for s in (0, 1))
    dense, dense_up = (w.dequantize(torch.float64).cpu() for w in (weight, up))
    x = draw(rows, columns).to(dtype)
    y = x.double() @ dense.T
    x_in = x.to(DEVICE)

    out = nan(rows, out_features, dtype=dtype)
    product(x_in, weight, out, pdl=pdl)
    assert_near("plain", out.cpu(), y, TOLERANCE[dtype])

    splits = gemm_shape(weight, DEVICE, split=True).splits
    parts = nan(splits, rows, out_features, dtype=torch.float32)
    product(x_in, weight, parts, pdl=pdl)
    assert_near("parts", parts.sum(0).cpu(), y, TOLERANCE[dtype])

    out = nan(rows, out_features, dtype=dtype)
    product(x_in, weight, out, gated=up, pdl=pdl)
    assert_near("swiglu", out.cpu(), F.silu(y) * (x.double() @ dense_up.T), TOLERANCE[dtype])


@pytest.mark.parametrize("block_k", [32, 64, 128])
def test_steps_shorter_and_longer_than_a_group(block_k: int) -> None:
    weight = make_weight("int4", 40, 192, torch.float32)  # groups of 64
    x, out = draw(6, 192).float(), nan(6, 40, dtype=torch.float32)
    product(x.to(DEVICE), weight, out, shape=GemmShape(16, block_k, 1, 4, 3))
    want = x.double() @ weight.dequantize(torch.float64).cpu().T
    assert_near("plain", out.cpu(), want, TOLERANCE[torch.float32])
    with pytest.raises(ValueError, match="block_k=48 and group_size=64: one must divide the other"):
        product(x.to(DEVICE), weight, out, shape=GemmShape(16, 48, 1, 4, 3))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_mixers_rows(dtype: torch.dtype, kind: Kind) -> None:
    hidden, conv, heads, rows = 64, 112, 4, 6
    weight = make_weight(kind, conv + hidden + heads, hidden, dtype)
    x = draw(rows, hidden).to(dtype)
    taps, bias, dt_bias = draw(conv, 2).to(dtype), draw(conv).to(dtype), 3 * draw(heads).float()
    states = [draw(conv, 1, seed=b).to(dtype).to(DEVICE) for b in range(rows)]
    before = [s.cpu().clone() for s in states]
    alive = torch.tensor([1, 0, 1, 1, 1, 0], dtype=torch.int32, device=DEVICE)
    out = nan(rows, conv + hidden + heads, dtype=torch.float32)
    mixer = MixerRows(taps.to(DEVICE), bias.to(DEVICE), dt_bias.to(DEVICE), hidden)
    product(x.to(DEVICE), weight, out, mixer=mixer, conv_table=addresses(*states), alive=alive)
    u = (x.double() @ weight.dequantize(torch.float64).cpu().T).to(dtype).double()
    for row in range(rows):
        mixed = bias.double() + before[row][:, 0].double() * taps[:, 0].double() + u[row, :conv] * taps[:, 1].double()
        dt = F.softplus(u[row, conv + hidden :] + dt_bias)
        want = torch.cat([F.silu(mixed), F.silu(u[row, conv : conv + hidden]), dt])
        assert_near(f"row {row}", out[row].cpu(), want, 2 * TOLERANCE[dtype])
        moved = u[row, :conv, None] if alive[row] else before[row].double()
        assert_near(f"state {row}", states[row].cpu(), moved, 2 * TOLERANCE[dtype])


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_of_parts_and_their_norm(dtype: torch.dtype, unit: bool) -> None:
    x, norm, parts = draw(3, 72).to(dtype), (1 + 0.1 * draw(72)).to(dtype), draw(2, 3, 72).float()
    want = x.double() + parts.double().sum(0)
    want = want / want.norm(dim=1, keepdim=True) if unit else want
    out, normed = x.clone().to(DEVICE), nan(3, 72, dtype=dtype)
    finish(out, parts=parts.to(DEVICE), unit=unit, norm=norm.to(DEVICE), normed=normed, eps=1e-5)
    assert_near("sum", out.cpu(), want, TOLERANCE[dtype])
    # Of a row of length 1 the norm meets eps: from what was stored, as the plain path has it.
    assert_near("norm", normed.cpu(), F.rms_norm(out.cpu().double(), (72,), norm.double(), 1e-5), TOLERANCE[dtype])


def turn(x: Tensor, position: Tensor, inv_freq: Tensor) -> Tensor:
    """Rotated heads (..., length, head_dim) at positions (length,), in float64."""
    angles = position.double()[:, None] * inv_freq.double()
    a, b = x.double().chunk(2, dim=-1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)


@pytest.mark.parametrize("pdl", PDL)
@pytest.mark.parametrize("unrotated", [False, True])
@pytest.mark.parametrize("heads_dim", [(4, 2, 8), (3, 1, 64), (16, 8, 128)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention(dtype: torch.dtype, heads_dim: tuple[int, int, int], unrotated: bool, pdl: bool) -> None:
    """Rows of different lengths, one of them not alive; what lies behind a row's length is never read."""
    heads, kv_heads, dim = heads_dim
    lengths = (0, 1, 63, 64, 200) if INTERPRETED else (0, 1, 63, 64, 200, 1000)
    rows, capacity, rep = len(lengths), max(lengths) + 8, heads // kv_heads
    if INTERPRETED and heads > 4:
        pytest.skip("too slow in the interpreter; a GPU runs it")
    inv_freq = 10000.0 ** -(torch.arange(0, dim, 2) / dim)
    qkv = draw(rows, (heads + 2 * kv_heads) * dim).float()
    keys, values = ([draw(kv_heads, capacity, dim, seed=10 * b + j).to(dtype) for b in range(rows)] for j in (1, 2))
    for b, n in enumerate(lengths):
        keys[b][:, n:], values[b][:, n:] = float("nan"), float("nan")
    on_device = [[t.clone().to(DEVICE) for t in tensors] for tensors in (keys, values)]
    seqlens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    alive = torch.ones(rows, dtype=torch.int32, device=DEVICE)
    alive[2] = 0
    table = torch.zeros(rows, capacity if unrotated else 1, dim, dtype=dtype, device=DEVICE)
    frequencies = inv_freq.expand(rows if unrotated else 1, -1).contiguous().to(DEVICE)
    turns = Turns(frequencies, table, 1.0, unrotated)
    fill_turns(turns, seqlens, pdl=pdl)
    partial = Partial.allocate(rows, heads, kv_heads, dim, DEVICE)
    partial.sums.fill_(float("nan"))
    out = nan(rows, heads * dim, dtype=dtype)
    tables = [addresses(*tensors) for tensors in on_device]
    capacities = torch.full((rows,), capacity, dtype=torch.int64, device=DEVICE)
    given = {"num_kv_heads": kv_heads, "pdl": pdl}
    attention(qkv.to(DEVICE), turns, *tables, capacities, seqlens, alive, partial, out, **given)
    grouped = qkv.view(rows, kv_heads, rep + 2, dim)
    for b, n in enumerate(lengths):
        now = torch.tensor([n])
        q = turn(grouped[b, :, :rep, None], now, inv_freq)  # (kv_heads, rep, 1, dim)
        k_now, v_now = grouped[b, :, rep, None], grouped[b, :, rep + 1, None]
        stored = k_now.double() if unrotated else turn(k_now, now, inv_freq)
        old = turn(keys[b][:, :n], torch.arange(n), inv_freq) if unrotated else keys[b][:, :n].double()
        k = torch.cat([old, turn(k_now, now, inv_freq)], dim=1)
        v = torch.cat([values[b][:, :n].double(), v_now.double()], dim=1)
        scores = (q @ k[:, None].mT) / dim**0.5
        want = (scores.softmax(-1) @ v[:, None]).reshape(-1)
        assert_near(f"row {b} of {n}", out[b].cpu(), want, 3 * TOLERANCE[dtype])
        for name, cache, new in (("key", on_device[0][b], stored), ("value", on_device[1][b], v_now)):
            if alive[b]:
                assert_near(f"{name} {b}", cache[:, n].cpu(), new[:, 0], TOLERANCE[dtype])
            else:
                assert cache[:, n:].isnan().all(), f"{name} of a row that is not alive"
