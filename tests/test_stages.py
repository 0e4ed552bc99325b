"""The stages: losses of the reference training code, what moves and what does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill import stages
from distill.config import Recipe, StageConfig
from distill.convert import SplitProjection, fuse_
from distill.data.batches import Batch, pixel_values
from distill.data.packing import PackedBatch, PackerState, Piece, RowShape, pack
from distill.evaluate import exact_matches
from distill.inputs import prepare
from distill.losses import MSE_SCALE, Objective, layer_mse, relative_error, token_kl
from distill.recompute import recompute_blocks_
from distill.stages import LayerStage, LogitsStage, Stage, TeacherStage, no_weight_decay, paired_layers
from distill.trainer import train
from distill.upstream import load_upstream_student
from mmmamba.checkpoint import load_model, save_model
from mmmamba.generate import ModelInputs, decode_one_token, prefill
from mmmamba.mixer import Mamba2Mixer
from mmmamba.model import MMMamba
from tests.helpers import FOLDERS, GOLDEN, assert_near, golden_cases, golden_expected, golden_model
from tests.training import batch, batches, copies, piece, run_step, student_of, student_stage, teacher_of

LAYER_CASES = ("image", "text", "two_images")


# --- losses against the reference training code ---


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("case", LAYER_CASES)
@pytest.mark.parametrize("number", [1, 2])
def test_layer_losses_equal_the_reference(folder: str, case: str, number: int) -> None:
    teacher = teacher_of(folder, torch.float64)
    student = load_upstream_student(teacher, GOLDEN / folder / f"stage{number}_student.safetensors")
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


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("kind", ["linear", "hybrid"])
def test_the_stage_gives_the_references_sum_over_all_tokens(folder: str, kind: str) -> None:
    """Through `prepare` and the chunked loss, as a run with every token does it."""
    teacher, student = teacher_of(folder), load_model(GOLDEN / folder / kind)
    stage = LogitsStage(teacher, student, compiled=False, objective=Objective.reference())
    stage.autocast = lambda: torch.autocast("cpu", enabled=False)  # type: ignore[method-assign]
    for case, tensors in golden_cases(folder).items():
        ids = tensors["input_ids"]
        inputs = prepare(Batch(ids, torch.ones_like(ids, dtype=torch.bool), None, 0), teacher.config, all_tokens=True)
        assert stage.all_tokens
        with torch.no_grad():
            tiles = tensors.get("pixel_values")
            hidden = [model.hidden_states(ids, tiles).flatten(0, 1)[inputs.positions] for model in (student, teacher)]
            loss = stage._loss(*hidden, inputs)
        wanted = golden_expected(folder)[case][f"stage3_kl_sum_{kind}"]
        assert float(loss.total) == float(loss.kl) == pytest.approx(wanted, rel=1e-5), case


@pytest.mark.parametrize("kind", ["linear", "hybrid"])
def test_all_tokens_of_a_recipe_are_the_references_sum(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the recipe, as `--all-tokens` changes it, to what a step logs and minimises."""
    recipe = Recipe.load("nano-linear").with_reference_objective()
    teacher, student = teacher_of("post"), load_model(GOLDEN / "post" / kind)
    stage = stages.student_stage("stage3", teacher, student, recipe.stages["stage3"], compiled=False)
    stage.autocast = lambda: torch.autocast("cpu", enabled=False)  # type: ignore[method-assign]
    for case, tensors in golden_cases("post").items():
        ids, tiles = tensors["input_ids"], tensors.get("pixel_values")
        monkeypatch.setattr("distill.inputs.pixel_values", lambda pixels, tiles=tiles: tiles)  # not made from bytes
        pixels = None if tiles is None else torch.zeros(len(tiles), 56, 56, 3, dtype=torch.uint8)
        given = Batch(ids, torch.ones_like(ids, dtype=torch.bool), pixels, 0)
        found = run_step(stage, [(1.0, given)])
        wanted = golden_expected("post")[case][f"stage3_kl_sum_{kind}"]
        assert float(found["text_kl" if pixels is None else "image_kl"]) == pytest.approx(wanted, rel=1e-5), case


