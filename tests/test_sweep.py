"""Growing contexts: exact lengths, honest ends, states that come back; with tiny models."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import sweep as command
from mmmamba import ModelInputs, load_model, prefill
from mmmamba import sweep as module
from mmmamba.model import MMMamba
from mmmamba.sweep import Point, Reading, Skipped, Sweep, charts, predict, run_together, to_csv
from mmmamba.tokenizer import load_tokenizer

CONTEXTS = (600, 1200)


@pytest.fixture(scope="module")
def student(tiny_dir: Path) -> MMMamba:
    return load_model(tiny_dir)


@pytest.fixture(scope="module")
def teacher(tiny_teacher_dir: Path) -> MMMamba:
    return load_model(tiny_teacher_dir)


def sweep_of(model: MMMamba, free_bytes: int | None = None, **options: Any) -> Sweep:
    assert model.source is not None
    options = {"contexts": CONTEXTS, "steps": 4} | options
    return Sweep(model, load_tokenizer(model.source), "tiny", predict(model, 1e10, free_bytes), **options)


def points(events: Any) -> list[Point]:
    return [event for event in events if isinstance(event, Point)]


def test_contexts_are_read_exactly_and_bytes_are_those_predicted(student: MMMamba, teacher: MMMamba) -> None:
    for model in (student, teacher):
        sweep = sweep_of(model)
        found = points(sweep.run())
        assert [p.context for p in found] == list(CONTEXTS)
        for p in found:
            assert p.text_tokens + p.image_tokens == p.context
            assert p.recurrent_bytes + p.cache_bytes == sweep.prediction.bytes(p.context)
            assert 0 < p.p20_ms <= p.ms <= p.p80_ms
            assert p.ttft_ms > 0
            assert p.read_s is not None
        growth = found[1].cache_bytes - found[0].cache_bytes
        assert growth == sweep.prediction.kv_bytes(600)
        assert (growth == 0) == (model is student), "the student grew, or the teacher did not"


def test_the_state_is_that_of_the_conversation(student: MMMamba) -> None:
    """What the sweep has read in pieces equals one pass over the same text."""
    sweep = sweep_of(student, contexts=(700,))
    list(sweep.run())
    ids, _ = sweep_of(student)._text.take(700)
    state = student.new_state()
    prefill(student, ModelInputs(torch.tensor([ids])), state)
    for name, tensor in state.tensors().items():
        assert torch.allclose(tensor, sweep._state.tensors()[name], atol=1e-4), name


def test_pictures_are_repeated_whole(student: MMMamba) -> None:
    sweep = sweep_of(student, pixel_values=torch.zeros(1, 3, 56, 56))
    found = points(sweep.run())
    assert [p.context for p in found] == list(CONTEXTS)
    assert found[0].image_tokens >= 4
    assert found[0].image_tokens % 4 == 0, "the tiny model has 4 tokens a tile"
    assert found[1].image_tokens > found[0].image_tokens


def test_the_end_is_said_before_it_is_reached(student: MMMamba, teacher: MMMamba) -> None:
    free = predict(teacher, 1e10, None).kv_bytes(1000)
    events = list(sweep_of(teacher, free).run())
    assert [p.context for p in points(events)] == [600]
    last = events[-1]
    assert isinstance(last, Skipped)
    assert last.context == 1200
    assert "the end is at about 900 tokens" in last.reason
    assert not any(isinstance(e, Reading) and e.context == 1200 for e in events), "it was read all the same"
    assert predict(student, 1e10, free).end_tokens is None


def test_time_is_planned_too(student: MMMamba) -> None:
    sweep = sweep_of(student, contexts=(600, 10**9), budget_s=60)
    events = list(sweep.run())
    assert len(points(events)) == 1
    assert isinstance(events[-1], Skipped)
    assert "the limit is 60 s" in events[-1].reason


def test_stop_ends_it_at_the_next_piece(student: MMMamba) -> None:
    cancel, seen = threading.Event(), []
    for event in sweep_of(student, contexts=(5000,)).run(cancel):
        seen.append(event)
        cancel.set()
    assert len(seen) == 1
    assert isinstance(seen[0], Reading)


def test_a_saved_context_is_restored_instead_of_read(student: MMMamba, tmp_path: Path) -> None:
    first = sweep_of(student, states=tmp_path, weights="a")
    list(first.run())
    again = sweep_of(student, states=tmp_path, weights="a", contexts=(600, 1200, 1400))
    events = list(again.run())
    found = points(events)
    assert [p.read_s is None for p in found] == [True, True, False]
    assert found[0].restore_ms is not None
    assert {e.context for e in events if isinstance(e, Reading)} == {1400}
    fresh = sweep_of(student, contexts=(1200, 1400))
    list(fresh.run())
    for name, tensor in fresh._state.tensors().items():
        assert torch.allclose(tensor, again._state.tensors()[name], atol=1e-4), f"{name}: the text went on elsewhere"
    other = sweep_of(student, states=tmp_path, weights="b")
    assert points(other.run())[0].read_s is not None, "the state of other weights was taken"


def test_a_damaged_file_is_read_again(student: MMMamba, tmp_path: Path) -> None:
    list(sweep_of(student, states=tmp_path).run())
    for file in tmp_path.iterdir():
        file.write_bytes(b"cut short")
    assert points(sweep_of(student, states=tmp_path).run())[0].read_s is not None


def test_models_take_turns_at_each_context(student: MMMamba, teacher: MMMamba) -> None:
    both = [sweep_of(student), sweep_of(teacher)]
    both[1].name = "other"
    assert [(p.model, p.context) for p in points(run_together(both))] == [
        ("tiny", 600),
        ("other", 600),
        ("tiny", 1200),
        ("other", 1200),
    ]


def test_charts_draw_points_over_predictions(student: MMMamba, teacher: MMMamba) -> None:
    prediction = predict(teacher, 1e10, 1 << 30)
    point = points(sweep_of(teacher, contexts=(600,)).run())[0]
    latency, memory = charts([point], {"tiny": prediction})
    assert latency.lines[0].points == ((600, point.ms),)
    assert latency.lines[0].predicted[0] == (600, pytest.approx(point.ms)), "the prediction starts at what is measured"
    assert dict(memory.lines[0].predicted)[600] == point.cache_bytes
    assert memory.lines[0].end == prediction.end_tokens


def test_csv_has_every_field(student: MMMamba) -> None:
    found = points(sweep_of(student, contexts=(600,)).run())
    rows = list(csv.DictReader(io.StringIO(to_csv(found))))
    assert rows[0].keys() == {f.name for f in dataclasses.fields(Point)}
    assert float(rows[0]["ms"]) == found[0].ms


def test_contexts_that_make_no_sense_are_refused(student: MMMamba) -> None:
    with pytest.raises(ValueError, match="64 or more"):
        sweep_of(student, contexts=(10,))


def test_command_end_to_end(
    tiny_dir: Path, tiny_teacher_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr(command.machine, "memory_bandwidth", lambda device: 1e10)
    flags = ["--model", str(tiny_dir), str(tiny_teacher_dir), "--contexts", "100", "300", "--steps", "3"]
    files = [f"--{name}={tmp_path / name}" for name in ("out", "csv", "png")]
    assert command.main([*flags, *files]) == 0
    out = capsys.readouterr().out
    summary = json.loads(out.splitlines()[-1])
    assert [r["context"] for r in summary["records"]] == [100, 100, 300, 300]
    assert "no end" in out
    assert (tmp_path / "png").read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "csv").read_text().splitlines()) == 5
    assert command.main([*flags, *files]) == 0
    assert len(json.loads((tmp_path / "out").read_text())) == 4, "a second run replaces the first"
    assert command.main([*flags, *files, "--quantize", "int8"]) == 0
    held = [record["quantize"] for record in json.loads((tmp_path / "out").read_text())]
    assert held == [None] * 4 + ["int8"] * 4, "another precision is another question"


def test_default_contexts_reach_what_is_claimed() -> None:
    assert module.CONTEXTS == (1024, 4096, 16_384, 65_536, 103_000)
