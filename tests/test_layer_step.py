"""A layer's step written out in kernels against autograd over torch's operators in float64.

In Triton's interpreter where there is no GPU; see `test_ssd_triton.py`.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.flops import step_flops
from benchmarks.networks import random_batches, random_stage
from distill.config import StageConfig
from distill.convert import seed_mixer
from distill.data.packing import PackerState, RowShape, pack
from distill.distributed import FlatGradients
from distill.inputs import prepare
from distill.losses import MSE_SCALE, layer_mse
from distill.runner import step_runner
from distill.stages import LayerStage, PairedMixer, student_stage
from distill.upstream import load_upstream_student
from mmmamba.attention import Attention
from mmmamba.config import LanguageConfig
from mmmamba.segments import Segments
from tests.helpers import GOLDEN, TOLERANCE, assert_near, golden_cases, golden_expected
from tests.interpreter import require_triton
from tests.test_training_bench import PLAN, linear_products, tiny_recipe, tiny_teacher
from tests.training import batch, piece, run_step, student_of, teacher_of

DEVICE = require_triton()

from distill import layer_step  # noqa: E402
from distill.layer_step import Layers, LayerStep  # noqa: E402
from mmmamba.kernels import mixer_train  # noqa: E402

FACTOR = 3.0
# Of the reference's losses, which are float32 on a CPU; a GPU adds up in another order.
LOSSES = 1e-5 if DEVICE.type == "cpu" else 1e-4


def config(heads: int = 4, kv_heads: int = 2, dim: int = 16) -> LanguageConfig:
    return LanguageConfig(
        hidden_size=heads * dim,
        intermediate_size=8,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        num_hidden_layers=1,
        vocab_size=8,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        max_position_embeddings=64,
    )


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def pair(stack: LanguageConfig, *, train_vkq: bool) -> tuple[Attention, Any]:
    """An attention, and a mixer seeded from it of which nothing is as simple as it was seeded."""
    attention = Attention(stack).requires_grad_(False)
    for i, weight in enumerate(attention.parameters()):
        weight.copy_(draw(i, *weight.shape) / weight.shape[1] ** 0.5)
    attention = attention.to(DEVICE)
    mixer: Any = seed_mixer(attention, stack, torch.Generator().manual_seed(1))
    for i, name in enumerate(("conv.weight", "conv.bias", "A_log", "dt_bias", "norm.weight")):
        parameter = mixer.get_parameter(name)
        parameter.data += 0.3 * draw(10 + i, *parameter.shape)
    mixer.in_proj.gate_dt.data += 0.1 * draw(20, *mixer.in_proj.gate_dt.shape)
    mixer.in_proj.vkq.requires_grad_(train_vkq)
    mixer.out_proj.requires_grad_(False)
    mixer.chunk_size = 16
    return attention, mixer


def plain(mixer: Any, x: Tensor, target: Tensor, segments: Segments | None, real: Tensor | None) -> Any:
    """The loss in float64, and a mixer that holds the gradients of FACTOR times it."""
    wide = copy.deepcopy(mixer).double()
    wide.impl = "chunked"
    errors = (wide.mix(x.double(), None, 0, None, segments) - target.double()).square().mean(dim=-1)
    loss = errors.mean() if real is None else (errors * real).sum() / real.sum()
    (FACTOR * loss).backward()
    return loss.detach(), wide


def check(mixer: Any, loss: Tensor, wanted: Tensor, wide: Any, tolerance: float) -> None:
    assert float(loss) == pytest.approx(float(wanted), rel=tolerance)
    theirs = dict(wide.named_parameters())
    trained = [name for name, p in mixer.named_parameters() if p.requires_grad]
    assert len(trained) == 6 + mixer.in_proj.vkq.requires_grad
    for name, parameter in mixer.named_parameters():
        assert (parameter.grad is not None) == (name in trained), name
        if parameter.grad is not None:
            assert parameter.grad.shape == parameter.shape
            assert_near(f"gradient of {name}", parameter.grad, theirs[name].grad, tolerance * 10)


# Fewer tokens than a tile and more than one; one row and several.
@pytest.mark.parametrize("train_vkq", [False, True])
@pytest.mark.parametrize(("rows", "seqlen"), [(1, 3), (2, 37)])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_equal_autograds(rows: int, seqlen: int, packed: bool, train_vkq: bool) -> None:
    attention, mixer = pair(config(), train_vkq=train_vkq)
    x, target = draw(2, rows, seqlen, 64), draw(3, rows, seqlen, 64)
    segments, real = None, None
    if packed:
        segments = Segments(*(t.to(DEVICE) for t in Segments.of((torch.arange(seqlen) // 13).expand(rows, -1))))
        real = (torch.arange(seqlen) % 5 > 0).float().expand(rows, -1).to(DEVICE)
    step = LayerStep(attention, mixer)
    assert step.shares is not train_vkq
    loss = step.run(x, attention.in_proj(x), target, segments, real, FACTOR)
    check(mixer, loss, *plain(mixer, x, target, segments, real), TOLERANCE[torch.float32])


@pytest.mark.parametrize("train_vkq", [False, True])
@pytest.mark.parametrize("shape", [(3, 3, 8), (6, 2, 20)], ids=str)
def test_groups_of_heads(shape: tuple[int, int, int], train_vkq: bool) -> None:
    attention, mixer = pair(config(*shape), train_vkq=train_vkq)
    x, target = (draw(i, 1, 20, shape[0] * shape[2]) for i in (2, 3))
    loss = LayerStep(attention, mixer).run(x, attention.in_proj(x), target, None, None, FACTOR)
    check(mixer, loss, *plain(mixer, x, target, None, None), TOLERANCE[torch.float32])


def test_sums_over_many_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of tokens that end within a row: what looks back and forth over their borders, and the sums of all."""
    monkeypatch.setattr(mixer_train, "TOKENS_SUMMED", 32)
    attention, mixer = pair(config(), train_vkq=True)
    x, target = draw(2, 2, 70, 64), draw(3, 2, 70, 64)
    loss = LayerStep(attention, mixer).run(x, attention.in_proj(x), target, None, None, FACTOR)
    check(mixer, loss, *plain(mixer, x, target, None, None), TOLERANCE[torch.float32])