@pytest.mark.parametrize("name", ["stage1", "stage2", "stage3"])
def test_a_stage_is_as_its_config_wants_it(name: str) -> None:
    teacher = teacher_of("post")
    student = student_of(teacher, "post")
    plain = StageConfig(steps=1, lr=1.0, image_batch=1, text_batch=0)
    wanted = replace(plain, train_decay=False, **({"temperature": 2.0, "ce_weight": 0.5} if name == "stage3" else {}))
    for config in (plain, wanted):
        stage = stages.student_stage(name, teacher, student, config, compiled=False)
        assert any("A_log" in parameter for parameter in stage.parameters()) == config.train_decay
        assert any("vkq" in parameter for parameter in stage.parameters()) == (name != "stage1")
        if isinstance(stage, LogitsStage):
            assert stage.objective == config.objective
            assert (stage.objective.temperature, stage.objective.ce_weight) == (config.temperature, config.ce_weight)


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
    b[:, 2] = 9.0
    assert float(layer_mse(a, b, torch.tensor([[1.0, 1.0, 0.0]]).expand(2, -1))) == 0.25

    wanted = torch.tensor([[[3.0, 4.0], [300.0, 400.0], [1.0, 0.0]]])
    found = wanted * torch.tensor([1.5, 0.9, 4.0])[:, None]
    assert float(relative_error(found, wanted)) == pytest.approx((0.25 + 0.01 + 9) / 3)
    assert float(relative_error(found, wanted, torch.tensor([[1.0, 1.0, 0.0]]))) == pytest.approx(0.13)
    assert relative_error(found.bfloat16(), wanted.bfloat16()).dtype == torch.float32


