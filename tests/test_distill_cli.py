"""The commands of `python -m distill`, end to end on a network small enough for seconds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

import distill.nano
from distill.__main__ import main
from mmmamba import ModelConfig, load_model
from mmmamba.checkpoint import BUNDLED_DIR

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
STAGE = {
    "steps": 2,
    "lr": 1e-3,
    "image_batch": 2,
    "text_batch": 1,
    "image_answer_tokens": 20,
    "text_answer_tokens": 120,
}


def tiny_config() -> ModelConfig:
    config = distill.nano.nano_config()
    return replace(
        config,
        embedding=replace(
            config.embedding, **SHAPE, llm_hidden_size=32, image_size=56, num_hidden_layers=2, layer_types=()
        ),
        language=replace(config.language, **SHAPE, num_hidden_layers=2, layer_types=()),
    )


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "base"
    LlamaForCausalLM(
        LlamaConfig(**SHAPE, num_hidden_layers=2, vocab_size=49_152, tie_word_embeddings=True, rms_norm_eps=1e-5)
    ).save_pretrained(path)
    return path


def test_teacher_student_bundle_and_eval(
    tmp_path: Path,
    base: Path,
    font_pack: Path,
    nlvr_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tiny_config()
    monkeypatch.setattr("distill.nano.nano_config", lambda: config)
    stages = {name: STAGE | {"round_from": 0.5} for name in ("teacher", "stage1", "stage2", "stage3")}
    # What trains here is too narrow for nano's groups of 64 and 96, except in the embedding's table.
    monkeypatch.setattr("distill.rounding.storage_spec", lambda name, tensor: None)
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "image_seqlen": 160,
                "text_seqlen": 128,
                "image_sources": dict.fromkeys(("shapes", "printed", "charts", "digits", "nlvr"), 1),
                "text_sources": {"self": 1},
                "stages": stages,
            }
        )
    )
    common = ["--recipe", str(recipe), "--tokenizer", str(BUNDLED_DIR), "--log", str(tmp_path / "log.jsonl")]
    common += ["--workers", "0", "--eval-count", "2", "--no-compile", "--device", "cpu"]
    common += ["--fonts", str(font_pack), "--text", str(nlvr_folder)]

    main(["teacher", "--base", str(base), "--out", str(tmp_path / "teacher"), *common])
    teacher = load_model(tmp_path / "teacher")
    assert teacher.config.kind == "teacher"

    main(
        [
            "teacher",
            "--base",
            str(base),
            "--resume",
            str(tmp_path / "teacher"),
            "--out",
            str(tmp_path / "more"),
            *common,
        ]
    )
    first, resumed = (
        line["image_ce"]
        for line in map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
        if line.get("step")
    )
    assert resumed < first, "the same first batch, from the trained weights"

    student = ["student", "--teacher", str(tmp_path / "teacher"), "--out", str(tmp_path / "linear"), *common]
    main([*student, "--stages", "stage1,stage2"])
    assert not (tmp_path / "linear" / "stages" / "stage3.safetensors").exists()
    main(student)
    assert "stage2: taken from" in capsys.readouterr().out
    linear = load_model(tmp_path / "linear")
    assert linear.config.kind == "linear"
    assert torch.equal(linear.embedding.text.weight, teacher.embedding.text.weight)

    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in log} == {"teacher", "stage1", "stage2", "stage3"}
    assert all(0 <= score <= 1 for line in log for score in line.get("exact_match", {}).values())

    monkeypatch.setattr("distill.__main__.storage_spec", lambda name, tensor: None)
    main(["bundle", str(tmp_path / "nano"), f"teacher={tmp_path / 'teacher'}", f"linear={tmp_path / 'linear'}"])
    for name, model in (("teacher", teacher), ("linear", linear)):
        again = load_model(tmp_path / "nano" / name)
        for ours, tensor in model.named_parameters():
            assert torch.allclose(again.get_parameter(ours), tensor, atol=1e-3), ours

    capsys.readouterr()
    evaluate = ["eval", str(tmp_path / "nano" / "linear"), "--tokenizer", str(BUNDLED_DIR), "--count", "2"]
    main(evaluate)
    scores = json.loads(capsys.readouterr().out)
    assert "shapes_count" in scores
    assert "charts_bar_pie" in scores
    assert "printed_text" not in scores, "it needs fonts"
    main([*evaluate, "--fonts", str(font_pack), "--nlvr", str(nlvr_folder)])
    scores = json.loads(capsys.readouterr().out)
    assert {"printed_text", "nlvr", "digits"} <= scores.keys()
    assert scores["printed_text_cer"] > 0
