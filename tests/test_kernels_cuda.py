"""On a GPU: the scans against the float64 reference, and the whole tiny models against the CPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.chunked_loss import chunked_loss
from distill.config import StageConfig
from distill.data.packing import PackerState, RowShape, pack
from distill.distributed import FlatGradients
from distill.inputs import prepare
from distill.recompute import recompute_blocks_
from distill.runner import step_runner
from distill.stages import student_stage
from mmmamba.checkpoint import load_model
from mmmamba.generate import ModelInputs, decode_one_token, prefill
from mmmamba.kernels import Impl, segment_attention, select_scan, ssd_scan, ssd_scan_ref, ssm_step
from mmmamba.kernels.upstream import load_upstream_scan
from mmmamba.mixer import Mamba2Mixer
from mmmamba.segments import Segments
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
from tests.test_kernels import HEADS, LENGTHS, Inputs, random_ids, random_inputs
from tests.training import piece, student_of, teacher_of

pytestmark = pytest.mark.cuda

# Triton's products round to TensorFloat-32 or bf16 inside, whatever the inputs are.
UPSTREAM_TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: TOLERANCE[torch.bfloat16]}


@pytest.fixture(params=["chunked", "triton", "mamba_ssm"])
def impl(request: pytest.FixtureRequest) -> Any:
    if request.param == "triton":
        pytest.importorskip("triton")
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
    tolerance = {"mamba_ssm": 1e-2, "triton": 1e-4}.get(impl, TOLERANCE[torch.float32])
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


def test_auto_trains_with_our_kernels() -> None:
    pytest.importorskip("triton")
    assert select_scan("cuda", training=True).__name__ == "ssd_scan_triton"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("seqlen", "chunk_size"), [(1, 64), (63, 512), (370, 512), (1000, 256)])
@pytest.mark.parametrize("packed", [False, True])
def test_our_kernels_equal_the_reference(
    dtype: torch.dtype, dim: int, seqlen: int, chunk_size: int, packed: bool
) -> None:
    """Outputs, state and every gradient, at the shapes of nano and of 2.6B."""
    pytest.importorskip("triton")
    inputs = random_inputs(seqlen, 6, 2, head_dim=dim, d_state=dim).to(dtype)
    ids = random_ids(2, seqlen) if packed else None
    weights = torch.randn(2, seqlen, 6, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    results = []
    for double in (True, False):
        leaves = [(t.double() if double else t).cuda().requires_grad_() for t in inputs]
        seg = None if ids is None else ids.cuda()
        if not double:
            poison()
        impl = "chunked" if double else "triton"
        y, final = ssd_scan(*leaves, segment_ids=seg, chunk_size=chunk_size, impl=impl)
        ((y * weights.cuda().to(y.dtype)).sum() + 0.01 * final.square().sum()).backward()
        results.append([y, final, *(leaf.grad for leaf in leaves)])
    names = ("y", "state", *(f"gradient of {name}" for name in Inputs._fields))
    for name, want, got in zip(names, *results, strict=True):
        assert want is not None
        assert got is not None
        # A decay's gradient is a sum over all pairs of tokens, in which much cancels.
        tolerance = TOLERANCE[dtype] * (10 if name == "gradient of A" else 2)
        assert_near(name, got.cpu(), want.cpu(), tolerance)


def test_a_compiled_block_trains_without_a_break() -> None:
    pytest.importorskip("triton")
    select_scan("cuda", training=True)
    model = golden_model("post", "linear").cuda()
    block = copy.deepcopy(model.language.layers[0]).requires_grad_(True)
    x = torch.randn(2, 70, model.config.language.hidden_size, device="cuda")
    results = []
    for run in (block, torch.compile(block, fullgraph=True, dynamic=False)):
        block.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            y = run(x, None, 0, None)
        y.square().sum().backward()
        results.append([y, *(p.grad.clone() for p in block.parameters() if p.grad is not None)])
    for got, want in zip(results[1], results[0], strict=True):
        assert_near("compiled", got, want, 2e-2)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["stage1", "stage2", "stage3"])
def test_compiled_stages_give_the_plain_ones_gradients(name: str, recompute: bool) -> None:
    """Packed rows of a hybrid student beside frozen weights in bf16, as the 2.6B recipes have them."""
    pytest.importorskip("triton")
    if recompute and name != "stage3":
        pytest.skip("the layers of stages 1 and 2 keep nothing that could be computed again")
    found = []
    for compiled in (False, True):
        teacher = teacher_of("post", torch.bfloat16, device="cuda")
        student = student_of(teacher, "post", "hybrid")
        config = StageConfig(steps=1, lr=1.0, image_batch=1, text_batch=0)
        stage = student_stage(name, teacher, student, config, compiled=compiled)
        if recompute:
            recompute_blocks_(stage.networks())
        shape = RowShape.of(teacher.config, seqlen=60, tiles=4, pad_id=7)
        batch = pack([[piece(1, [3, -4, 5]), piece(2, [7]), piece(3, [2, -8, 3])]], shape, PackerState())
        gradients = FlatGradients(stage.parameters().values())
        inputs = prepare(batch, teacher.config, fixed_shapes=False)
        step_runner(stage, gradients, graph=False)([(1.0, inputs)])
        assert bool(gradients.flat.isfinite().all())
        found.append(gradients.flat.clone())
    torch.compiler.reset()
    # Of a random model in bf16: rounding in another order moves its gradients by a few hundredths.
    assert_near("gradients", found[1], found[0], 0.2)


def test_packed_attention_equals_the_mask() -> None:
    """Flash attention of any length, as the rows of a step meet it: bf16, borders and empty slots."""
    segments = Segments.of(random_ids(2, 300), 100)
    on_device = Segments(*(t.cuda() for t in segments))
    results = []
    for impl in ("masked", "varlen"):
        g = torch.Generator().manual_seed(0)
        leaves = [torch.randn(2, heads, 300, 64, generator=g).cuda().bfloat16().requires_grad_() for heads in (6, 2, 2)]
        y = segment_attention(*leaves, on_device, impl=impl)  # type: ignore[arg-type]
        y.square().sum().backward()
        results.append([y, *(leaf.grad for leaf in leaves)])
    for got, want in zip(results[1], results[0], strict=True):
        assert got is not None
        assert want is not None
        assert_near("flash attention", got, want, 2e-2)


def test_the_chunked_loss_is_captured() -> None:
    """No look at a value and no shape that depends on one, or the capture would fail."""
    g = torch.Generator().manual_seed(0)
    hidden, teacher = (torch.randn(40, 16, generator=g).cuda() for _ in range(2))
    head = torch.randn(300, 16, generator=g).cuda()
    hidden.requires_grad_()
    hidden.grad = torch.zeros_like(hidden)
    weights, targets = torch.ones(40, device="cuda"), torch.arange(40, device="cuda")

    def step() -> Tensor:
        hidden.grad.zero_()
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            loss = chunked_loss(
                hidden,
                head,
                teacher_hidden=teacher,
                teacher_head=head,
                kl_weights=weights,
                targets=targets,
                ce_weights=weights,
                chunk_tokens=16,
            )
        loss.total.backward()
        return loss.total.detach()

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        want = step()
        gradient = hidden.grad.clone()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total = step()
    hidden.grad.fill_(float("nan"))
    graph.replay()
    assert torch.equal(total, want)
    assert torch.equal(hidden.grad, gradient)


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