def test_gradients_are_added() -> None:
    attention, mixer = pair(config(), train_vkq=True)
    x, target = draw(2, 1, 9, 64), draw(3, 1, 9, 64)
    found = []
    for _ in range(2):
        LayerStep(attention, mixer).run(x, attention.in_proj(x), target, None, None, FACTOR)
        found.append({name: p.grad.clone() for name, p in mixer.named_parameters() if p.grad is not None})
    assert found[0]
    for name, gradient in found[0].items():
        assert torch.allclose(found[1][name], 2 * gradient, rtol=1e-5), name


def test_rows_are_shared_while_they_are_the_attentions() -> None:
    attention, mixer = pair(config(), train_vkq=False)
    assert LayerStep(attention, mixer).shares
    mixer.in_proj.vkq.data[0, 0] += 1e-3
    step = LayerStep(attention, mixer)
    assert not step.shares
    x, target = draw(2, 1, 20, 64), draw(3, 1, 20, 64)
    loss = step.run(x, torch.full((1, 20, 128), torch.nan, device=DEVICE), target, None, None, FACTOR)
    check(mixer, loss, *plain(mixer, x, target, None, None), TOLERANCE[torch.float32])


def test_what_goes_to_autograd() -> None:
    attention, mixer = pair(config(), train_vkq=False)
    step = LayerStep(attention, mixer)
    assert step.fits(draw(0, 1, 1, 64))
    assert not step.fits(draw(0, 1, 1, 64).double())
    mixer.head_dim = 256
    assert not step.fits(draw(0, 1, 1, 64))