def _gradients_with(weight: float, factor: float = 1.0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients and what is logged of a step of stage 3 with a hidden weight, heard the learning rate's factor."""
    teacher = teacher_of("post")
    stage = LogitsStage(teacher, student_of(teacher, "post"), compiled=False, objective=Objective(hidden_weight=weight))
    stage.autocast = lambda: torch.autocast("cpu", enabled=False)  # type: ignore[method-assign]
    stage.follow(factor)
    logged = run_step(stage, [(1.0, batch("image", 3)), (0.5, batch("text", 3))])
    return {name: p.grad.clone() for name, p in stage.parameters().items() if p.grad is not None}, logged


def test_hidden_states_add_to_the_gradient_and_fade_with_the_learning_rate() -> None:
    plain, without = _gradients_with(0.0)
    full, logged = _gradients_with(1.0)
    half, _ = _gradients_with(1.0, factor=0.5)
    faded, _ = _gradients_with(1.0, factor=0.0)
    assert "image_hidden" not in without
    assert {"image_hidden", "text_hidden"} <= logged.keys()
    assert logged["image_kl"] == without["image_kl"], "the divergence itself stays what it is"
    added = {name: full[name] - plain[name] for name in plain}
    assert max(float(g.abs().max()) for g in added.values()) > 0
    for name, gradient in plain.items():
        assert_near(name, half[name], gradient + added[name] / 2, 1e-4)
        assert_near(name, faded[name], gradient, 1e-6)


def test_hidden_states_are_compared_where_tokens_are_real() -> None:
    teacher = teacher_of("post")
    stage = LogitsStage(teacher, student_of(teacher, "post"), compiled=False, objective=Objective(hidden_weight=1.0))
    given = batch("image", 3)
    mask = given.loss_mask.clone()
    mask[:, -3:] = False  # what is behind the last answer is padding
    padded = given._replace(loss_mask=mask)
    other = padded._replace(input_ids=padded.input_ids.clone())
    other.input_ids[:, -3:] = (other.input_ids[:, -3:] + 1) % 100
    first, second = (run_step(stage, [(1.0, rows)])["image_hidden"] for rows in (padded, other))
    assert float(first) > 0
    assert float(first) == pytest.approx(float(second), rel=1e-6)


def test_a_student_comes_nearer_to_its_teachers_hidden_states() -> None:
    teacher = teacher_of("post")
    stage = LogitsStage(teacher, student_of(teacher, "post"), compiled=False, objective=Objective(hidden_weight=10.0))
    optimizer = torch.optim.Adam(stage.parameters().values(), lr=3e-3)
    errors = []
    for _ in range(12):
        errors.append(float(run_step(stage, [(1.0, batch("image", 3))])["image_hidden"]))
        optimizer.step()
    assert errors[-1] < 0.9 * errors[0]


def test_layer_gradients_are_those_of_the_stage_loss() -> None:
    """Each layer's backward runs at once; together they are the gradient of 1000 x the mean over layers."""
    teacher = teacher_of("post", torch.float64)
    student = load_upstream_student(teacher, GOLDEN / "post" / "stage2_student.safetensors")
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


def run_stage(stage: Stage, tmp_path: Path, **changes: Any) -> None:
    config = StageConfig(**{"steps": 4, "lr": 1e-2, "image_batch": 3, "text_batch": 3, "warmup": 0.25} | changes)
    train("test", stage, config, batches("image"), batches("text"), tmp_path / "log.jsonl")


MIXER_NEW = {"in_proj.gate_dt", "conv.weight", "conv.bias", "A_log", "dt_bias", "norm.weight"}


def moved(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    now = dict(model.named_parameters())
    assert now.keys() == before.keys()
    assert all(torch.isfinite(p).all() for p in now.values())
    return {name for name in now if not torch.equal(now[name], before[name])}


def mixer_tensors(student: MMMamba, names: set[str]) -> set[str]:
    layers = [n for n, m in student.named_modules() if isinstance(m, Mamba2Mixer)]
    return {f"{layer}.{name}" for layer in layers for name in names}


@pytest.mark.parametrize("kind", ["linear", "hybrid"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_what_is_frozen_stays_and_what_trains_moves(kind: str, number: int, tmp_path: Path) -> None:
    teacher = teacher_of("post")
    student = student_of(teacher, "post", kind)
    teacher_before, student_before = copies(teacher), copies(student)
    stage = student_stage(number, teacher, student)
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
        stage = student_stage(number, teacher, student)
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
    stage = student_stage(number, teacher, student)
    optimizer = torch.optim.AdamW(stage.parameters().values(), lr=1e-2, weight_decay=0.0)
    fixed = [(1.0, batch("image")), (0.5, batch("text"))]
    losses = []
    for _ in range(12):
        metrics = run_step(stage, fixed)
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
    metrics = run_step(stage, [(1.0, batch("image")), (1.0, batch("text"))])
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
        run_step(stage, [(weight, batch("image"))])
        return {name: p.grad for name, p in stage.parameters().items() if p.grad is not None}

    one, half = gradient(1.0), gradient(0.5)
    assert one.keys() == half.keys()
    for name in one:
        assert torch.allclose(half[name] * 2, one[name], rtol=0.05, atol=1e-3 * float(one[name].abs().max())), name


@pytest.mark.parametrize("number", [1, 2, 3])
def test_decays_and_step_sizes_can_be_held(number: int, tmp_path: Path) -> None:
    teacher = teacher_of("post")
    student = student_of(teacher, "post", "hybrid")
    before = copies(student)
    if number == 3:
        stage: Stage = LogitsStage(teacher, student, compiled=False, train_decay=False)
    else:
        stage = LayerStage(teacher, student, train_vkq=number == 2, compiled=False, train_decay=False)
    run_stage(stage, tmp_path)
    names = MIXER_NEW - {"A_log", "dt_bias"} | (set() if number == 1 else {"in_proj.vkq"})
    assert moved(student, before) == mixer_tensors(student, names)


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("kind", ["linear", "hybrid"])
def test_frozen_tensors_are_in_memory_once(number: int, kind: str) -> None:
    """What no stage trains is one tensor in teacher, student and the network that the stage runs."""
    teacher = teacher_of("post")
    student = student_of(teacher, "post", kind)
    stage = student_stage(number, teacher, student)
    trained = {p.data_ptr() for p in stage.parameters().values()}
    own = {p.data_ptr() for p in teacher.parameters()}
    assert not own & trained
    held = {p.data_ptr(): p for m in (teacher, student, stage.model) for p in m.parameters() if p.numel()}
    of_mixers = {p.data_ptr() for _, layer in paired_layers(teacher, student) for p in layer.mixer.parameters()}
    assert held.keys() == own | of_mixers
    frozen_mixer = {"in_proj.vkq"} if number == 1 else set()
    new = held.keys() - own - trained
    assert new == {dict(student.named_parameters())[n].data_ptr() for n in mixer_tensors(student, frozen_mixer)}


def objective_loss(objective: Objective, rows: int = 3) -> tuple[dict[str, float], Tensor]:
    """Metrics and the gradient of one parameter, in float32."""
    teacher = teacher_of("post")
    student = student_of(teacher, "post")
    stage = LogitsStage(teacher, student, compiled=False, objective=objective)
    stage.autocast = lambda: torch.autocast("cpu", enabled=False)  # type: ignore[method-assign]
    metrics = run_step(stage, [(1.0, batch("image", rows=rows))])
    gradient = student.get_parameter("language.layers.0.mixer.in_proj.vkq").grad
    assert gradient is not None
    return {name: float(value) for name, value in metrics.items()}, gradient.clone()


def test_objectives_of_stage_3() -> None:
    """Against the plain formula over whole logits."""
    teacher = teacher_of("post")
    student = student_of(teacher, "post")
    sample = batch("image")
    assert sample.pixels is not None
    with torch.no_grad():
        inputs = sample.input_ids, pixel_values(sample.pixels)
        q, p = student(*inputs), teacher(*inputs)
    answers, real = slice(9, 13), slice(0, 14)  # predicted from one to the left; the row ends with the answer
    entropy = nn.functional.cross_entropy(q[:, answers].flatten(0, 1), sample.input_ids[:, 10:14].flatten())
    plain, gradient = objective_loss(Objective())
    assert plain == {"image_kl": pytest.approx(float(token_kl(q, p)[:, answers].mean()), rel=1e-5)}
    summed, of_sum = objective_loss(Objective(reduction="sum"))
    assert summed["image_kl"] == pytest.approx(12 * plain["image_kl"], rel=1e-5)
    assert torch.allclose(of_sum, 12 * gradient, rtol=1e-3, atol=1e-5 * float(of_sum.abs().max()))
    every, _ = objective_loss(Objective(all_tokens=True))
    assert every["image_kl"] == pytest.approx(float(token_kl(q, p)[:, real].mean()), rel=1e-5)
    both, of_both = objective_loss(Objective(temperature=2.0, ce_weight=0.5, all_tokens=True))
    wanted = float(token_kl(q, p, 2.0)[:, real].mean()) / 4  # the log shows the divergence itself
    assert both == {"image_kl": pytest.approx(wanted, rel=1e-5), "image_ce": pytest.approx(float(entropy), rel=1e-5)}
    assert not torch.allclose(of_both, gradient, rtol=0.1)


@pytest.mark.parametrize("number", [1, 3])
def test_packed_rows_train(number: int) -> None:
    """A step over packed rows gives the gradients of the samples alone, weighted by what each has to learn."""
    teacher = teacher_of("post", torch.float64)
    student = student_of(teacher, "post", "hybrid").double()
    stage = student_stage(number, teacher, student)
    stage.autocast = lambda: torch.autocast("cpu", enabled=False)  # type: ignore[method-assign]
    samples = [piece(1, [3, -4, 5]), piece(2, [2, 6], learned=2), piece(3, [2, -8, 3])]
    parameters = stage.parameters()

    def step(batches: list[tuple[float, PackedBatch]]) -> dict[str, Tensor]:
        run_step(stage, batches)
        return {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}

    def alone(sample: Piece) -> PackedBatch:
        shape = RowShape.of(teacher.config, seqlen=len(sample.input_ids), pad_id=7)
        return pack([[sample]], shape, PackerState())

    tokens = [len(s.input_ids) + 3 * 4 * s.num_tiles for s in samples]  # of the embedding stack
    length = sum(len(s.input_ids) for s in samples)
    # Padding and blank tiles count nowhere.
    shape = RowShape.of(teacher.config, seqlen=length + 12, tiles=4, pad_id=7)
    together = step([(1.0, pack([samples], shape, PackerState()))])
    weights = [3 / 8, 2 / 8, 3 / 8]
    if number == 1:  # every position of a layer is a target: other shares in the two stacks
        one_by_one = [step([(1.0, alone(sample))]) for sample in samples]
        lengths = [len(s.input_ids) for s in samples]
        for name in together:
            in_embedding = int(name.partition(".")[0]) < student.config.embedding.layer_types.count("mamba2")
            shares = tokens if in_embedding else lengths
            want = sum(g[name] * share / sum(shares) for g, share in zip(one_by_one, shares, strict=True))
            assert isinstance(want, Tensor)
            assert_near(f"gradient of {name}", together[name], want, 1e-5)  # the error is taken in float32
    else:
        for name, want in step([(w, alone(s)) for w, s in zip(weights, samples, strict=True)]).items():
            assert_near(f"gradient of {name}", together[name], want, 1e-6)  # weights are float32


def test_checkpointing_changes_no_gradient() -> None:
    found = []
    for checkpointing in (False, True):
        teacher = teacher_of("post")
        student = student_of(teacher, "post", "hybrid")
        stage = LogitsStage(teacher, student, compiled=False)
        if checkpointing:
            recompute_blocks_(stage.networks())
        run_step(stage, [(1.0, batch("image"))])
        found.append({name: p.grad.clone() for name, p in stage.parameters().items() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("number", [1, 2, 3])
def test_compiling_changes_no_gradient(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled apart is put together again; packed rows, a hybrid student, traced and run as it stands."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_(f, backend="eager", **options))
    found = []
    for compiled in (False, True):
        teacher = teacher_of("post")
        student = student_of(teacher, "post", "hybrid")
        config = StageConfig(steps=1, lr=1.0, image_batch=1, text_batch=0)
        stage = stages.student_stage(f"stage{number}", teacher, student, config, compiled=compiled)
        shape = RowShape.of(teacher.config, seqlen=30, tiles=2, pad_id=7)
        run_step(stage, [(1.0, pack([[piece(1, [3, -4, 5]), piece(2, [2, -4, 6])]], shape, PackerState()))])
        found.append({name: p.grad.clone() for name, p in stage.parameters().items() if p.grad is not None})
        norms = [layer.mixer_norm for model in (teacher, student) for layer in model.language.layers]
        assert not any(norm._compiled_call_impl for norm in norms), "compiled in place"
    torch.compiler.reset()
    assert found[0].keys() == found[1].keys()
    for name, want in found[0].items():
        assert_near(f"gradient of {name}", found[1][name], want, 1e-3)


@pytest.mark.parametrize("train_vkq", [False, True])
def test_a_split_projection_is_one_matrix(train_vkq: bool) -> None:
    """Whether its parts are multiplied apart or not; what is frozen gets no gradient."""
    g = torch.Generator().manual_seed(0)
    vkq, gate_dt, x = (torch.randn(n, 5, generator=g, dtype=torch.float64) for n in (6, 4, 7))
    projection = SplitProjection(vkq, gate_dt)
    projection.vkq.requires_grad_(train_vkq)
    whole = torch.cat([vkq, gate_dt]).requires_grad_()
    weights = torch.randn(7, 10, generator=g, dtype=torch.float64)
    (projection(x) * weights).sum().backward()
    (torch.nn.functional.linear(x, whole) * weights).sum().backward()
    assert whole.grad is not None
    assert_near("gate_dt", projection.gate_dt.grad, whole.grad[6:], 1e-12)  # type: ignore[arg-type]
    assert (projection.vkq.grad is not None) == train_vkq
    if projection.vkq.grad is not None:
        assert_near("vkq", projection.vkq.grad, whole.grad[:6], 1e-12)


@pytest.mark.cuda
def test_rows_filled_up_change_nothing() -> None:
    """As nano's 1,545 rows are while they train. Otherwise they come out contiguous, as the fused kernels need them."""
    torch.manual_seed(0)
    vkq, gate_dt = torch.randn(20, 16, device="cuda"), torch.randn(13, 16, device="cuda")
    projection = SplitProjection(vkq, gate_dt)
    x = torch.randn(2, 5, 16, device="cuda", requires_grad=True)
    found, wanted = projection(x), torch.nn.functional.linear(x, projection.weight)
    assert_near("rows", found, wanted, 1e-5)
    given = torch.randn_like(wanted)
    leaves = x, projection.vkq, projection.gate_dt
    for gradient, plain in zip(*(torch.autograd.grad(out, leaves, given) for out in (found, wanted)), strict=True):
        assert_near("gradient", gradient, plain, 1e-5)
    with torch.no_grad():
        assert projection(x).is_contiguous()


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
