"""Our Triton kernels against the torch form in float64: outputs, final state and every gradient.

In Triton's interpreter where there is no GPU (conftest.py says so before anything imports Triton). It multiplies bf16
as if it were whole numbers, so half-width inputs are fp16 there; on a GPU `test_kernels_cuda.py` does the rest.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mmmamba.kernels import _IN_GRAPHS, ssd_scan_ref
from mmmamba.kernels.chunked import ssd_scan_chunked
from tests.helpers import TOLERANCE, assert_near, golden_model
from tests.test_kernels import Inputs, random_ids, random_inputs

pytest.importorskip("triton", reason="Triton is not installed; the kernels were not run")
if torch.cuda.is_available():
    pytest.skip("the interpreter's tests; test_kernels_cuda.py runs the kernels on this GPU", allow_module_level=True)

from tests.interpreter import require_triton

require_triton()

from benchmarks import scan_tiles  # noqa: E402
from benchmarks.kernels import Shape  # noqa: E402
from mmmamba.kernels import ssd_op  # noqa: E402
from mmmamba.kernels.ssd_op import TILES, ssd_scan_triton  # noqa: E402

NAMES = ("y", "state", *(f"gradient of {name}" for name in Inputs._fields))


def run(scan: Any, inputs: Inputs, *, carried: bool, use_state: bool = True, **options: Any) -> list[Tensor | None]:
    """y, state, gradients of x, dt, A, B, C and of the initial state."""
    leaves = [t.clone().requires_grad_() for t in inputs]
    y, final = scan(*leaves[:5], leaves[5] if carried else None, **options)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    loss = (y * weights.to(y.dtype)).sum()
    (loss + final.square().sum() if use_state else loss).backward()
    return [y, final, *(leaf.grad for leaf in leaves)]


def assert_equal(got: list[Tensor | None], wanted: list[Tensor | None], tolerance: float) -> None:
    for name, tensor, want in zip(NAMES, got, wanted, strict=True):
        assert (tensor is None) == (want is None), name
        if tensor is not None and want is not None:
            assert_near(name, tensor, want, tolerance * (10 if name == "gradient of A" else 1))


def double(inputs: Inputs) -> Inputs:
    return Inputs(*(t.double() for t in inputs))


# One chunk and several, full and cut short; chunks above and below a tile, one that is no multiple of it.
@pytest.mark.parametrize(("seqlen", "chunk_size"), [(3, 2), (40, 512), (75, 512), (75, 36)])
@pytest.mark.parametrize(("packed", "carried"), [(False, True), (True, False)])
def test_equals_the_float64_form(seqlen: int, chunk_size: int, packed: bool, carried: bool) -> None:
    inputs = random_inputs(seqlen, 2, 1, batch=1 + packed).to(torch.float32)
    options: dict[str, Any] = {"chunk_size": chunk_size, "carried": carried}
    options["segment_ids"] = random_ids(2, seqlen) if packed else None
    got = run(ssd_scan_triton, inputs, **options)
    assert_equal(got, run(ssd_scan_chunked, double(inputs), **options), 2 * TOLERANCE[torch.float32])


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (6, 2)])
def test_groups_of_heads(heads: tuple[int, int]) -> None:
    inputs = random_inputs(20, *heads, batch=1, head_dim=20, d_state=17).to(torch.float32)
    options: dict[str, Any] = {"chunk_size": 16, "carried": True}
    got = run(ssd_scan_triton, inputs, **options)
    assert_equal(got, run(ssd_scan_chunked, double(inputs), **options), 2 * TOLERANCE[torch.float32])


@pytest.mark.parametrize("dim", [64, 128])
def test_the_dimensions_of_the_models(dim: int) -> None:
    inputs = random_inputs(40, 2, 1, batch=1, head_dim=dim, d_state=dim).to(torch.float32)
    options: dict[str, Any] = {"chunk_size": 32, "carried": False, "segment_ids": random_ids(1, 40)}
    got = run(ssd_scan_triton, inputs, **options)
    assert_equal(got, run(ssd_scan_chunked, double(inputs), **options), 2 * TOLERANCE[torch.float32])


def test_half_width_inputs() -> None:
    """Products in fp16, sums in float32; decays and steps in float32 throughout."""
    inputs = random_inputs(70, 2, 1, batch=1, head_dim=16, d_state=16).to(torch.float16)
    options: dict[str, Any] = {"chunk_size": 48, "carried": True}
    got = run(ssd_scan_triton, inputs, **options)
    assert [t.dtype for t in got if t is not None] == [
        *(torch.float16, torch.float32),
        *(torch.float16, torch.float32, torch.float32, torch.float16, torch.float16, torch.float32),
    ]
    assert_equal(got, run(ssd_scan_chunked, double(inputs), **options), 2e-3)


@torch.no_grad()
def test_the_reference_and_strong_decays() -> None:
    inputs = random_inputs(40, 2, 1, batch=2).to(torch.float32)
    strong = inputs._replace(A=torch.full_like(inputs.A, -1000.0), dt=torch.full_like(inputs.dt, 5.0))
    for case in (inputs, strong):
        ids = random_ids(2, 40)
        y, final = ssd_scan_triton(*case, segment_ids=ids, chunk_size=16)
        want_y, want_final = ssd_scan_ref(*double(case), segment_ids=ids)
        assert_near("y", y, want_y, TOLERANCE[torch.float32])
        assert_near("state", final, want_final, TOLERANCE[torch.float32])


def test_without_a_state_none_is_made() -> None:
    inputs = random_inputs(20, 2, 1, batch=1).to(torch.float32)
    for chunk_size in (512, 16):
        options: dict[str, Any] = {"chunk_size": chunk_size, "carried": False, "use_state": False}
        got = run(ssd_scan_triton, inputs, need_state=False, **options)
        wanted = run(ssd_scan_chunked, double(inputs), **options)
        assert got[1] is not None
        assert got[1].numel() == 0
        got[1] = wanted[1] = None
        assert_equal(got, wanted, 2 * TOLERANCE[torch.float32])
    y, _, states = torch.ops.mmmamba.ssd_forward(*inputs[:5], None, None, 512, False)
    assert states.numel() == 0
    assert y.shape == (1, 20, 2, 8)


@pytest.mark.parametrize("setting", ["16x4x2", "64x8x1", "32x4x1x128"])
def test_other_tiles_give_the_same(setting: str) -> None:
    inputs = random_inputs(75, 4, 2, batch=1).to(torch.float32)
    tiles = scan_tiles.parse(setting)
    tiles.pop("maxnreg", None)  # of a real compiler alone
    shape = Shape(1, 75, 4, 2, 8, 36)
    wanted = scan_tiles.run(shape, list(inputs[:5]), random_ids(1, 75), {})
    found = scan_tiles.run(shape, list(inputs[:5]), random_ids(1, 75), tiles)
    assert scan_tiles.difference(found, wanted) < 1e-5
    assert TILES == {}, "settings are those of one run"


def test_kernels_may_have_tiles_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = random_inputs(75, 4, 2, batch=1).to(torch.float32)
    for name, block in (("chunk_states", 16), ("scan_forward", 64), ("scan_backward_kv", 16), ("scan_backward_q", 32)):
        monkeypatch.setitem(TILES, name, {"BLOCK": block})
    options: dict[str, Any] = {"chunk_size": 36, "carried": True, "segment_ids": random_ids(1, 75)}
    got = run(ssd_scan_triton, inputs, **options)
    assert_equal(got, run(ssd_scan_chunked, double(inputs), **options), 2 * TOLERANCE[torch.float32])


@pytest.mark.parametrize("chunk_size", [36, 128])
def test_wrong_kernels_of_step_sizes_are_left_out(monkeypatch: pytest.MonkeyPatch, chunk_size: int) -> None:
    """On a card where they miscompute gradients stay right, with states and without."""
    inputs = random_inputs(75, 4, 2, batch=1).to(torch.float32)
    real = ssd_op._step_gradients
    monkeypatch.setattr(ssd_op, "_step_gradients", lambda *given: tuple(1.1 * grad for grad in real(*given)))
    options: dict[str, Any] = {"chunk_size": chunk_size, "carried": False, "use_state": False}
    wanted = run(ssd_scan_chunked, double(inputs), **options)
    for trusted in (True, False):
        ssd_op._steps_run.cache_clear()
        if trusted:
            monkeypatch.setattr(ssd_op, "MAX_DIFFERENCE", 1.0)
            with pytest.raises(AssertionError, match="gradient of"):
                assert_equal(run(ssd_scan_triton, inputs, **options), wanted, 2 * TOLERANCE[torch.float32])
        else:
            monkeypatch.setattr(ssd_op, "MAX_DIFFERENCE", 1e-3)
            assert_equal(run(ssd_scan_triton, inputs, **options), wanted, 2 * TOLERANCE[torch.float32])
    ssd_op._steps_run.cache_clear()


def test_settings_that_are_none() -> None:
    assert scan_tiles.parse("64x8x2x128") == {"BLOCK": 64, "num_warps": 8, "num_stages": 2, "maxnreg": 128}
    for wrong in ("64x8", "64x8x2x1x1", "64xax2"):
        with pytest.raises(ValueError, match=f'setting "{wrong}" is not known; use BLOCKxWARPSxSTAGES'):
            scan_tiles.parse(wrong)
    with pytest.raises(SystemExit):
        scan_tiles.main([])


def test_strided_inputs_are_not_copied_wrong() -> None:
    """As the mixer passes them: slices of one projection."""
    inputs = random_inputs(20, 4, 2, batch=2, head_dim=8, d_state=8).to(torch.float32)
    flat = torch.cat([t.flatten(2) for t in (inputs.x, inputs.B, inputs.C)], dim=-1)
    x, B, C = (t.unflatten(2, (-1, 8)) for t in flat.split([16, 16, 32], dim=-1))
    assert not x.is_contiguous()
    options: dict[str, Any] = {"chunk_size": 16, "carried": False}
    leaf = flat.clone().requires_grad_()
    parts = (t.unflatten(2, (-1, 8)) for t in leaf.split([16, 16, 32], dim=-1))
    x, B, C = parts
    y, _ = ssd_scan_triton(x, inputs.dt, inputs.A, B, C, chunk_size=16, need_state=False)
    # The gradient of a sum is one number, expanded: no stride of it is 1.
    y.sum().backward()
    leaves = [t.double().requires_grad_() for t in inputs[:5]]
    want, _ = ssd_scan_chunked(*leaves, chunk_size=options["chunk_size"])
    want.sum().backward()
    assert_near("y", y, want, TOLERANCE[torch.float32])
    wanted = torch.cat([leaves[i].grad.flatten(2) for i in (0, 3, 4)], dim=-1)  # type: ignore[union-attr]
    assert leaf.grad is not None
    assert_near("gradient", leaf.grad, wanted, 2 * TOLERANCE[torch.float32])


def test_what_goes_to_the_torch_form() -> None:
    exact = random_inputs(9, 2, 1, batch=1)
    y, final = ssd_scan_triton(*exact)
    assert y.dtype == final.dtype == torch.float64
    wide = random_inputs(3, 1, 1, batch=1, head_dim=130, d_state=4).to(torch.float32)
    assert torch.equal(ssd_scan_triton(*wide)[0], ssd_scan_chunked(*wide)[0])
    with pytest.raises(ValueError, match="chunk_size=0 must be 1 or more"):
        ssd_scan_triton(*random_inputs(3).to(torch.float32), chunk_size=0)
    narrow = random_inputs(3).to(torch.float32)
    with pytest.raises(ValueError, match="long sums lose small terms"):
        ssd_scan_triton(*narrow[:5], narrow.state.bfloat16())


def test_torch_knows_the_operator() -> None:
    """Schema, shapes of the fake forms and the autograd registration, by torch's own checks."""
    for chunk_size, need_state, carried in ((16, True, True), (512, False, False)):
        inputs = random_inputs(18, 2, 1, batch=1).to(torch.float32)
        leaves = [t.requires_grad_() for t in inputs]
        args = (*leaves[:5], leaves[5] if carried else None, random_ids(1, 18), chunk_size, need_state)
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(torch.ops.mmmamba.ssd_forward.default, args, test_utils=checks)


@pytest.fixture
def ours_in_graphs() -> Iterator[None]:
    """As `select_scan` leaves it on a machine with CUDA."""
    before = dict(_IN_GRAPHS)
    _IN_GRAPHS["cpu"] = ssd_scan_triton
    yield
    _IN_GRAPHS.clear()
    _IN_GRAPHS.update(before)
    torch.compiler.reset()


@pytest.mark.usefixtures("ours_in_graphs")
def test_a_compiled_block_keeps_one_graph() -> None:
    model = golden_model("post", "linear")
    block = copy.deepcopy(model.language.layers[0]).requires_grad_(True)
    x = torch.randn(1, 20, model.config.language.hidden_size, generator=torch.Generator().manual_seed(0))
    results = []
    for forward in (block, torch.compile(block, fullgraph=True, dynamic=False, backend="aot_eager")):
        block.zero_grad()
        forward(x, None, 0, None).square().sum().backward()
        results.append({name: p.grad.clone() for name, p in block.named_parameters() if p.grad is not None})
    assert results[0].keys() == results[1].keys()
    for name, want in results[0].items():
        assert_near(f"gradient of {name}", results[1][name], want, 1e-4)