def test_half_width_products() -> None:
    """fp16, which the interpreter multiplies; sums, decays and gradients of what trains in float32."""
    attention, mixer = pair(config(), train_vkq=True)
    x, target = draw(2, 1, 40, 64).half(), draw(3, 1, 40, 64).half()
    loss = LayerStep(attention, mixer).run(x, attention.in_proj(x.float()).half(), target, None, None, FACTOR)
    assert {p.grad.dtype for p in mixer.parameters() if p.grad is not None} == {torch.float32}
    wanted, wide = plain(mixer, x, target, None, None)
    check(mixer, loss, wanted, wide, 5e-3)


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("case", ["image", "two_images"])
def test_layer_losses_equal_the_reference(number: int, case: str) -> None:
    teacher = teacher_of("post", device=str(DEVICE))
    student = load_upstream_student(teacher, GOLDEN / "post" / f"stage{number}_student.safetensors")
    stage = LayerStage(teacher, student, train_vkq=number == 2, compiled=False, written_out=True)
    assert all(paired.step is not None and paired.step.shares == (number == 1) for paired in stage.paired)
    tensors = golden_cases("post")[case]
    with torch.no_grad():
        hidden = stage.model.hidden_states(tensors["input_ids"].to(DEVICE), tensors["pixel_values"].to(DEVICE))
        wanted = teacher.hidden_states(tensors["input_ids"].to(DEVICE), tensors["pixel_values"].to(DEVICE))
    assert_near("hidden states", hidden, wanted, LOSSES / 10)
    expected = golden_expected("post")[case]
    losses = [float(paired.loss) for paired in stage.paired]
    assert losses == pytest.approx(expected[f"stage{number}_mse_per_layer"], rel=LOSSES)
    loss = float(MSE_SCALE * torch.stack([paired.loss for paired in stage.paired]).mean())
    assert loss == pytest.approx(expected[f"stage{number}_loss"], rel=LOSSES)


@pytest.mark.parametrize("number", [1, 2])
def test_a_stage_written_out_gives_the_plain_ones_gradients(number: int) -> None:
    """Weighted batches through the stage, in float32."""
    found = []
    for written_out in (False, True):
        teacher = teacher_of("post", device=str(DEVICE))
        student = student_of(teacher, "post", "hybrid")
        stage = LayerStage(teacher, student, train_vkq=number == 2, compiled=False, written_out=written_out)
        stage.autocast = lambda: torch.autocast(DEVICE.type, enabled=False)  # type: ignore[method-assign]
        assert all((paired.step is not None) == written_out for paired in stage.paired)
        losses = run_step(stage, [(1.0, batch("image")), (0.5, batch("text"))])
        found.append((losses, {name: p.grad.clone() for name, p in stage.parameters().items() if p.grad is not None}))
    (losses, gradients), (other_losses, others) = found
    assert gradients.keys() == others.keys()
    for kind, loss in losses.items():
        assert float(other_losses[kind]) == pytest.approx(float(loss), rel=1e-5)
    for name, want in gradients.items():
        assert_near(f"gradient of {name}", others[name], want, 1e-3)


@pytest.mark.cuda
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("number", [1, 2])
def test_a_captured_step_written_out(number: int, compiled: bool) -> None:
    """As a CUDA graph, in bf16, twice: the gradients of autograd over the same batch, launched one by one."""
    found = []
    ways: tuple[Layers, ...] = ("autograd", "written-out")
    for layers in ways:
        teacher = teacher_of("post", torch.bfloat16, device="cuda")
        config = StageConfig(steps=1, lr=1.0, image_batch=1, text_batch=0)
        captured = layers == "written-out"
        stage = student_stage(
            f"stage{number}", teacher, student_of(teacher, "post", "hybrid"), config,
            compiled=compiled and captured, layers=layers,
        )  # fmt: skip
        assert stage.written_out == captured
        shape = RowShape.of(teacher.config, seqlen=60, tiles=4, pad_id=7)
        rows = pack([[piece(1, [3, -4, 5]), piece(2, [7]), piece(3, [2, -8, 3])]], shape, PackerState())
        gradients = FlatGradients(stage.parameters().values())
        step = step_runner(stage, gradients, graph=captured)
        for _ in range(1 + captured):
            step([(1.0, prepare(rows, teacher.config))])
        assert bool(gradients.flat.isfinite().all())
        found.append(gradients.flat.clone())
    torch.compiler.reset()
    # As for compiled stages of such a model: what rounds in another order moves its gradients by a few hundredths.
    assert_near("gradients", found[1], found[0], 0.1)


