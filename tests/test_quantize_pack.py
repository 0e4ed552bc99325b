"""Rounding weights: what is searched for, what is lossless, and layers that hold the result."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmmamba.kernels import native
from mmmamba.packing import PackedSpec, PackedWeight
from quantize import linear, torch_products
from quantize.api import on_grid
from quantize.linear import PackedEmbedding, packed_linear
from quantize.pack import narrow, nearest, search, widen
from tests.helpers import assert_near, relative_error

SHAPES = [(1545, 576, 64), (31, 96, 32), (7, 128, 128), (40, 192, 96)]
NO_LIBRARY = None, "this test is about torch"


def random_weight(rows: int, cols: int, *, outliers: bool = True) -> Tensor:
    w = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows)) / cols**0.5
    if outliers:
        w[:, ::50] *= 6
    return w


def packed(rows: int, cols: int, bits: int, group_size: int) -> PackedWeight:
    return nearest(random_weight(rows, cols), PackedSpec(bits, group_size, (rows, cols)))


@pytest.fixture(params=["C", "torch"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Products by our C, and by torch alone."""
    if request.param == "torch":
        monkeypatch.setattr(linear, "load_native", lambda: NO_LIBRARY)
    elif native.load_native()[0] is None:
        pytest.skip(f"no library: {native.load_native()[1]}")
    return request.param


# --- rounding ---


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("outliers", [False, True])
def test_search_beats_rounding_to_nearest(shape: tuple[int, int, int], outliers: bool) -> None:
    rows, cols, group = shape
    w, spec = random_weight(rows, cols, outliers=outliers), PackedSpec(4, group, (rows, cols))
    plain, searched = (p.unpack(torch.float64).view(-1, group) for p in (nearest(w, spec), search(w, spec)))
    groups = w.double().view(-1, group)
    before, after = ((p - groups).square().sum(dim=1) for p in (plain, searched))
    assert (after <= before * (1 + 1e-4)).all(), "no group gets worse"
    assert after.sum() < 0.95 * before.sum()


def test_search_of_what_has_no_range() -> None:
    w = torch.cat([torch.zeros(1, 64), torch.full((1, 64), -0.25), torch.eye(64)[:1]])
    found = search(w, PackedSpec(4, 64, (3, 64))).unpack(torch.float32)
    assert torch.isfinite(found).all()
    assert_near("constant and one-hot rows", found, w, 1e-3)


def test_many_groups_are_searched_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    w, spec = random_weight(30, 128), PackedSpec(4, 32, (30, 128))
    whole = search(w, spec)
    monkeypatch.setattr("quantize.pack.CHUNK_NUMEL", 100)
    assert all(torch.equal(a, b) for a, b in zip(search(w, spec)[:3], whole[:3], strict=True))


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("group", [64, 96])
def test_what_lies_on_a_grid_stays_there(bits: int, group: int) -> None:
    weight = packed(20, 192, bits, group).unpack(torch.float32)
    found = on_grid(weight, bits)
    assert found is not None
    assert torch.equal(found.unpack(torch.float32), weight)
    assert on_grid(random_weight(20, 192), bits) is None


@pytest.mark.parametrize("chunk", [2**20, 400])
def test_six_bits_are_kept_as_eight_and_stored_as_six(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantize.pack.CHUNK_NUMEL", chunk)
    six = packed(20, 64, 6, 64)
    eight = widen(six)
    assert eight.spec.bits == 8
    assert torch.equal(eight.unpack(torch.float32), six.unpack(torch.float32))
    again = narrow(eight)
    assert again.spec == six.spec
    assert all(torch.equal(a, b) for a, b in zip(again[:3], six[:3], strict=True))
    full = packed(20, 64, 8, 64)
    assert narrow(full) is full


# --- layers ---

CASES = [(1545, 576, 4, 64), (50, 192, 4, 96), (33, 128, 4, 32), (17, 96, 4, 96), (100, 576, 8, 576), (48, 640, 8, 64)]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 4, 40])
def test_layers_multiply_by_what_they_hold(
    case: tuple[int, int, int, int], dtype: torch.dtype, rows: int, library: str
) -> None:
    weight = packed(*case)
    layer = packed_linear(weight, nn.Parameter(torch.linspace(-1, 1, case[0], dtype=dtype)))
    x = torch.randn(2, rows, case[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    for batch in (x[:1], x):
        y = layer(batch)
        assert y.dtype == dtype
        wanted = F.linear(batch.double(), weight.unpack(torch.float64), layer.bias.double())
        # torch's own kernels round to bfloat16; ours rounds activations to 16 bits.
        exact = dtype == torch.float32 and library == "C" and not native.refusal_of(weight)
        assert_near(f"{case} {library}", y, wanted, 2e-4 if exact else 2e-2)


def test_torchs_kernels_are_what_runs_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """And unpacking, where they are missing or compute something else."""
    monkeypatch.setattr(linear, "load_native", lambda: NO_LIBRARY)
    weight, x = packed(40, 128, 4, 64), torch.randn(1, 128)
    assert torch_products.torch_product(weight) is not None, "every processor that CI meets has them"
    exact = F.linear(x, weight.unpack(torch.float32))
    assert not torch.equal(packed_linear(weight)(x), exact)
    for broken in (lambda weight: lambda x: torch.zeros(len(x), weight.spec.shape[0]), None):
        monkeypatch.setattr(torch_products, "int4_product", broken or (lambda weight: [].missing))
        torch_products._works.cache_clear()
        assert torch.equal(packed_linear(weight)(x), exact)
    torch_products._works.cache_clear()


def test_float64_and_other_dtypes_are_unpacked(library: str) -> None:
    weight = packed(40, 128, 4, 64)
    x = torch.randn(1, 128, dtype=torch.float64)
    assert torch.equal(packed_linear(weight)(x), F.linear(x, weight.unpack(torch.float64)))


def test_conversion_leaves_the_weight_as_it_is() -> None:
    layer = packed_linear(packed(40, 128, 4, 64))
    other = copy.deepcopy(layer).double().bfloat16()
    assert other.scales.dtype == other.zeros.dtype == torch.float16
    assert torch.equal(other.weight_as(torch.float32), layer.weight_as(torch.float32))


def test_rows_of_a_packed_table() -> None:
    table = packed_linear(packed(30, 64, 8, 32))
    embedding = PackedEmbedding(table, torch.float32)
    ids = torch.tensor([[0, 29], [7, 7]])
    wanted = table.packed_weight().unpack(torch.float32)
    assert torch.equal(embedding(ids), wanted[ids])
    assert embedding(ids[:0]).shape == (0, 2, 64)
    assert embedding.bfloat16()(ids).dtype == torch.bfloat16
    assert relative_error(embedding(ids), wanted[ids]) < 1e-2
