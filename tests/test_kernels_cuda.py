"""On a GPU: the scans against the float64 reference, and the whole tiny models against the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmmamba.checkpoint import load_model
from mmmamba.generate import ModelInputs, decode_one_token, prefill
from mmmamba.kernels import Impl, select_scan, ssd_scan, ssd_scan_ref, ssm_step
from mmmamba.kernels.upstream import load_upstream_scan
from mmmamba.mixer import Mamba2Mixer
from tests.conformance import LIMIT
from tests.helpers import (
    FIXTURES,
    GOLDEN,
    TOLERANCE,
    assert_near,
    assert_same_state,
    filled_tensors,
    golden_cases,
    golden_expected,
    golden_model,
)
from tests.test_kernels import HEADS, LENGTHS, Inputs, random_inputs

pytestmark = pytest.mark.cuda

# Triton's products round to TensorFloat-32 or bf16 inside, whatever the inputs are.
UPSTREAM_TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: TOLERANCE[torch.bfloat16]}


@pytest.fixture(params=["chunked", "mamba_ssm"])
def impl(request: pytest.FixtureRequest) -> Any:
    if request.param == "mamba_ssm":
        scan, reason = load_upstream_scan()
        if scan is None:
            pytest.skip(reason)
    return request.param


def on_gpu(inputs: Inputs) -> Inputs:
    return Inputs(*(t.cuda() for t in inputs))


def poison() -> None:
    """Leave NaN in the memory that the next allocations get, so that unwritten outputs show."""
    torch.full((1 << 24,), float("nan"), device="cuda")


def upstream_inputs(seqlen: int, heads: tuple[int, int]) -> Inputs:
    """Shapes that mamba-ssm's kernels take: at least 16 wide."""
    return random_inputs(seqlen, *heads, batch=2, head_dim=32, d_state=32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("seqlen", LENGTHS)
@pytest.mark.parametrize("carried", [False, True])
def test_scan_equals_reference(
    impl: Any, dtype: torch.dtype, heads: tuple[int, int], seqlen: int, carried: bool
) -> None:
    inputs = upstream_inputs(seqlen, heads).to(dtype)
    exact = Inputs(*(t.double() for t in inputs))
    want_y, want_final = ssd_scan_ref(*exact[:5], exact.state if carried else None)
    gpu = on_gpu(inputs)
    poison()
    y, final = ssd_scan(*gpu[:5], gpu.state if carried else None, impl=impl)
    tolerance = (UPSTREAM_TOLERANCE if impl == "mamba_ssm" else TOLERANCE)[dtype]
    assert (y.dtype, final.dtype) == (dtype, torch.float32)
    assert_near("y", y.cpu(), want_y, tolerance)
    assert_near("state", final.cpu(), want_final, tolerance)


def test_gradients_equal_the_cpus(impl: Any) -> None:
    inputs = upstream_inputs(100, (6, 2)).to(torch.float32)

    def gradients(tensors: Inputs, chosen: Any) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in tensors[:5]]
        y, _ = ssd_scan(*leaves, impl=chosen)
        y.square().sum().backward()
        return [leaf.grad.cpu() for leaf in leaves if leaf.grad is not None]

    wanted = gradients(Inputs(*(t.double() for t in inputs)), "chunked")
    got = gradients(on_gpu(inputs), impl)
    tolerance = 1e-2 if impl == "mamba_ssm" else TOLERANCE[torch.float32]
    for name, grad, want in zip(Inputs._fields, got, wanted, strict=False):
        assert_near(f"gradient of {name}", grad, want, tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_step_equals_reference(dtype: torch.dtype) -> None:
    inputs = random_inputs(9).to(dtype)
    want_y, want_final = ssd_scan_ref(*(t.double() for t in inputs))
    gpu = on_gpu(inputs)
    state = gpu.state.clone()
    ys = [ssm_step(gpu.x[:, t], gpu.dt[:, t], gpu.A, gpu.B[:, t], gpu.C[:, t], state) for t in range(9)]
    assert_near("y", torch.stack(ys, dim=1).cpu(), want_y, TOLERANCE[dtype])
    assert_near("state", state.cpu(), want_final, TOLERANCE[torch.float32])


def test_auto_takes_mamba_ssm_where_it_imports() -> None:
    scan, reason = load_upstream_scan()
    if scan is None:
        pytest.skip(reason)
    assert select_scan("cuda").__name__ == "ssd_scan_upstream"


@pytest.mark.parametrize(("folder", "kind"), FIXTURES)
@torch.no_grad()
def test_models_equal_the_published_logits(folder: str, kind: str) -> None:
    """With our own scan, float32 without TensorFloat-32: the CPU's limit holds."""
    model = load_model(GOLDEN / folder / kind, device="cuda")
    use(model, "chunked")
    for case, tensors in golden_cases(folder).items():
        tiles = tensors.get("pixel_values")
        logits = model(tensors["input_ids"].cuda(), None if tiles is None else tiles.cuda())[0].cpu()
        difference = float((logits - tensors[f"{kind}.logits"]).abs().max())
        assert difference <= LIMIT, f"{case}: logits differ by {difference:.2e}"


@pytest.mark.parametrize(("folder", "kind"), FIXTURES)
def test_prefill_and_decoding_equal_the_cpus(folder: str, kind: str) -> None:
    model, reference = load_model(GOLDEN / folder / kind, device="cuda"), golden_model(folder, kind)
    use(model, "chunked")
    tensors = golden_cases(folder)["two_images"]
    ids, tiles = tensors["input_ids"], tensors["pixel_values"]
    state, want = model.new_state(), reference.new_state()
    assert all(t.is_cuda for t in state.tensors().values())
    logits = prefill(model, ModelInputs(ids, tiles), state, piece_size=7)  # inputs may stay on the CPU
    wanted = prefill(reference, ModelInputs(ids, tiles), want)
    said = []
    for _ in range(12):
        assert_near("logits", logits.cpu(), wanted, 1e-4)
        token = logits[:, :-12].argmax(dim=-1)
        said.append(int(token))
        logits = decode_one_token(model, token, state)
        wanted = decode_one_token(reference, token.cpu(), want)
    assert said == golden_expected(folder)["two_images"][f"greedy_{kind}"]
    assert_same_state(state.to("cpu"), want, 1e-4)
    back = state.to("cpu").to("cuda")
    assert all(torch.equal(t, filled_tensors(state)[name]) for name, t in filled_tensors(back).items())


def use(model: torch.nn.Module, impl: Impl) -> None:
    for module in model.modules():
        if isinstance(module, Mamba2Mixer):
            module.impl = impl
