"""Frozen weights in bf16 beside mixers in float32: what a run of 2.6B holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from distill.__main__ import main
from distill.config import Recipe
from distill.evaluate import exact_matches
from distill.kept import mixers
from distill.stages import Stage
from distill.trainer import train
from mmmamba.checkpoint import load_model
from mmmamba.model import MMMamba
from tests.helpers import assert_near
from tests.test_distill_cli import common, tiny, tiny_recipe
from tests.test_recipes import recipe
from tests.training import batch, run_step, save_tiny_teacher, student_of, student_stage, teacher_of

__all__ = ["tiny"]  # a fixture


def rounded_teacher() -> MMMamba:
    """In float32, the values of the bf16 one."""
    teacher = teacher_of("post")
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.copy_(parameter.bfloat16())
    return teacher


def gradients(number: int, kind: str, teacher: MMMamba) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of one step, and what it logs."""
    student = student_of(teacher, "post", kind)
    assert {t.dtype for t in mixers(student).values()} == {torch.float32}
    stage = student_stage(number, teacher, student)
    logged = run_step(stage, [(1.0, batch("image"))])
    found = {name: p.grad.clone() for name, p in stage.parameters().items() if p.grad is not None}
    assert {p.dtype for p in stage.parameters().values()} == {torch.float32}
    shared = [p for p in teacher.parameters() if p.dtype == torch.bfloat16]
    ids = {id(p) for p in student.parameters()}
    # The attention's own projections apart, which the mixers replace.
    assert all(id(p) in ids for p in shared if p.ndim == 1), "teacher and student hold a frozen tensor twice"
    return found, logged


@pytest.mark.parametrize("kind", ["linear", "hybrid"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_gradients_are_those_beside_float32_but_for_rounding(number: int, kind: str) -> None:
    wanted, logged = gradients(number, kind, rounded_teacher())
    found, narrow = gradients(number, kind, teacher_of("post", torch.bfloat16))
    assert found.keys() == wanted.keys()
    for name, value in logged.items():
        assert float(narrow[name]) == pytest.approx(float(value), rel=0.05)
    # All together: of one small tensor the rounding of the residual stream may be much.
    got, want = (torch.cat([grads[name].flatten() for name in sorted(grads)]) for grads in (found, wanted))
    assert_near("gradients", got, want, 0.1)


def test_a_student_beside_narrow_weights_answers_questions() -> None:
    teacher = teacher_of("post", torch.bfloat16)
    given = batch("image")
    assert exact_matches(student_of(teacher, "post"), given).shape == (3,)
    assert exact_matches(student_of(teacher_of("post"), "post"), given).shape == (3,)


@pytest.mark.usefixtures("tiny")
def test_a_run_holds_what_its_recipe_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the recipe to the exported student, which is whole: float32 throughout."""
    held: list[torch.dtype] = []

    def watch(name: str, stage: Stage, *args: Any, **options: Any) -> Any:
        held.extend({p.dtype for network in stage.networks() for p in network.parameters() if p.ndim == 1})
        assert {p.dtype for p in stage.parameters().values()} == {torch.float32}
        return train(name, stage, *args, **options)

    monkeypatch.setattr("distill.pipeline.train", watch)
    teacher, out = save_tiny_teacher(tmp_path / "teacher"), tmp_path / "student"
    narrow = tiny_recipe(tmp_path, frozen_dtype="bfloat16", text_sources={}, stage={"text_batch": 0})
    raw = yaml.safe_load(narrow.read_text())
    del raw["stages"]["teacher"]
    narrow.write_text(yaml.safe_dump(raw))
    main(["run", "--teacher", str(teacher), "--out", str(out), *common(tmp_path, narrow)])
    assert torch.bfloat16 in held
    student, whole = load_model(out), load_model(teacher)
    assert torch.equal(student.language.output.weight, whole.language.output.weight), "what is frozen was rounded"


def test_what_a_recipe_may_not_say(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frozen_dtype='float16' is not known; use float32 or bfloat16"):
        Recipe.load(recipe(tmp_path, frozen_dtype="float16"))
    plain = Recipe.load(recipe(tmp_path))
    assert "frozen_dtype" not in plain.facts("stage1"), "checkpoints from before it would not go on"
    assert Recipe.load(recipe(tmp_path, frozen_dtype="bfloat16")).facts("stage1")["frozen_dtype"] == "bfloat16"
