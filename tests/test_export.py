"""Students in the published layouts: written so that anyone reads them, read from the reference's training runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill.__main__ import cli
from distill.convert import SplitProjection, fused_copy, load_mixers_
from distill.export import export_student
from distill.upstream import load_upstream_student
from mmmamba.checkpoint import CheckpointError, load_model
from mmmamba.mixer import Mamba2Mixer
from mmmamba.model import MMMamba
from tests.helpers import FOLDERS, GOLDEN, golden_cases, golden_config
from tests.training import student_of, teacher_of


def logits(model: MMMamba, folder: str) -> Tensor:
    tensors = golden_cases(folder)["image"]
    with torch.no_grad():
        return model(tensors["input_ids"], tensors["pixel_values"])


def unfused(folder: str, number: int = 2) -> Path:
    return GOLDEN / folder / f"stage{number}_student.safetensors"


# --- export ---


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("kind", ["linear", "hybrid"])
def test_an_exported_student_is_the_authors_layout(folder: str, kind: str, tmp_path: Path) -> None:
    student = student_of(teacher_of(folder), folder, kind)
    before = logits(student, folder)
    out = export_student(student, tmp_path / "out")
    assert out == tmp_path / "out"
    assert json.loads((out / "config.json").read_text()) == golden_config(folder, kind)
    written, published = load_file(out / "model.safetensors"), load_file(GOLDEN / folder / kind / "model.safetensors")
    assert {n: t.shape for n, t in written.items()} == {n: t.shape for n, t in published.items()}
    assert torch.equal(logits(load_model(out), folder), before)


@pytest.mark.parametrize("kind", ["linear", "hybrid"])
def test_training_goes_on_from_an_exported_student(kind: str, tmp_path: Path) -> None:
    teacher = teacher_of("post")
    student = student_of(teacher, "post", kind)
    with torch.no_grad():
        for module in student.modules():
            if isinstance(module, Mamba2Mixer):
                for parameter in (module.in_proj.vkq, module.in_proj.gate_dt, module.A_log, module.conv.bias):
                    parameter.add_(0.01)
    export_student(student, tmp_path)
    again = load_mixers_(student_of(teacher_of("post"), "post", kind), load_model(tmp_path))
    for (name, ours), theirs in zip(again.named_parameters(), student.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert torch.equal(logits(again, "post"), logits(student, "post"))


def test_another_teachers_or_another_kind_of_student_is_refused(tmp_path: Path) -> None:
    export_student(student_of(teacher_of("post"), "post"), tmp_path)
    with pytest.raises(ValueError, match=r"the trained student is linear and its config another than the recipe makes"):
        load_mixers_(student_of(teacher_of("post"), "post", "hybrid"), load_model(tmp_path))
    other = teacher_of("post")
    with torch.no_grad():
        other.language.layers[0].mlp.w2.weight.add_(1)
    with pytest.raises(ValueError, match=r"has another language\.layers\.0\.mlp\.w2\.weight than the teacher"):
        load_mixers_(student_of(other, "post"), load_model(tmp_path))


def test_an_exported_student_trains_on(tmp_path: Path) -> None:
    """The export is a copy of the projections and nothing else."""
    student = student_of(teacher_of("post"), "post")
    parameters = dict(student.named_parameters())
    export_student(student, tmp_path)
    assert dict(student.named_parameters()).keys() == parameters.keys()
    assert all(p is parameters[name] for name, p in student.named_parameters())
    mixers = [m for m in student.modules() if isinstance(m, Mamba2Mixer)]
    assert all(isinstance(m.in_proj, SplitProjection) for m in mixers)
    copied = fused_copy(student)
    shared = {p.data_ptr() for p in student.parameters()}
    assert {n for n, p in copied.named_parameters() if p.data_ptr() not in shared} == {
        f"{n}.in_proj.weight" for n, m in copied.named_modules() if isinstance(m, Mamba2Mixer)
    }


def test_exports_of_other_types(tmp_path: Path) -> None:
    """bf16 weights; decays and step biases as wide as they are read."""
    student = student_of(teacher_of("post"), "post", "hybrid").to(torch.bfloat16)
    out = export_student(student, tmp_path)
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    with pytest.raises(ValueError, match="no mamba2 layer, so it is no student; write a teacher with"):
        export_student(teacher_of("post"), tmp_path)


def test_a_torn_export_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = student_of(teacher_of("post"), "post")

    def save_other(model: MMMamba, path: Path) -> None:
        shutil.copytree(GOLDEN / "post" / "linear", path, dirs_exist_ok=True)

    monkeypatch.setattr("distill.export.save_model", save_other)
    with pytest.raises(ValueError, match=r"holds other values of .* than were written"):
        export_student(student, tmp_path)


# --- the reference's training checkpoints ---


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("number", [1, 2])
def test_what_the_reference_trained_is_read_and_exported(folder: str, number: int, tmp_path: Path) -> None:
    """Every tensor in its place (the losses of `test_stages.py` say so too); the export fuses the same rows."""
    teacher = teacher_of(folder)
    student = load_upstream_student(teacher, unfused(folder, number))
    assert student.config.kind == "linear"
    out = export_student(student, tmp_path)
    stored, written = load_file(unfused(folder, number)), load_file(out / "model.safetensors")
    unused = written.pop("language_model.model.tok_embeddings.weight")  # ours: nobody reads it, and we keep none
    assert torch.equal(unused, stored["embedding_model.llm_text_embeddings.weight"])
    for name, tensor in written.items():
        layer, _, part = name.rpartition(".attention.")
        if part == "wvkqgdt.weight":
            rows = ("v_proj", "k_proj", "q_proj", "g_proj", "in_proj")
            want = torch.cat([stored[f"{layer}.attention.{p}.weight"] for p in rows])
        elif part == "g_norm_swish_gate.weight":
            want = stored[f"{layer}.attention.g_norm.weight"]
        else:
            want = stored[name]
        assert torch.equal(tensor, want), name
    assert torch.equal(logits(load_model(out), folder), logits(student, folder))


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_command_reads_what_the_reference_trained(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = GOLDEN / folder / "hovle"
    command = ["distill", "export", "--teacher", str(teacher), "--out", str(tmp_path / "out"), "--from-upstream"]
    monkeypatch.setattr("sys.argv", [*command, str(unfused(folder))])
    assert cli() == 0
    assert "export: linear student of " in capsys.readouterr().out
    student = load_upstream_student(teacher_of(folder), unfused(folder))
    assert torch.equal(logits(load_model(tmp_path / "out"), folder), logits(student, folder))

    stored = load_file(unfused(folder))
    stored["language_model.model.norm.weight"] = stored["language_model.model.norm.weight"] + 0.5
    save_file(stored, tmp_path / "all.safetensors")
    monkeypatch.setattr("sys.argv", [*command, str(tmp_path / "all.safetensors")])
    assert cli() == 1
    assert "1 tensors not the teacher's: language.norm.weight" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", [*command, str(tmp_path / "all.safetensors"), "--allow-changed"])
    assert cli() == 0
    changed = load_model(tmp_path / "out").language.norm.weight
    assert torch.equal(changed, stored["language_model.model.norm.weight"])


def test_what_is_frozen_is_the_teachers() -> None:
    teacher = teacher_of("post")
    student = load_upstream_student(teacher, unfused("post"))
    own = {p.data_ptr() for p in teacher.parameters()}
    new = {name for name, p in student.named_parameters() if p.data_ptr() not in own}
    assert all(".mixer." in name and "out_proj" not in name for name in new)
    assert len(new) == 7 * 12


def test_a_hybrid_and_a_directory(tmp_path: Path) -> None:
    """Layers that are stored as attention stay the teacher's; several files are read."""
    stored, teacher = load_file(unfused("post")), load_file(GOLDEN / "post" / "hovle" / "model.safetensors")
    for prefix in ("embedding_model.encoder.0.", "language_model.model.layers.3."):
        stored = {name: t for name, t in stored.items() if not name.startswith(prefix + "attention.")}
        stored |= {name: t for name, t in teacher.items() if name.startswith(prefix + "attention.")}
    names = sorted(stored)
    save_file({n: stored[n] for n in names[:90]}, tmp_path / "a.safetensors")
    save_file({n: stored[n] for n in names[90:]}, tmp_path / "b.safetensors")
    student = load_upstream_student(teacher_of("post"), tmp_path)
    assert student.config.embedding.layer_types == ("mha", *("mamba2",) * 7)
    assert student.config.language.layer_types == (*("mamba2",) * 3, "mha")
    whole = load_upstream_student(teacher_of("post"), unfused("post"))
    name = "language.layers.1.mixer.in_proj.gate_dt"
    assert torch.equal(student.get_parameter(name), whole.get_parameter(name))


