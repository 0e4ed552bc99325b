"""The stages: losses of the reference training code, what moves and what does not, the loop and its recipes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

from distill.config import RECIPES_DIR, STAGES, Recipe, StageConfig
from distill.convert import SplitProjection, fuse_, make_student
from distill.data.batches import Batch, pixel_values
from distill.evaluate import exact_matches
from distill.inputs import Inputs, answer_hidden, hidden_states, prepare, weighted_mean
from distill.losses import MSE_SCALE, layer_mse, token_kl
from distill.rounding import rounded, rounded_weights, storage_spec
from distill.stages import LayerStage, LogitsStage, Stage, TeacherStage, no_weight_decay, paired_layers
from distill.trainer import train
from mmmamba.checkpoint import load_model, save_model
from mmmamba.config import ModelConfig
from mmmamba.generate import ModelInputs, decode_one_token, prefill
from mmmamba.keymap import from_published
from mmmamba.mixer import Mamba2Mixer
from mmmamba.model import MMMamba
from tests.helpers import (
    FOLDERS,
    GOLDEN,
    IMAGE_ID,
    assert_near,
    golden_cases,
    golden_config,
    golden_expected,
    golden_model,
)

LAYER_CASES = ("image", "text", "two_images")


def teacher_of(folder: str, dtype: torch.dtype = torch.float32) -> MMMamba:
    """A model of its own, to be trained."""
    return load_model(GOLDEN / folder / "hovle", dtype=dtype)


def student_of(teacher: MMMamba, folder: str, kind: str = "linear") -> MMMamba:
    embedding, language = ModelConfig.from_dict(golden_config(folder, kind)).stacks
    return make_student(teacher, embedding.layer_types, language.layer_types)


def load_unfused(student: MMMamba, path: Path) -> dict[str, Tensor]:
    """Put a stage's stored student (q, k, v, g, in_proj apart) into ours; returns what else the file holds."""
    stored = load_file(path)
    rest = {}
    attention = {name for name in stored if ".attention." in name and not name.endswith("_shadow.weight")}
    for name in stored.keys() - attention:
        if not name.endswith("_shadow.weight"):
            rest[name] = stored[name]
    for prefix in sorted({name.partition(".attention.")[0] for name in attention}):
        layer = {
            n.removeprefix(prefix + ".attention."): t for n, t in stored.items() if n.startswith(prefix + ".attention.")
        }
        ours = from_published(prefix + ".attention_norm.weight")
        assert ours is not None
        mixer = student.get_submodule(ours.removesuffix("_norm.weight"))
        assert isinstance(mixer, Mamba2Mixer)
        assert isinstance(mixer.in_proj, SplitProjection)
        fill = {
            mixer.in_proj.vkq: torch.cat([layer[f"{p}_proj.weight"] for p in "vkq"]),
            mixer.in_proj.gate_dt: torch.cat([layer["g_proj.weight"], layer["in_proj.weight"]]),
            mixer.conv.weight: layer["conv1d.weight"],
            mixer.conv.bias: layer["conv1d.bias"],
            mixer.A_log: layer["A_log_bias"],
            mixer.dt_bias: layer["dt_bias"],
            mixer.norm.weight: layer["g_norm.weight"],
        }
        for parameter, values in fill.items():
            assert parameter.shape == values.shape
            parameter.data.copy_(values)
        rest[f"{ours.removesuffix('_norm.weight')}.out_proj.weight"] = layer["o_proj.weight"]
    return rest


