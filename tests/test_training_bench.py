"""The benchmark of training: its networks and batches, the operations it counts, its records."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import distill, networks
from benchmarks.flops import Flops, step_flops
from distill.chunked_loss import HEAD_ROWS
from distill.config import Recipe, StageConfig
from distill.memory import StudentStage
from distill.stages import Stage
from mmmamba.config import LayerType, ModelConfig
from mmmamba.cost import count_parameters
from tests.launching import in_two_processes
from tests.training import tiny_config

CPU = torch.device("cpu")
PLAN = StageConfig(steps=10, lr=1e-3, image_batch=1, text_batch=0)
STAGES: tuple[StudentStage, ...] = ("stage1", "stage2", "stage3")


def tiny_recipe(**changes: Any) -> Recipe:
    """Packed rows of tiny tiles (56 px: 4 tokens)."""
    given: dict[str, Any] = {
        "name": "tiny",
        "stages": dict.fromkeys(STAGES, PLAN),
        "image_seqlen": 160,
        "max_tiles": 3,
        "packed": True,
        "packed_tiles": 8,
        "frozen_dtype": "bfloat16",
    }
    return Recipe(**given | changes)


def tiny_teacher(pixel_shuffle_loc: Literal["pre", "post"] = "post") -> ModelConfig:
    config = tiny_config()
    return replace(config, embedding=replace(config.embedding, pixel_shuffle_loc=pixel_shuffle_loc))


def test_the_published_size() -> None:
    config = networks.hovle_config()
    assert networks.teacher_config(Recipe.load("hovle-2.6b-linear")) == config
    # 2.6 billion, with the language model's own table, which is stored and not used.
    assert 2.5e9 < count_parameters(config).total < 2.7e9
    assert (config.tokens_per_tile, config.embedding.stack_tokens_per_image_token) == (256, 4)
    assert networks.hovle_config("pre").embedding.stack_tokens_per_image_token == 1
    strange = Recipe(name="mine", stages={}, shape=replace(Recipe.load("nano-linear").shape, hidden_size=100))
    with pytest.raises(ValueError, match=r"recipe mine is for a teacher of .*known are nano and HoVLE-2.6B"):
        networks.teacher_config(strange)


def test_networks_are_held_as_a_run_holds_them() -> None:
    stage = networks.random_stage("stage2", tiny_recipe(), PLAN, tiny_teacher(), CPU, compiled=False)
    assert {p.dtype for p in stage.parameters().values()} == {torch.float32}
    assert stage.model.dtype == torch.bfloat16
    tied = networks.random_teacher(tiny_teacher(), CPU, torch.float32)
    assert tied.language.output.weight is tied.embedding.text.weight
    assert all(bool(p.isfinite().all()) for p in tied.parameters())
    assert float(tied.language.output.weight.std()) == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("rows", [1, 2])
def test_packed_rows_are_full(rows: int) -> None:
    recipe, model = tiny_recipe(), tiny_teacher()
    batch = networks.packed_rows(recipe, rows, model)
    assert batch.input_ids.shape == (rows, 160)
    assert batch.is_real.all()
    assert batch.pixels is not None
    assert batch.pixels.shape == (8 * rows, 56, 56, 3)
    images = batch.input_ids == model.embedding.img_context_token_id
    assert images.sum(dim=1).tolist() == [8 * model.tokens_per_tile] * rows
    assert not (batch.loss_mask & images).any()
    assert 0.3 < float(batch.loss_mask.sum() / (~images).sum()) < 0.6
    assert batch.fill.num_samples >= 5 * rows
    again = networks.packed_rows(recipe, rows, model)
    assert torch.equal(batch.input_ids, again.input_ids)


def test_rows_of_any_number_of_tiles() -> None:
    model = tiny_teacher()
    batch = networks.packed_rows(tiny_recipe(packed_tiles=None, image_seqlen=800, max_tiles=20), 1, model)
    assert batch.pixels is not None
    assert len(batch.pixels) == 800 * 3 // 4 // model.tokens_per_tile
    with pytest.raises(ValueError, match="rows of 40 tokens with 8 tiles leave 8 tokens for the text of"):
        networks.packed_rows(tiny_recipe(image_seqlen=40), 1, model)


def linear_products(stage: Stage, batches: Any) -> float:
    """Operations of two-dimensional products that a step really runs: of weights, not of attention or scan."""
    with FlopCounterMode(display=False) as counter:
        stage.compute(batches)
    counts: dict[Any, int] = counter.get_flop_counts()["Global"]
    return sum(n for op, n in counts.items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm))


@pytest.mark.parametrize("place", ["pre", "post"])
@pytest.mark.parametrize("layers", ["linear", "hybrid"])
@pytest.mark.parametrize("name", STAGES)
def test_operations_are_those_that_run(name: StudentStage, layers: str, place: Literal["pre", "post"]) -> None:
    recipe, teacher = tiny_recipe(), tiny_teacher(place)
    if layers == "hybrid":
        recipe = tiny_recipe(softmax_layers=(0, 2))
    stage = networks.random_stage(name, recipe, PLAN, teacher, CPU, compiled=False)
    batches = networks.random_batches(recipe, PLAN, stage)
    student = teacher.with_layer_types(*recipe.layer_types(teacher))
    counted = step_flops(name, student, batches)
    language = teacher.language
    # Run and not counted: the head's rows that fill it up, and what the last layer makes of its attention.
    unasked = counted.head * (-language.vocab_size % HEAD_ROWS) / language.vocab_size
    if name != "stage3":
        unasked = 2 * 160 * (language.hidden_size**2 + 3 * language.hidden_size * language.intermediate_size)
    if name == "stage1":  # by autograd V, K and Q of teacher and student are two products
        stacks = zip(student.stacks, (batches[0][1].layout.stack_ids.numel(), 160), strict=True)
        unasked += sum(
            2 * n * stack.conv_dim * stack.hidden_size * stack.layer_types.count("mamba2") for stack, n in stacks
        )
    ran = linear_products(stage, batches)
    assert counted.layers + counted.head + counted.image + unasked == pytest.approx(ran, rel=1e-9)


def test_attention_counts_pairs_and_the_scan_its_chunks() -> None:
    recipe, teacher = tiny_recipe(), tiny_teacher()
    stage = networks.random_stage("stage3", recipe, PLAN, teacher, CPU, compiled=False)
    ((_, inputs),) = networks.random_batches(recipe, PLAN, stage)
    mixers: tuple[LayerType, ...] = ("mamba2", "mamba2")
    found = step_flops("stage3", teacher.with_layer_types(mixers, mixers), [(1.0, inputs)])
    assert inputs.segments is not None
    # The teacher's alone: two products of 2 * hidden_size a pair, in two layers of each stack.
    pairs = sum(int(segments.mask().sum()) for segments in inputs.segments)
    assert found.attention == 2 * 2 * 2 * 32 * pairs
    # Rows shorter than a chunk: pairs of the whole row, forward once and backward twice, in 4 layers of the student.
    lengths = (inputs.layout.stack_ids.numel(), 160)
    heads, dim = 4, 8
    assert found.scan == 3 * 2 * sum(2 * 2 * dim * heads * n * (n + 1) / 2 for n in lengths)


def test_flops_add_up() -> None:
    some = Flops(1.0, 2.0, 3.0, 4.0, 5.0)
    assert (some + some.times(2)).total == 45.0


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A recipe file for the tiny teacher; returns its path."""
    monkeypatch.setattr(networks, "nano_config", tiny_config)
    stage = "{steps: 10, lr: 1.0e-3, image_batch: 1, text_batch: 0}"
    path = tmp_path / "tiny.yaml"
    path.write_text(
        "image_seqlen: 96\nmax_tiles: 2\npacked: true\npacked_tiles: 4\nfrozen_dtype: bfloat16\n"
        + "stages:\n"
        + "".join(f"  {name}: {stage}\n" for name in STAGES)
    )
    return str(path)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_stage_gives_a_line(small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "records" / "distill.jsonl"
    options = ["--recipe", small, "--steps", "2", "--no-compile", "--device", "cpu", "--recompute", "both"]
    distill.main([*options, "--out", str(out)])
    printed = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    records = lines(out)
    assert printed["records"] == records
    assert [(r["what"], r["recompute"]) for r in records] == [
        ("stage1", False),
        ("stage2", False),
        ("stage3", False),
        ("stage3", True),
    ]
    for r in records:
        assert r["tokens_per_s"] == pytest.approx(r["tokens"] / r["ms"] * 1e3, rel=0.02)
        assert r["tflop_per_s"] == pytest.approx(sum(r["tflop"].values()) / r["ms"] * 1e3, rel=0.02)
        assert (r["tokens"], r["tiles"]) == (96, 4)
        assert r["embedding_tokens"] == 96 + 3 * 16, "four tokens for each of an image's"
        assert r["estimated_bytes"] > 0
        assert r["peak_bytes"] > 0
        assert "scaling" not in r
        assert r.get("layers") == ("autograd" if r["what"] != "stage3" else None)
    distill.main([*options[:-2], "--stages", "stage3", "--out", str(out), "--all-tokens"])
    *_, last = lines(out)
    assert len(lines(out)) == 5
    assert (last["all_tokens"], last["learned_tokens"]) == (True, 96)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory.\nTried 2 GiB"),
            ("out_of_memory", "CUDA out of memory. Tried 2 GiB"),
        ),
        (RuntimeError("no such kernel"), ("failed", "RuntimeError: no such kernel")),
    ],
)
def test_a_stage_that_ends_early_says_so_and_the_next_goes_on(
    error: Exception, says: tuple[str, str], small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = networks.random_stage

    def tight(name: str, *args: Any, **options: Any) -> Stage:
        if name == "stage2":
            raise error
        return made(name, *args, **options)

    monkeypatch.setattr(distill, "random_stage", tight)
    out = tmp_path / "distill.jsonl"
    status = distill.main(["--recipe", small, "--steps", "2", "--no-compile", "--device", "cpu", "--out", str(out)])
    first, second, third = lines(out)
    assert second[says[0]] == says[1]
    assert status == (says[0] == "failed")
    assert "ms" not in second
    assert first["ms"] > 0 < third["ms"]


def in_one_of_two(rank: int, recipe: str, out: str) -> None:
    networks.nano_config = tiny_config
    made = networks.random_stage

    def tight(name: str, *args: Any, **options: Any) -> Stage:
        if name == "stage1" and rank == 1:
            raise torch.OutOfMemoryError("no room in the second")
        return made(name, *args, **options)

    distill.random_stage = tight
    options = ["--recipe", recipe, "--stages", "stage1,stage2", "--steps", "2", "--no-compile", "--device", "cpu"]
    distill.main([*options, "--out", out])


def test_two_processes_say_how_they_scale(small: str, tmp_path: Path) -> None:
    """One that runs out of memory keeps nobody waiting."""
    out = tmp_path / "distill.jsonl"
    in_two_processes(in_one_of_two, small, str(out))
    first, second = lines(out)
    assert first["out_of_memory"] == "no room in the second"
    assert second["processes"] == 2
    assert second["scaling"] == pytest.approx(2 * second["ms"] / second["together_ms"], rel=0.01)
    assert second["together_tokens_per_s"] == pytest.approx(2 * 96 / second["together_ms"] * 1e3, rel=0.02)


@pytest.mark.parametrize(
    ("options", "says"),
    [(["--steps", "1"], "--steps 1 gives no spread"), (["--stages", "stage9"], "--stages stage9: recipe nano-linear")],
)
def test_bad_flags(options: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        distill.main([*options, "--device", "cpu"])
    assert says in capsys.readouterr().err