def test_what_is_missing_extra_or_misshaped_is_named(tmp_path: Path) -> None:
    stored = load_file(unfused("post"))
    del stored["embedding_model.encoder.2.attention.g_proj.weight"]
    del stored["language_model.model.norm.weight"]
    stored["language_model.model.layers.1.attention.extra"] = torch.zeros(1)
    stored["optimizer.step"] = torch.zeros(1)
    stored["embedding_model.encoder.3.attention.A_log_bias"] = torch.zeros(5)
    stored["embedding_model.encoder.9.attention.A_log_bias"] = torch.zeros(2)
    stored["embedding_model.encoder.0.ffn_norm.weight"] = torch.zeros(3)
    stored["embedding_model.encoder.1.ffn_norm.weight"] += 1
    path = tmp_path / "broken.safetensors"
    save_file(stored, path)
    with pytest.raises(CheckpointError) as error:
        load_upstream_student(teacher_of("post"), path)
    message = str(error.value)
    assert "2 tensors missing: embedding.layers.2.mixer: g_proj.weight, language.norm.weight" in message
    assert "3 tensors unknown: embedding layer 9, language.layers.1.mixer: extra, optimizer.step" in message
    assert "embedding.layers.0.mlp_norm.weight [3], expected [32]" in message
    assert "embedding.layers.3.mixer: A_log_bias [5], expected [2] together" in message
    assert "1 tensors not the teacher's: embedding.layers.1.mlp_norm.weight" in message
    assert "Pass the teacher that it was distilled from, or allow_changed=True" in message