# --- losses against the reference training code ---


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("case", LAYER_CASES)
@pytest.mark.parametrize("number", [1, 2])
def test_layer_losses_equal_the_reference(folder: str, case: str, number: int) -> None:
    teacher = teacher_of(folder, torch.float64)
    student = student_of(teacher, folder)
    rest = load_unfused(student, GOLDEN / folder / f"stage{number}_student.safetensors")
    shared = dict(teacher.named_parameters())
    for name, values in rest.items():
        ours = from_published(name) or name
        if ours in shared:
            assert torch.equal(shared[ours], values.double()), f"{ours} of the fixture is not the teacher's"
    stage = LayerStage(teacher, student, train_vkq=number == 2, compiled=False)
    tensors = golden_cases(folder)[case]
    with torch.no_grad():
        hidden = stage.model.hidden_states(tensors["input_ids"], tensors.get("pixel_values"))
        wanted = teacher.hidden_states(tensors["input_ids"], tensors.get("pixel_values"))
    assert torch.equal(hidden, wanted), "layers after the first saw something else than the teacher's"

    expected = golden_expected(folder)[case]
    losses = [float(paired.loss) for paired in stage.paired]
    assert losses == pytest.approx(expected[f"stage{number}_mse_per_layer"], rel=1e-5)
    loss = float(MSE_SCALE * torch.stack([paired.loss for paired in stage.paired]).mean())
    assert loss == pytest.approx(expected[f"stage{number}_loss"], rel=1e-5)


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("kind", ["linear", "hybrid"])
def test_logit_losses_equal_the_reference(folder: str, kind: str) -> None:
    teacher, student = golden_model(folder, "hovle"), golden_model(folder, kind)
    for case, tensors in golden_cases(folder).items():
        with torch.no_grad():
            inputs = tensors["input_ids"], tensors.get("pixel_values")
            kl = token_kl(student(*inputs), teacher(*inputs))
        assert kl.shape == tensors["input_ids"].shape
        assert (kl >= 0).all()
        wanted = golden_expected(folder)[case][f"stage3_kl_sum_{kind}"]
        assert float(kl.sum()) == pytest.approx(wanted, rel=1e-5), case


def test_losses_by_hand() -> None:
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.2, 0.2, 0.6])
    kl = float((p * (p / q).log()).sum())
    student, teacher = q.log()[None] + 3, p.log()[None] - 1  # logits may be shifted
    assert token_kl(student, teacher).tolist() == [pytest.approx(kl)]
    assert token_kl(teacher, teacher).tolist() == [pytest.approx(0, abs=1e-7)]
    assert float(token_kl(teacher, student)) != pytest.approx(kl), "the divergence has a direction"
    narrow = token_kl(student.bfloat16(), teacher.bfloat16())
    assert narrow.dtype == torch.float32
    a, b = torch.zeros(2, 3, 4), torch.full((2, 3, 4), 0.5)
    assert float(layer_mse(a, b)) == 0.25
    assert layer_mse(a.bfloat16(), b.bfloat16()).dtype == torch.float32


def test_layer_gradients_are_those_of_the_stage_loss() -> None:
    """Each layer's backward runs at once; together they are the gradient of 1000 x the mean over layers."""
    teacher = teacher_of("post", torch.float64)
    student = student_of(teacher, "post")
    load_unfused(student, GOLDEN / "post" / "stage2_student.safetensors")
    stage = LayerStage(teacher, student, train_vkq=True, compiled=False)
    tensors = golden_cases("post")["image"]
    for paired in stage.paired:
        paired.weight = 0.25
    with torch.no_grad():
        stage.model.hidden_states(tensors["input_ids"], tensors["pixel_values"])
    found = {name: p.grad.clone() for name, p in stage.parameters().items() if p.grad is not None}
    assert found.keys() == stage.parameters().keys()
    name, parameter = next((n, p) for n, p in stage.parameters().items() if n.endswith("0.mixer.A_log"))
    nudge = 1e-4
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            parameter[0] += sign * nudge
            stage.model.hidden_states(tensors["input_ids"], tensors["pixel_values"])
            losses.append(MSE_SCALE * float(torch.stack([p.loss for p in stage.paired]).double().mean()))
            parameter[0] -= sign * nudge
    slope = 0.25 * (losses[0] - losses[1]) / (2 * nudge)
    assert float(found[name][0]) == pytest.approx(slope, rel=0.05, abs=1e-3)


# --- what trains ---


def batch(kind: str, seed: int = 0, rows: int = 3) -> Batch:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 140, (rows, 16), generator=g)
    mask = torch.zeros(rows, 16, dtype=torch.bool)
    mask[:, 10:14] = True
    pixels = None
    if kind == "image":
        ids[:, 2:6] = IMAGE_ID
        pixels = torch.randint(0, 256, (rows, 56, 56, 3), generator=g, dtype=torch.uint8)
    return Batch(ids, mask, pixels, 0)


def batches(kind: str) -> Iterator[Batch]:
    seed = 0
    while True:
        yield batch(kind, seed := seed + 1)


def run_stage(stage: Stage, tmp_path: Path, **changes: Any) -> None:
    config = StageConfig(**{"steps": 4, "lr": 1e-2, "image_batch": 3, "text_batch": 3, "warmup": 0.25} | changes)
    train("test", stage, config, batches("image"), batches("text"), tmp_path / "log.jsonl")


MIXER_NEW = {"in_proj.gate_dt", "conv.weight", "conv.bias", "A_log", "dt_bias", "norm.weight"}


