"""The training loop: schedule, weights and rounding of its steps, and what a step needs of a batch."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from distill.checkpoints import Checkpoint, Checkpoints
from distill.config import StageConfig
from distill.data.batches import pixel_values
from distill.inputs import Inputs, answer_hidden, hidden_states, mean_weights, prepare
from distill.rounding import rounded, rounded_weights, storage_spec
from distill.stages import Stage
from distill.trainer import train
from mmmamba.mixer import Mamba2Mixer
from tests.helpers import FOLDERS, assert_near, golden_model
from tests.training import batch, batches, copies, student_of, student_stage, teacher_of


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
            assert weight.grad is not None
            weight.grad += 1  # as autograd does: the trainer's gradients keep their memory
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
    monkeypatch.setattr("distill.clock.time", SimpleNamespace(perf_counter=lambda: now[0]))

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
    monkeypatch.setattr("distill.clock.time", SimpleNamespace(perf_counter=lambda: now[0]))

    class Slow(Slope):
        def compute(self, given: list[tuple[float, Inputs]]) -> dict[str, Tensor]:
            now[0] += 25.0
            return super().compute(given)

    class Store(Checkpoints):
        """Notes what it is given."""

        def save(self, checkpoint: Checkpoint) -> Path:
            saved.append(checkpoint.step)
            return self.folder

    for settings, wanted in (
        ({"save_minutes": 1.0}, [3, 6, 9]),
        ({"save_steps": 4}, [4, 8]),
        ({"save_minutes": 1.0, "save_steps": 4}, [3, 4, 7, 8]),
        ({}, []),
    ):
        stage = Slow(a__weight=(2, 2))
        config = StageConfig(steps=10, lr=1e-2, image_batch=1, text_batch=0, **settings)
        saved: list[int] = []
        train("t", stage, config, batches("image"), None, tmp_path / "log", store=Store(tmp_path, {}))
        assert saved == wanted, settings


def test_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = Slope(a__weight=(2, 3))
    config = StageConfig(steps=60, lr=1e-2, image_batch=1, text_batch=0)
    train("stage9", stage, config, batches("image"), None, tmp_path / "log")
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 25, 50]
    assert all(line["stage"] == "stage9" and line["loss"] == 1.0 and line["ms_per_step"] >= 0 for line in lines)
    assert lines[0]["grad_norm"] == pytest.approx(6**0.5, abs=1e-4)
    assert [line["lr"] for line in lines[1:]] == [1e-2, pytest.approx(1e-2 * (1 - 49 / 60) / 0.25)]
    assert "stage9: 6 parameters in 1 tensors train, " in capsys.readouterr().out


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
    assert float((values * mean_weights(more.weights)).sum()) == 5.5, "an empty slot was counted"


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
        stage = student_stage(number, teacher, student)
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
        teacher = teacher_of("post", device="cuda")
        student = student_of(teacher, "post")
        for module in student.modules():
            if isinstance(module, Mamba2Mixer):
                module.impl = "chunked"
        stage = student_stage(number, teacher, student)
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