def test_shared_products_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs in stage 1 is what the benchmark counts, and what the last layer makes of its attention."""
    monkeypatch.setattr(layer_step, "runs_on", lambda device: True)  # in the interpreter too
    recipe, teacher = tiny_recipe(frozen_dtype="float32"), tiny_teacher()
    stage = random_stage("stage1", recipe, PLAN, teacher, DEVICE, compiled=False, layers="written-out")
    stage.autocast = lambda: torch.autocast(DEVICE.type, enabled=False)  # type: ignore[method-assign]
    batches = [(weight, inputs.to(DEVICE)) for weight, inputs in random_batches(recipe, PLAN, stage)]
    counted = step_flops("stage1", teacher.with_layer_types(*recipe.layer_types(teacher)), batches)
    last = teacher.language
    unasked = 2 * 160 * (last.hidden_size**2 + 3 * last.hidden_size * last.intermediate_size)
    assert counted.layers + counted.image + unasked == pytest.approx(linear_products(stage, batches), rel=1e-9)


def test_the_look_that_is_taken_before_use(monkeypatch: pytest.MonkeyPatch) -> None:
    assert layer_step.disagreement(DEVICE) < 1e-5
    real = mixer_train.gated_mse
    monkeypatch.setattr(mixer_train, "gated_mse", lambda *args, **given: real(*args, **given | {"factor": 1.1}))
    assert layer_step.disagreement(DEVICE) > 1e-2


def test_off_cuda_autograd_is_taken() -> None:
    device = torch.device("cpu")
    assert not layer_step.runs_on(device)
    assert not layer_step.choose("auto", device, compiled=True, captured=False)
    with pytest.raises(ValueError, match='layers "written-out" cannot run on cpu'):
        layer_step.choose("written-out", device, compiled=True, captured=False)
    teacher = teacher_of("post")
    config = StageConfig(steps=1, lr=1.0, image_batch=1, text_batch=0)
    stage = student_stage("stage1", teacher, student_of(teacher, "post"), config, compiled=False)
    assert isinstance(stage, LayerStage)
    assert all(isinstance(paired, PairedMixer) and paired.step is None for paired in stage.paired)
    assert layer_mse(torch.zeros(1, 2, 4), torch.ones(1, 2, 4)) == 1


def test_by_itself_only_where_it_was_measured(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gpu, looks = torch.device("cuda"), [True]

    def chosen(layers: Layers = "auto", *, compiled: bool = True, captured: bool = False) -> bool:
        return layer_step.choose(layers, gpu, compiled=compiled, captured=captured)

    monkeypatch.setattr(layer_step, "runs_on", lambda device: looks[-1])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with caplog.at_level(logging.INFO, logger=layer_step.__name__):
        assert chosen()
        assert not caplog.messages
        assert not chosen(captured=True)
        assert not chosen(compiled=False)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
        assert not chosen()
    reasons = [message.split("(")[1].split(";")[0] for message in caplog.messages]
    assert reasons == [
        "kernels not measured in a captured step",
        "uncompiled",
        "not measured on cards of compute capability 8.0",
    ]
    assert chosen("written-out", compiled=False, captured=True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert not chosen("autograd")
    looks.append(False)
    assert not chosen()
    with pytest.raises(ValueError, match='"written-out" cannot run'):
        chosen("written-out")