def moved(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    now = dict(model.named_parameters())
    assert now.keys() == before.keys()
    assert all(torch.isfinite(p).all() for p in now.values())
    return {name for name in now if not torch.equal(now[name], before[name])}


def copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def mixer_tensors(student: MMMamba, names: set[str]) -> set[str]:
    layers = [n for n, m in student.named_modules() if isinstance(m, Mamba2Mixer)]
    return {f"{layer}.{name}" for layer in layers for name in names}


@pytest.mark.parametrize("kind", ["linear", "hybrid"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_what_is_frozen_stays_and_what_trains_moves(kind: str, number: int, tmp_path: Path) -> None:
    teacher = teacher_of("post")
    student = student_of(teacher, "post", kind)
    teacher_before, student_before = copies(teacher), copies(student)
    stage: Stage = (
        LogitsStage(teacher, student, compiled=False)
        if number == 3
        else LayerStage(teacher, student, train_vkq=number == 2, compiled=False)
    )
    run_stage(stage, tmp_path)
    names = MIXER_NEW if number == 1 else MIXER_NEW | {"in_proj.vkq"}
    assert moved(student, student_before) == mixer_tensors(student, names)
    assert moved(teacher, teacher_before) == set()
    # A name for each of them is printed and counted: nothing trains unnoticed.
    assert len(stage.parameters()) == len(mixer_tensors(student, names))
    assert {id(p) for p in stage.parameters().values()} == {
        id(p) for name, p in student.named_parameters() if name in mixer_tensors(student, names)
    }
    assert {stage.learning_rate(name) for name in stage.parameters()} == {"lr"}


def test_stages_one_after_the_other_on_one_student(tmp_path: Path) -> None:
    """As the command does it: what a stage froze must not stay frozen for the next, nor the other way round."""
    teacher = teacher_of("post")
    student = student_of(teacher, "post")
    for number in (1, 2, 3, 1):
        before, teacher_before = copies(student), copies(teacher)
        stage: Stage = (
            LogitsStage(teacher, student, compiled=False)
            if number == 3
            else LayerStage(teacher, student, train_vkq=number == 2, compiled=False)
        )
        run_stage(stage, tmp_path)
        wanted = MIXER_NEW if number == 1 else MIXER_NEW | {"in_proj.vkq"}
        assert moved(student, before) == mixer_tensors(student, wanted), f"stage {number}"
        assert moved(teacher, teacher_before) == set()
    save_model(fuse_(student), tmp_path / "out")
    ids = golden_cases("post")["text"]["input_ids"]
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "out")(ids), student(ids))


def test_the_teacher_trains_all_but_what_nobody_reads(tmp_path: Path) -> None:
    teacher = teacher_of("post")
    before = copies(teacher)
    stage = TeacherStage(teacher, compiled=False)
    base_before = copies(stage.base)
    run_stage(stage, tmp_path)
    assert moved(teacher, before) == before.keys() - {"embedding.stem.class_embedding"}
    assert moved(stage.base, base_before) == set()
    assert not {p.data_ptr() for p in teacher.parameters()} & {p.data_ptr() for p in stage.base.parameters()}
    rates = {name: stage.learning_rate(name) for name in stage.parameters()}
    slow = {name for name, rate in rates.items() if rate == "lr_language"}
    assert slow == {n for n in before if n.startswith("language.")} | {"embedding.text.weight"}
    assert set(rates.values()) == {"lr", "lr_language"}


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_stage_lowers_its_loss(number: int) -> None:
    teacher = teacher_of("post")
    student = student_of(teacher, "post")
    stage: Stage = (
        LogitsStage(teacher, student, compiled=False)
        if number == 3
        else LayerStage(teacher, student, train_vkq=number == 2, compiled=False)
    )
    optimizer = torch.optim.AdamW(stage.parameters().values(), lr=1e-2, weight_decay=0.0)
    fixed = [(1.0, batch("image")), (0.5, batch("text"))]
    losses = []
    for _ in range(12):
        metrics = stage.step(fixed)
        losses.append({name: float(value) for name, value in metrics.items()})
        optimizer.step()
        optimizer.zero_grad()
    kinds = {"image_kl", "text_kl"} if number == 3 else {"image_mse", "text_mse"}
    assert losses[0].keys() == kinds
    for kind in kinds:
        assert losses[-1][kind] < 0.9 * losses[0][kind], kind


def test_the_teachers_losses() -> None:
    """Cross-entropy on answers about pictures; on text the distance to the base, zero before the first step."""
    teacher = teacher_of("post")
    # The identity at the start, as `new_teacher` makes it.
    for i in range(len(teacher.embedding.layers)):
        teacher.get_parameter(f"embedding.layers.{i}.mixer.out_proj.weight").data.zero_()
        teacher.get_parameter(f"embedding.layers.{i}.mlp.w2.weight").data.zero_()
    stage = TeacherStage(teacher, compiled=False)
    metrics = stage.step([(1.0, batch("image")), (1.0, batch("text"))])
    assert 0 <= float(metrics["text_kl"]) < 1e-2
    image = batch("image")
    with torch.no_grad():
        assert image.pixels is not None
        logits = teacher(image.input_ids, pixel_values(image.pixels))[:, 9:13].flatten(0, 1)
    wanted = nn.functional.cross_entropy(logits, image.input_ids[:, 10:14].flatten())
    assert float(metrics["image_ce"]) == pytest.approx(float(wanted), rel=0.02)  # the step runs in bf16


def test_weights_of_batches_scale_gradients() -> None:
    def gradient(weight: float) -> dict[str, Tensor]:
        teacher = teacher_of("post")
        student = student_of(teacher, "post")
        stage = LogitsStage(teacher, student, compiled=False)
        stage.step([(weight, batch("image"))])
        return {name: p.grad for name, p in stage.parameters().items() if p.grad is not None}

    one, half = gradient(1.0), gradient(0.5)
    assert one.keys() == half.keys()
    for name in one:
        assert torch.allclose(half[name] * 2, one[name], rtol=0.05, atol=1e-3 * float(one[name].abs().max())), name


def test_paired_layers() -> None:
    teacher = golden_model("post", "hovle")
    student = student_of(teacher, "post", "hybrid")
    pairs = list(paired_layers(teacher, student))
    assert len(pairs) == 6 + 2
    assert all(isinstance(s.mixer, Mamba2Mixer) and not isinstance(t.mixer, Mamba2Mixer) for t, s in pairs)


def test_weight_decay_spares_what_is_no_matrix() -> None:
    student = student_of(golden_model("post", "hovle"), "post")
    decayed = {name for name, _ in student.named_parameters() if not no_weight_decay(name)}
    assert all(dict(student.named_parameters())[name].ndim > 1 for name in decayed)
    assert "language.layers.0.mixer.in_proj.vkq" in decayed
    assert "language.layers.0.mixer.conv.weight" in decayed
    for name in ("language.norm.weight", "language.layers.0.mixer.norm.weight", "language.layers.0.mixer_norm.weight"):
        assert no_weight_decay(name)
    assert no_weight_decay("embedding.stem.position_embedding")


# --- the loop ---


class Slope(Stage):
    """A stage whose gradients are constant: AdamW then moves a weight by exactly its learning rate a step."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        self.model = golden_model("post", "hovle")  # for its config and device
        self.weights = {name.replace("__", "."): nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
        self.seen: list[dict[str, Tensor]] = []
        self.given: list[list[tuple[float, Inputs]]] = []
        self.loss = 1.0

    def parameters(self) -> dict[str, nn.Parameter]:
        return self.weights

    def learning_rate(self, name: str) -> str:
        return "lr_language" if name.startswith("language.") else "lr"

    def compute(self, given: list[tuple[float, Inputs]]) -> dict[str, Tensor]:
        self.given.append(given)
        self.seen.append({name: w.detach().clone() for name, w in self.weights.items()})
        for weight in self.weights.values():
            weight.grad = torch.ones_like(weight)
        return {"loss": torch.tensor(self.loss)}


def positions(stage: Slope, name: str) -> list[float]:
    """The weight's value at each step and after the last."""
    return [float(seen[name].flatten()[0]) for seen in stage.seen] + [float(stage.weights[name].detach().flatten()[0])]


def test_the_schedule_warms_up_holds_and_decays(tmp_path: Path) -> None:
    stage = Slope(a__weight=(4, 4), language__x=(4, 4))
    config = StageConfig(
        steps=20, lr=1e-2, lr_language=1e-3, image_batch=1, text_batch=0, warmup=0.2, decay=0.5, weight_decay=0.0
    )
    train("test", stage, config, batches("image"), None, tmp_path / "log")
    wanted = [i / 20 / 0.2 if i < 4 else 1.0 if i <= 10 else (1 - i / 20) / 0.5 for i in range(20)]
    for name, rate in (("a.weight", 1e-2), ("language.x", 1e-3)):
        at = positions(stage, name)
        moves = [(x - y) / rate for x, y in itertools.pairwise(at)]
        assert moves == pytest.approx(wanted, abs=1e-3), name
    assert all(len(given) == 1 and given[0][0] == 1.0 for given in stage.given)


def test_without_a_rate_of_its_own_the_language_model_takes_the_others(tmp_path: Path) -> None:
    stage = Slope(language__x=(4,))
    config = StageConfig(steps=2, lr=1e-2, image_batch=1, text_batch=0, warmup=0, decay=0, weight_decay=0.0)
    train("test", stage, config, batches("image"), None, tmp_path / "log")
    assert positions(stage, "language.x") == pytest.approx([0, -1e-2, -2e-2], rel=1e-3)


def test_weight_decay_acts_on_matrices_alone(tmp_path: Path) -> None:
    stage = Slope(a__weight=(2, 2), a__bias=(2,))
    for weight in stage.weights.values():
        weight.data.fill_(10.0)
    config = StageConfig(steps=1, lr=1e-2, image_batch=1, text_batch=0, warmup=0, decay=0, weight_decay=0.5)
    train("test", stage, config, batches("image"), None, tmp_path / "log")
    assert positions(stage, "a.bias")[1] == pytest.approx(10 - 1e-2)
    assert positions(stage, "a.weight")[1] == pytest.approx(10 - 1e-2 - 1e-2 * 0.5 * 10)


def test_text_batches_carry_their_weight(tmp_path: Path) -> None:
    stage = Slope(a__weight=(2, 2))
    slots = {"image_answer_tokens": 5, "text_answer_tokens": 2}
    config = StageConfig(steps=2, lr=1e-2, image_batch=1, text_batch=1, text_weight=0.3, **slots)
    train("test", stage, config, batches("image"), batches("text"), tmp_path / "log")
    for given in stage.given:
        assert [(weight, b.is_image) for weight, b in given] == [(1.0, True), (0.3, False)]
        assert [len(b.targets) for _, b in given] == [15, 6]
    stage = Slope(a__weight=(2, 2))
    config = StageConfig(steps=1, lr=1e-2, image_batch=1, text_batch=0)
    train("test", stage, config, batches("image"), batches("text"), tmp_path / "log")
    assert len(stage.given[0]) == 1


def test_minutes_bound_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The larger share, of steps or of minutes, is the progress; what the first step compiles counts."""
    now = [0.0]
    monkeypatch.setattr("distill.trainer.time", SimpleNamespace(perf_counter=lambda: now[0]))

    class Slow(Slope):
        def compute(self, given: list[tuple[float, Inputs]]) -> dict[str, Tensor]:
            now[0] += 30.0 if not self.seen else 6.0
            return super().compute(given)

    stage = Slow(a__weight=(2, 2))
    config = StageConfig(
        steps=1000, max_minutes=1.0, lr=1e-2, image_batch=1, text_batch=0, warmup=0, decay=0.5, weight_decay=0.0
    )
    train("test", stage, config, batches("image"), None, tmp_path / "log")
    assert len(stage.seen) == 6  # one step that compiles, five of six seconds
    at = positions(stage, "a.weight")
    moves = [(x - y) / 1e-2 for x, y in itertools.pairwise(at)]
    assert moves == pytest.approx([1, 1, 0.8, 0.6, 0.4, 0.2], abs=1e-2)


def test_saves_while_a_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("distill.trainer.time", SimpleNamespace(perf_counter=lambda: now[0]))

    class Slow(Slope):
        def compute(self, given: list[tuple[float, Inputs]]) -> dict[str, Tensor]:
            now[0] += 25.0
            return super().compute(given)

    for minutes, wanted in ((1.0, [3, 6, 9]), (0.0, [])):
        stage = Slow(a__weight=(2, 2))
        config = StageConfig(steps=10, lr=1e-2, image_batch=1, text_batch=0, save_minutes=minutes)
        saved: list[int] = []
        train("t", stage, config, batches("image"), None, tmp_path / "log", save=lambda: saved.append(len(stage.seen)))  # noqa: B023
        assert saved == wanted


def test_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = Slope(a__weight=(2, 3))
    config = StageConfig(steps=60, lr=1e-2, image_batch=1, text_batch=0)
    train("stage9", stage, config, batches("image"), None, tmp_path / "log")
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 25, 50]
    assert all(line["stage"] == "stage9" and line["loss"] == 1.0 and line["ms_per_step"] >= 0 for line in lines)
    assert lines[0]["grad_norm"] == pytest.approx(6**0.5, abs=1e-4)
    assert "stage9: 6 parameters in 1 tensors" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    stage = Slope(a__weight=(2, 2))
    stage.loss = float("nan")
    config = StageConfig(steps=60, lr=1e-2, image_batch=1, text_batch=0)
    with pytest.raises(FloatingPointError, match=r"test: not finite at step 1: .*nan.* lower the learning rate"):
        train("test", stage, config, batches("image"), None, tmp_path / "log")


def test_a_stage_without_parameters_is_refused(tmp_path: Path) -> None:
    config = StageConfig(steps=1, lr=1e-2, image_batch=1, text_batch=0)
    with pytest.raises(ValueError, match="stage1 trains nothing; check the layer types"):
        train("stage1", Slope(), config, batches("image"), None, tmp_path / "log")


def test_rounding_in_the_loop(tmp_path: Path) -> None:
    """From `round_from` on a step sees weights as they will be stored and the optimizer keeps the full ones; at the end
    the parameters are as stored."""
    g = torch.Generator().manual_seed(0)
    stage = Slope(x__mlp__w1__weight=(4, 96), x__norm__weight=(96,))
    full = torch.randn(4, 96, generator=g)
    stage.weights["x.mlp.w1.weight"].data.copy_(full)
    stage.weights["x.norm.weight"].data.copy_(full[0])
    config = StageConfig(
        steps=4, lr=1e-3, image_batch=1, text_batch=0, warmup=0, decay=0, weight_decay=0.0, round_from=0.5
    )
    train("test", stage, config, batches("image"), None, tmp_path / "log")
    name = "x.mlp.w1.weight"
    spec = storage_spec(name, full)
    assert spec is not None
    for i in range(4):
        exact = full - 1e-3 * i
        seen = stage.seen[i][name]
        if i < 2:
            assert torch.allclose(seen, exact, atol=1e-5)
        else:
            assert torch.equal(seen, rounded(seen, spec)), f"step {i} saw weights that cannot be stored"
            assert not torch.allclose(seen, exact, atol=1e-3)
            assert torch.allclose(seen, rounded(exact, spec), atol=0.3)
        assert torch.allclose(stage.seen[i]["x.norm.weight"], full[0] - 1e-3 * i, atol=1e-5)
    final = stage.weights[name].detach()
    assert torch.equal(final, rounded(final, spec))
    assert (final - rounded(full - 4e-3, spec)).abs().max() < 0.3
    assert float((final - (full - 4e-3)).mean().abs()) < 0.02


def test_rounded_weights_come_back_whatever_happens() -> None:
    weight = nn.Parameter(torch.randn(4, 96, generator=torch.Generator().manual_seed(0)))
    plain = nn.Parameter(torch.randn(7))
    before = weight.detach().clone()

    def step() -> None:
        with rounded_weights({"a.mlp.w1.weight": weight, "b": plain}):
            assert not torch.equal(weight, before)
            weight.sum().backward()
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        step()
    assert torch.equal(weight, before)
    assert weight.grad is not None
    assert (weight.grad == 1).all()


# --- what a step needs of a batch ---


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("kind", ["image", "text"])
@torch.no_grad()
def test_prepared_inputs_give_the_models_own_hidden_states(folder: str, kind: str) -> None:
    model = golden_model(folder, "hybrid", torch.float64)
    rows = batch(kind)
    inputs = prepare(rows, model.config)
    assert inputs.is_image == (kind == "image")
    pixels = None if rows.pixels is None else pixel_values(rows.pixels)
    wanted = model.hidden_states(rows.input_ids, pixels)
    assert torch.equal(hidden_states(model, inputs), wanted)
    assert torch.equal(answer_hidden(model, inputs), wanted[:, 9:13].flatten(0, 1))
    assert inputs.targets.tolist() == rows.input_ids[:, 10:14].flatten().tolist()
    assert inputs.weights.tolist() == [1.0] * 12


def test_slots_for_answers_keep_shapes_fixed() -> None:
    config = golden_model("post", "hovle").config
    rows = batch("text")
    exact = prepare(rows, config)
    more, fewer = prepare(rows, config, 6), prepare(rows, config, 2)
    assert [len(t) for t in more[-3:]] == [18] * 3
    assert [len(t) for t in fewer[-3:]] == [6] * 3
    assert more.weights.tolist() == [1.0] * 12 + [0.0] * 6
    assert fewer.weights.tolist() == [1.0] * 6
    for wide, own, narrow in zip(more[-3:], exact[-3:], fewer[-3:], strict=True):
        assert torch.equal(wide[:12], own)
        assert torch.equal(narrow, own[:6])
    values = torch.cat([torch.arange(12.0), torch.full((6,), 1e9)])
    assert float(weighted_mean(values, more)) == 5.5, "an empty slot was counted"


def test_a_batch_takes_the_place_of_another() -> None:
    config = golden_model("post", "hovle").config
    first, second = prepare(batch("image", 1), config), prepare(batch("image", 2), config)
    kept = first.to(torch.device("cpu"))
    kept.copy_(second)
    assert all(torch.equal(a, b) for a, b in zip(kept.tensors(), second.tensors(), strict=True))
    with pytest.raises(ValueError, match=r"a batch has a tensor of shape \(2, .*, the first had \(3, "):
        kept.copy_(prepare(batch("image", 2, rows=2), config))


@pytest.mark.parametrize("number", [1, 3])
def test_empty_slots_change_no_gradient(number: int) -> None:
    """Slots beyond the learned tokens are there for the fixed shape alone."""

    def gradients(slots: int | None) -> dict[str, Tensor]:
        teacher = teacher_of("post")
        student = student_of(teacher, "post")
        stage: Stage = (
            LogitsStage(teacher, student, compiled=False)
            if number == 3
            else LayerStage(teacher, student, train_vkq=False, compiled=False)
        )
        stage.compute([(1.0, prepare(batch("image"), teacher.config, slots))])
        return {name: p.grad for name, p in stage.parameters().items() if p.grad is not None}

    plain, padded = gradients(None), gradients(9)
    assert plain.keys() == padded.keys()
    for name in plain:
        assert torch.allclose(plain[name], padded[name], rtol=1e-2, atol=1e-3 * float(plain[name].abs().max())), name


@pytest.mark.cuda
@pytest.mark.parametrize("number", [1, 3])
def test_a_captured_step_trains_as_a_plain_one(number: int, tmp_path: Path) -> None:
    """Batches, rates and gradients all change from step to step, so a graph that replayed old values would drift."""

    def trained(graph: bool) -> dict[str, Tensor]:
        teacher = load_model(GOLDEN / "post" / "hovle", device="cuda")
        student = student_of(teacher, "post")
        for module in student.modules():
            if isinstance(module, Mamba2Mixer):
                module.impl = "chunked"
        stage: Stage = (
            LogitsStage(teacher, student, compiled=False)
            if number == 3
            else LayerStage(teacher, student, train_vkq=False, compiled=False)
        )
        config = StageConfig(
            steps=8, lr=1e-3, image_batch=3, text_batch=3, warmup=0.25, image_answer_tokens=4, text_answer_tokens=4
        )
        train("test", stage, config, batches("image"), batches("text"), tmp_path / "log", graph=graph)
        return copies(student)

    plain, captured = trained(False), trained(True)
    start = copies(student_of(teacher_of("post"), "post"))
    for name, parameter in plain.items():
        change = parameter.cpu() - start[name]
        if change.any():
            assert_near(name, captured[name].cpu() - start[name], change, 0.05)
        else:
            assert torch.equal(captured[name], parameter), name


# --- recipes ---


def recipe(tmp_path: Path, **changes: Any) -> str:
    raw = yaml.safe_load((RECIPES_DIR / "nano-linear.yaml").read_text()) | changes
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(raw))
    return str(path)


def test_every_recipe_can_be_read() -> None:
    names = sorted(path.stem for path in RECIPES_DIR.glob("*.yaml"))
    assert "nano-linear" in names
    for name in names:
        loaded = Recipe.load(name)
        assert loaded.name == name
        assert set(loaded.stages) <= set(STAGES)


def test_layer_types_of_a_recipe(tmp_path: Path) -> None:
    teacher = ModelConfig.from_dict(golden_config("post", "hovle"))
    linear = Recipe.load("nano-linear").layer_types(teacher)
    assert linear == (("mamba2",) * 8, ("mamba2",) * 4)
    hybrid = Recipe.load(recipe(tmp_path, softmax_layers=[0, 4, 8, 10])).layer_types(teacher)
    stored = ModelConfig.from_dict(golden_config("post", "hybrid"))
    assert hybrid == (stored.embedding.layer_types, stored.language.layer_types)
    with pytest.raises(ValueError, match=r"softmax_layers \[12, -1\] do not exist; the teacher has layers 0 to 11"):
        Recipe.load(recipe(tmp_path, softmax_layers=[3, 12, -1])).layer_types(teacher)
    with pytest.raises(ValueError, match="names every layer, so nothing would train"):
        Recipe.load(recipe(tmp_path, softmax_layers=list(range(12)))).layer_types(teacher)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"speed": 3}, "mine.yaml: speed not known; fields are "),
        ({"name": "x"}, "mine.yaml: name not known; fields are "),
        ({"stages": {}}, "mine.yaml: stages are missing; use teacher, stage1, stage2, stage3"),
        ({"stages": {"stage4": {}}}, r"mine.yaml: stages are \['stage4'\]; use teacher, stage1"),
        (
            {"stages": {"stage1": {"steps": 3, "lr": 1, "image_batch": 1, "text_batch": 1, "step": 3}}},
            "mine.yaml: step not known; fields are clip, decay, ",
        ),
        ({"stages": {"stage1": {"steps": 3, "lr": 0.1}}}, "mine.yaml: stage1 misses image_batch, text_batch"),
        ({"stages": {"stage1": None}}, "mine.yaml: stage1 misses"),
    ],
)
def test_recipes_with_errors(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe.load(recipe(tmp_path, **changes))


@pytest.mark.parametrize("text", ["", "[1, 2]", "just text"])
def test_a_file_that_is_no_recipe(text: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"mine.yaml holds no fields"):
        Recipe.load(str(path))


def test_an_unknown_recipe() -> None:
    with pytest.raises(ValueError, match=r'no recipe "nothing"; there are .*nano-linear.*, or pass a YAML file'):
        Recipe.load("nothing")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"steps": 0}, "steps=0 trains nothing; use a value above 0"),
        ({"lr": -1.0}, "lr=-1.0 trains nothing"),
        ({"image_batch": 0}, "image_batch=0 trains nothing"),
        ({"text_batch": -1}, "text_batch=-1 is below 0"),
        ({"warmup": 0.8, "decay": 0.4}, "warmup=0.8 and decay=0.4 must be shares of the run that fit into 1"),
        ({"warmup": -0.1}, "must be shares"),
        ({"decay": 1.5}, "must be shares"),
    ],
)
def test_stages_with_errors(bad: dict[str, Any], message: str) -> None:
    good = {"steps": 1, "lr": 0.1, "image_batch": 1, "text_batch": 0}
    with pytest.raises(ValueError, match=message):
        StageConfig(**good | bad)


def test_the_factor_at_the_ends() -> None:
    config = StageConfig(steps=1, lr=1.0, image_batch=1, text_batch=0, warmup=0.0, decay=0.0)
    assert [config.lr_factor(p) for p in (0.0, 0.5, 1.0)] == [1.0, 1.0, 1.0]
    config = StageConfig(steps=1, lr=1.0, image_batch=1, text_batch=0, warmup=0.5, decay=0.5)
    assert [config.lr_factor(p) for p in (0.0, 0.25, 0.5, 0.75, 1.0)] == [0.0, 0.5, 1.0, 0.5, 0.0]


# --- evaluation ---


def test_exact_matches_are_what_greedy_decoding_would_say() -> None:
    """One pass over question and answer against a real decoding loop; rows that match, break early or break late."""
    model = golden_model("post", "linear")
    questions = batch("image", seed=2, rows=4)  # a seed with which no reply holds an image token
    ids = questions.input_ids.clone()
    assert questions.pixels is not None
    said = []
    for row in range(4):
        state = model.new_state()
        prompt = ModelInputs(ids[row : row + 1, :10], pixel_values(questions.pixels[row : row + 1]))
        logits = prefill(model, prompt, state)
        tokens = []
        for _ in range(4):
            tokens.append(int(logits.argmax()))
            logits = decode_one_token(model, torch.tensor(tokens[-1:]), state)
        said.append(tokens)
    ids[:, 10:14] = torch.tensor(said)
    ids[1, 10] = (ids[1, 10] + 1) % 100  # wrong at once
    ids[2, 13] = (ids[2, 13] + 1) % 100  # wrong at the last token
    ids[3, 14:] = 0  # padding does not count
    found = exact_matches(model, Batch(ids, questions.loss_mask, questions.pixels, 0))
    assert found.tolist() == [True, False, False, True]
