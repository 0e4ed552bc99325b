"""Recipes and the settings of their stages: what is read, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.checkpoints import differences
from distill.config import RECIPES_DIR, STAGES, Recipe, Shape, StageConfig
from distill.losses import Objective
from distill.nano import nano_config
from mmmamba.config import ModelConfig
from tests.helpers import golden_config

GOOD = {"steps": 1, "lr": 0.1, "image_batch": 1, "text_batch": 0}
PACKED = {"packed": True, "pictures": 1, "stages": {"stage1": GOOD}}


def recipe(tmp_path: Path, **changes: Any) -> str:
    """nano-linear with changes, for any teacher unless they say otherwise."""
    raw = yaml.safe_load((RECIPES_DIR / "nano-linear.yaml").read_text()) | {"shape": {}} | changes
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
    linear = Recipe.load(recipe(tmp_path)).layer_types(teacher)
    assert linear == (("mamba2",) * 8, ("mamba2",) * 4)
    hybrid = Recipe.load(recipe(tmp_path, softmax_layers=[0, 4, 8, 10])).layer_types(teacher)
    stored = ModelConfig.from_dict(golden_config("post", "hybrid"))
    assert hybrid == (stored.embedding.layer_types, stored.language.layer_types)
    with pytest.raises(ValueError, match=r"softmax_layers \[12, 40\] do not exist; the teacher has layers 0 to 11"):
        Recipe.load(recipe(tmp_path, softmax_layers=[3, 12, 40])).layer_types(teacher)
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
            "mine.yaml: step not known; fields are accumulate, activation_checkpointing, all_tokens, ",
        ),
        ({"stages": {"stage1": {"steps": 3, "lr": 0.1}}}, "mine.yaml: stage1 misses image_batch, text_batch"),
        ({"stages": {"stage1": None}}, "mine.yaml: stage1 misses"),
        ({"softmax_layers": [3, -1]}, r"mine.yaml: softmax_layers \[3, -1\]; list numbers from 0 on, each once"),
        ({"softmax_layers": [3, 3]}, r"mine.yaml: softmax_layers \[3, 3\]; list numbers from 0 on, each once"),
        ({"softmax_layers": ["all"]}, r"mine.yaml: softmax_layers \['all'\]; list numbers"),
        ({"shape": {"layers": 3}}, "mine.yaml: layers not known; fields are hidden_size, num_layers, tile_px"),
        (
            {"shape": {"num_layers": 38}, "softmax_layers": [0, 38]},
            r"mine.yaml: softmax_layers \[38\] do not exist; the teacher has layers 0 to 37",
        ),
        ({"shape": {"num_layers": 2}, "softmax_layers": [0, 1]}, "mine.yaml: .*every layer, so nothing would train"),
        ({"max_tiles": 12}, "max_tiles=12 needs rows that hold any number of tiles; set packed: true"),
        ({"packed_tiles": 12}, "packed_tiles=12 needs rows that hold any number of tiles; set packed: true"),
        ({"packed": "yes"}, "packed='yes' must be true or false"),
        (PACKED | {"pictures": 2}, "pictures=2 and packed exclude each other: a packed row holds what fits"),
        (PACKED | {"stages": {"teacher": GOOD}}, "packed is for students"),
        (PACKED | {"packed_tiles": 12, "max_tiles": 12}, "packed_tiles=12 holds no picture of 13 tiles, thumbnail"),
        (PACKED | {"stages": {"stage1": GOOD | {"text_batch": 1}}}, "stage1: text_batch=1, but packed rows hold text"),
        (PACKED | {"stages": {"stage1": GOOD | {"image_batch": 2}}}, "stage1: image_batch=2 rows need equally many"),
        ({"image_seqlen": 0}, "mine.yaml: image_seqlen=0 must be a whole number above 0"),
        ({"stages": {"stage1": GOOD | {"steps": 0}}}, "mine.yaml: stage1: steps=0 trains nothing"),
        ({"stages": {"stage1": GOOD | {"lr": "1e-3"}}}, 'stage1: lr="1e-3" is text; write a number, with a point'),
        (
            {"stages": {"stage1": GOOD | {"temperature": 2.0, "all_tokens": True}}},
            "stage1: temperature=2.0, all_tokens=True would change nothing; leave it out, or move it to stage3",
        ),
        (
            {"stages": {"teacher": GOOD | {"train_decay": False}}},
            "mine.yaml: teacher: train_decay=False would change nothing; .* to stage1, stage2, stage3",
        ),
        ({"stages": {"stage3": GOOD | {"reduction": "max"}}}, 'mine.yaml: stage3: reduction "max" is not known; use'),
        (
            {"stages": {"stage1": GOOD | {"warmup": 0.1, "warmup_steps": 0, "stable_steps": 1, "decay_steps": 0}}},
            "mine.yaml: stage1 gives warmup as a share and in steps; keep one",
        ),
    ],
)
def test_recipes_with_errors(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe.load(recipe(tmp_path, **changes))


@pytest.mark.parametrize("text", ["", "[1, 2]", "just text", "stages: {", "\0"])
def test_a_file_that_is_no_recipe(text: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"mine.yaml (holds no fields|is no YAML)"):
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
        ({"accumulate": 0}, "accumulate=0 trains nothing"),
        ({"clip": 0}, "clip=0 trains nothing"),
        ({"save_steps": -1}, "save_steps=-1 is below 0"),
        ({"temperature": 0.0}, "temperature=0.0 must be above 0; 1 leaves the logits alone"),
        ({"ce_weight": -0.5}, "ce_weight=-0.5 is below 0; use 0 to leave cross-entropy out"),
        ({"hidden_weight": -1.0}, "hidden_weight=-1.0 is below 0; use 0 to leave hidden states alone"),
        ({"all_tokens": "yes"}, 'all_tokens="yes" is text'),
        (
            {"all_tokens": True, "image_answer_tokens": 20},
            "all_tokens gives every token a slot, and image_answer_tokens=20 only some; leave one out",
        ),
        ({"lr": None}, "lr is empty; give it a value or leave it out"),
        (
            {"steps": 20, "warmup_steps": 2, "stable_steps": 10, "decay_steps": 4},
            "warmup_steps=2, stable_steps=10, decay_steps=4 add up to 16, not to steps=20; make them equal",
        ),
        ({"steps": 20, "warmup_steps": 20}, "warmup_steps=20, stable_steps=None, decay_steps=None; give all three"),
        ({"steps": 2, "warmup_steps": 3, "stable_steps": -1, "decay_steps": 0}, "stable_steps=-1, .*none below 0"),
    ],
)
def test_stages_with_errors(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StageConfig(**GOOD | bad)


def test_the_factor_at_the_ends() -> None:
    config = StageConfig(steps=1, lr=1.0, image_batch=1, text_batch=0, warmup=0.0, decay=0.0)
    assert [config.lr_factor(p) for p in (0.0, 0.5, 1.0)] == [1.0, 1.0, 1.0]
    config = StageConfig(steps=1, lr=1.0, image_batch=1, text_batch=0, warmup=0.5, decay=0.5)
    assert [config.lr_factor(p) for p in (0.0, 0.25, 0.5, 0.75, 1.0)] == [0.0, 0.5, 1.0, 0.5, 0.0]


def test_a_schedule_in_steps() -> None:
    config = StageConfig(steps=20, lr=1.0, image_batch=1, text_batch=0, warmup_steps=4, stable_steps=6, decay_steps=10)
    assert [config.lr_factor(i / 20) for i in (0, 2, 4, 10, 15, 20)] == [0.0, 0.5, 1.0, 1.0, 0.5, 0.0]


def test_the_papers_recipes() -> None:
    """arXiv:2502.13145: what the paper and its training code say of the students of HoVLE-2.6B."""
    linear, hybrid = Recipe.load("hovle-2.6b-linear"), Recipe.load("hovle-2.6b-hybrid")
    assert (linear.softmax_layers, hybrid.softmax_layers) == ((), tuple(range(0, 32, 4)))
    for loaded in (linear, hybrid):
        assert loaded.shape == Shape(num_layers=32, hidden_size=2048, tile_px=448)
        assert (loaded.image_seqlen, loaded.max_tiles, loaded.packed) == (8192, 12, True)
        assert {name: stage.lr for name, stage in loaded.stages.items()} == {
            "stage1": 1e-3,
            "stage2": 5e-4,
            "stage3": 5e-5,
        }
        for stage in loaded.stages.values():
            assert (stage.steps, stage.weight_decay, stage.muon) == (20_000, 0.05, False)
            assert stage.warmup > 0
            assert stage.decay > 0


def test_nanos_recipes() -> None:
    linear, hybrid = Recipe.load("nano-linear"), Recipe.load("nano-hybrid")
    teacher = nano_config()
    assert set().union(*linear.layer_types(teacher)) == {"mamba2"}
    embedding, language = hybrid.layer_types(teacher)
    assert [i for i, kind in enumerate(embedding + language) if kind == "mha"] == list(range(0, 38, 4))
    assert {name: linear.stages[name] for name in hybrid.stages} == hybrid.stages
    assert list(linear.stages) == list(STAGES)


def test_a_teacher_that_does_not_fit(tmp_path: Path) -> None:
    golden = ModelConfig.from_dict(golden_config("post", "hovle"))
    wanted = r"it has num_layers=12, not 38, hidden_size=32, not 576, tile_px=56, not 224; take the recipe for this"
    with pytest.raises(ValueError, match=wanted):
        Recipe.load("nano-linear").layer_types(golden)
    student = ModelConfig.from_dict(golden_config("post", "hybrid"))
    with pytest.raises(ValueError, match="the model is a hybrid student; pass its teacher"):
        Recipe.load(recipe(tmp_path)).layer_types(student)


def test_what_a_checkpoint_is_compared_by() -> None:
    linear, hybrid = Recipe.load("nano-linear"), Recipe.load("nano-hybrid")
    facts = linear.facts("stage1")
    json.dumps(facts)
    faster = replace(linear, stages=linear.stages | {"stage1": replace(linear.stages["stage1"], save_minutes=1.0)})
    assert faster.facts("stage1") == facts, "how often a run saves changes nothing that it computes"
    assert differences(facts, hybrid.facts("stage1")) == [
        "name is 'nano-hybrid', was 'nano-linear'",
        f"softmax_layers is {list(hybrid.softmax_layers)}, was []",
    ]
    longer = replace(linear, stages=linear.stages | {"stage1": replace(linear.stages["stage1"], lr=1.0)})
    assert differences(facts, longer.facts("stage1")) == ["lr is 1.0, was 0.006"]


def test_later_fields_change_facts_only_where_they_change_something() -> None:
    """A checkpoint from before they came must go on."""
    linear = Recipe.load("nano-linear")
    facts = linear.facts("stage3")
    assert not {"temperature", "ce_weight", "all_tokens", "reduction", "train_decay", "hidden_weight"} & facts.keys()
    warm = replace(linear, stages={"stage3": replace(linear.stages["stage3"], temperature=2.0)})
    assert differences(facts, warm.facts("stage3")) == ["temperature is 2.0, was None"]


def test_the_references_objective_in_a_recipe() -> None:
    linear = Recipe.load("nano-linear")
    changed = linear.with_reference_objective()
    assert changed.stages["stage3"].objective == Objective.reference() == Objective(all_tokens=True, reduction="sum")
    assert changed.stages["stage3"].image_answer_tokens is None
    assert {n: s for n, s in changed.stages.items() if n != "stage3"} == {
        n: s for n, s in linear.stages.items() if n != "stage3"
    }
    with pytest.raises(ValueError, match="recipe nano-linear has no stage3; --all-tokens changes nothing else"):
        replace(linear, stages={"stage1": linear.stages["stage1"]}).with_reference_objective()
    warm = replace(linear, stages={"stage3": replace(linear.stages["stage3"], temperature=2.0)})
    with pytest.raises(ValueError, match=r"has temperature=2\.0 in stage3, and --all-tokens asks for the reference's"):
        warm.with_reference_objective()
