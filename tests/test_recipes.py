"""Recipes and the settings of their stages: what is read, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.config import RECIPES_DIR, STAGES, Recipe, StageConfig
from mmmamba.config import ModelConfig
from tests.helpers import golden_config


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