def test_tensors_that_a_stage_changed_can_be_taken_over(tmp_path: Path) -> None:
    stored = load_file(unfused("post"))
    changed = {
        "language_model.model.layers.1.feed_forward.w1.weight": "language.layers.1.mlp.w1.weight",
        "language_model.model.layers.2.attention.o_proj.weight": "language.layers.2.mixer.out_proj.weight",
        "language_model.model.norm.weight": "language.norm.weight",
    }
    for name in changed:
        stored[name] = stored[name] + 0.5
    path = tmp_path / "all.safetensors"
    save_file(stored, path)
    teacher = teacher_of("post")
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    with pytest.raises(CheckpointError, match="3 tensors not the teacher's"):
        load_upstream_student(teacher, path)
    student = load_upstream_student(teacher, path, allow_changed=True)
    for name, ours in changed.items():
        assert torch.equal(student.get_parameter(ours), stored[name]), ours
    assert all(torch.equal(p, before[name]) for name, p in teacher.named_parameters())
    assert student.embedding.layers[0].mlp is teacher.embedding.layers[0].mlp
    assert torch.equal(logits(load_model(export_student(student, tmp_path / "out")), "post"), logits(student, "post"))


def test_what_cannot_be_read(tmp_path: Path) -> None:
    teacher = teacher_of("post")
    with pytest.raises(CheckpointError, match=r"12 fused layers \(wvkqgdt\): it is an inference checkpoint"):
        load_upstream_student(teacher, GOLDEN / "post" / "linear")
    with pytest.raises(CheckpointError, match="is not there; pass a safetensors file or a directory"):
        load_upstream_student(teacher, tmp_path / "none")
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is no safetensors file; loading anything else can run code"):
        load_upstream_student(teacher, tmp_path / "model.bin")
    with pytest.raises(CheckpointError, match="holds only pickle files"):
        load_upstream_student(teacher, tmp_path)
