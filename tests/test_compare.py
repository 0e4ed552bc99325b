"""One prompt through two models in turn, and growing contexts, on the engine's lane; the figures are those measured."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from PIL import Image

from app.chat import Chat
from app.compare import MOST_POINTS, Compare, Comparison, Watch, thin
from app.engine import Engine, EngineError, Settings
from app.grow import Grow, Growth
from app.sides import BUNDLED_DIR, KINDS, Sides, kind_of, known_models, sides_of
from mmmamba import checkpoint
from mmmamba.generate import decode_one_token
from tests.fakes import CACHE_BYTES_PER_WORD, PEAK_BYTES, STATE_BYTES, FakeBackend, FakeLoader, Pace
from tests.test_lane import wait_for

NAMES = ("fake", "fake-teacher")


def engine_of(word_s: float = 0.0, **kwargs: Any) -> Engine:
    return Engine("fake", loader=FakeLoader(word_s), **kwargs)


def last(views: Any) -> Any:
    return list(views)[-1]


@pytest.fixture(autouse=True)
def quick_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.grow.measured_machine", lambda device: {"bandwidth": 1e10, "free_bytes": 1 << 30})


# Compare


def test_answers_come_one_after_the_other_and_stand_side_by_side() -> None:
    question = "what is this" + " thing" * 20  # half a second of answer, so that a stall hides no step of it
    views = list(Compare(engine_of(0.02), NAMES).ask(question))
    for view in views:
        writing = [side for side in view.sides if side.stage in ("reading", "writing")]
        assert len(writing) <= 1, "both at once: the timings mean nothing"
    final: Comparison = views[-1]
    assert final.done
    assert [side.text for side in final.sides] == [f"turn 1 images 0: {question}"] * 2
    assert [side.kind for side in final.sides] == ["linear", "teacher"]
    assert final.agreement is not None
    assert final.agreement.share == 1
    assert len({view.sides[1].text for view in views}) > 3, "the second answer did not stream"


def test_figures_are_moments_and_bytes() -> None:
    compare = Compare(engine_of(0.02), NAMES)
    final = last(compare.ask("what is this"))
    for side, name in zip(final.sides, NAMES, strict=True):
        state = compare.chats[name].turns[0].snapshots[f"{name}|cpu|float32"].state
        figures, trace = side.figures, side.trace
        assert figures.num_tokens == len(trace.token_s) == 7
        gaps = [b - a for a, b in itertools.pairwise(trace.token_s)]
        assert figures.ms_per_token == pytest.approx(1e3 * median(gaps))
        assert figures.ms_per_token > 15, "the fake model takes 20 ms a word"
        assert figures.tok_per_sec == pytest.approx(6 / (trace.token_s[-1] - trace.token_s[0]))
        assert figures.ttft_ms == pytest.approx(1e3 * (trace.token_s[0] - trace.started_s))
        assert figures.text_tokens == state.num_text_tokens
        assert figures.recurrent_bytes == STATE_BYTES
        assert figures.cache_bytes == state.cache_nbytes
        assert figures.peak_bytes == PEAK_BYTES
    assert final.sides[0].figures.cache_bytes == 0
    assert final.sides[1].figures.cache_bytes == CACHE_BYTES_PER_WORD * final.sides[1].figures.context


def test_the_next_question_goes_on_and_the_lines_grow() -> None:
    compare = Compare(engine_of(0.005), NAMES)
    first = last(compare.ask("one"))
    second = last(compare.ask("two"))
    assert second.sides[0].text == "turn 2 images 0: two"
    for side, before in zip(second.sides, first.sides, strict=True):
        assert side.memory[: len(before.memory)] == before.memory
        assert side.memory[-1][0] > before.memory[-1][0]
        assert [x for x, _ in side.latency] == sorted(x for x, _ in side.latency)
    assert len({y for _, y in second.sides[0].memory}) == 1, "a linear model's memory is one flat line"
    teacher = [y for _, y in second.sides[1].memory]
    assert teacher == sorted(teacher)
    assert teacher[0] < teacher[-1]


def test_stop_ends_both_and_keeps_whole_turns() -> None:
    compare = Compare(engine_of(0.02), NAMES)
    for view in compare.ask("[long]"):
        if len(view.sides[0].text.split()) > 3:
            compare.stop()
    wait_for(lambda: compare.engine.lane.idle)
    assert view.sides[1].text == ""
    (turn,) = compare.chats["fake"].turns
    assert turn.finish_reason == "cancel"
    assert 3 < len(turn.reply.split()) < 200, "it went on to the end"
    assert not compare.chats["fake-teacher"].turns


def test_a_fault_of_one_model_leaves_the_other_its_answer() -> None:
    final = last(Compare(engine_of(), ("fake", "broken")).ask("what is this"))
    assert final.sides[0].text
    assert (final.sides[1].stage, final.agreement) == ("failed", None)
    assert "could not be loaded: its file is cut short" in final.sides[1].note


def test_messages_of_others_come_between_the_sides_but_not_into_them(monkeypatch: pytest.MonkeyPatch) -> None:
    pace = Pace()
    engine = Engine("fake", loader=FakeLoader(pace=pace))
    order: list[tuple[str, str]] = []
    stream = FakeBackend.stream

    def noted(backend: FakeBackend, ids: Any, *args: Any) -> Iterator[Any]:
        order.append((backend.info.name, ids[-1]))
        yield from stream(backend, ids, *args)
        order.append((backend.info.name, "end"))

    monkeypatch.setattr(FakeBackend, "stream", noted)
    thread = threading.Thread(target=lambda: last(engine.reply(Chat(), "mine")))
    for view in Compare(engine, NAMES).ask("[hold] this"):
        if view.sides[0].stage == "reading" and not pace.go.is_set():
            thread.start()
            wait_for(lambda: len(engine.lane) == 1)
            pace.go.set()
    thread.join(60)
    sides = [[(name, "this"), (name, "end")] for name in NAMES]
    assert order == [*sides[0], ("fake", "mine"), ("fake", "end"), *sides[1]]


def test_closing_frees_the_states() -> None:
    engine = engine_of()
    compare = Compare(engine, NAMES)
    last(compare.ask("one"))
    assert len(engine.chats.states) == 2
    compare.close()
    assert len(engine.chats.states) == 0


def test_limits_hold() -> None:
    with pytest.raises(EngineError, match="empty"):
        last(Compare(engine_of(), NAMES).ask(" "))


def test_which_models_stand_side_by_side() -> None:
    assert sides_of("nano", None).usual == ("nano", "nano-teacher")
    assert sides_of("nano", "").names == ("nano",)
    assert sides_of("/srv/mine", None).names == ("/srv/mine",)
    assert sides_of("/srv/mine", "/srv/other").usual == ("/srv/mine", "/srv/other")
    assert sides_of("a", "b, c,a") == Sides(("a", "b", "c"), ("a", "b", "c"))
    published = sides_of("hustvl/mmMamba-linear", None)
    assert published.names == ("hustvl/mmMamba-linear", "hustvl/mmMamba-hybrid", "OpenGVLab/HoVLE")
    assert published.usual == ("hustvl/mmMamba-linear", "OpenGVLab/HoVLE")
    assert sides_of("OpenGVLab/HoVLE", None).usual == ("OpenGVLab/HoVLE", "hustvl/mmMamba-linear")
    assert published.called(["HoVLE", "mmMamba-hybrid"]) == ("hustvl/mmMamba-hybrid", "OpenGVLab/HoVLE")
    assert published.called([]) == published.usual


def test_a_hybrid_of_the_bundle_can_be_chosen(
    bundle_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name where it lies beside nano, and by its folder in any other bundle."""
    linear, hybrid, teacher = (str(bundle_dir / kind) for kind in KINDS)
    assert sides_of(linear, None) == Sides((linear, hybrid, teacher), (linear, teacher))
    assert sides_of(hybrid, None) == Sides((hybrid, linear, teacher), (hybrid, teacher))
    monkeypatch.setattr("app.sides.BUNDLED_DIR", bundle_dir)
    monkeypatch.setattr(checkpoint, "BUNDLED_DIR", bundle_dir)
    assert sides_of("nano", None) == Sides(("nano", "nano-hybrid", "nano-teacher"), ("nano", "nano-teacher"))
    assert known_models()[:3] == ["nano-linear", "nano-hybrid", "nano-teacher"]
    assert checkpoint.resolve_checkpoint("nano-hybrid") == bundle_dir / "hybrid"
    monkeypatch.setattr("app.sides.BUNDLED_DIR", tmp_path)
    assert sides_of("nano", None).names == ("nano",), "an installation without its weights"


def test_names_without_torch_are_those_of_the_checkpoints() -> None:
    assert BUNDLED_DIR == checkpoint.BUNDLED_DIR
    assert {f"nano-{kind}" for kind in KINDS} | {"nano"} == set(checkpoint.BUNDLED)
    kinds = {"nano": "linear", "nano-hybrid": "hybrid", "a/mmMamba-linear": "linear", "OpenGVLab/HoVLE": "teacher"}
    kinds |= {"x": "", "b/teacher": "teacher"}
    assert {name: kind_of(name) for name in kinds} == kinds


def test_three_answer_in_turn() -> None:
    final = last(Compare(engine_of(), ("fake", "fake-hybrid", "fake-teacher")).ask("what is this"))
    assert [side.text for side in final.sides] == ["turn 1 images 0: what is this"] * 3
    assert final.agreement is not None
    assert list(final.agreements) == ["fake", "fake-hybrid"], "each with the teacher"


def test_long_lines_are_thinned_and_keep_their_end() -> None:
    points = tuple((float(i), 1.0) for i in range(10_000))
    assert len(thin(points)) <= MOST_POINTS
    assert thin(points)[-1] == points[-1]


def test_real_models_figures_hold_against_a_stopwatch(
    tiny_dir: Path, tiny_teacher_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time between two tokens is what feeding one takes: each is made to take 10 ms more."""
    fed: dict[int, list[float]] = {}

    def slower(model: Any, *args: Any) -> Any:
        fed.setdefault(id(model), []).append(1e3 * time.perf_counter())
        time.sleep(0.01)
        return decode_one_token(model, *args)

    monkeypatch.setattr("mmmamba.generate.decode_one_token", slower)
    engine = Engine(str(tiny_dir), "cpu", "float32")
    final = last(
        Compare(engine, (str(tiny_dir), str(tiny_teacher_dir))).ask("Hi", (), Settings(max_new_tokens=8, greedy=True))
    )
    assert len(fed) == 2
    for side, times in zip(final.sides, fed.values(), strict=True):
        stopwatch = median(after - before for before, after in itertools.pairwise(times))
        assert 10 <= side.figures.ms_per_token == pytest.approx(stopwatch, rel=0.5)
        assert side.figures.num_tokens <= 8
    student, teacher = (side.figures for side in final.sides)
    assert student.cache_bytes == 0 < student.recurrent_bytes
    # 6 layers in two stacks, keys and values of 2 heads of 8 in float32, as many as there are tokens
    config = engine.models.get(str(tiny_teacher_dir)).model.config
    per_token = sum(2 * s.kv_dim * s.num_hidden_layers * 4 for s in config.stacks)
    assert teacher.cache_bytes == per_token * teacher.context


def test_watch_gives_a_token_the_moment_at_which_it_was_known() -> None:
    """See `Watch.token_s`: with no replies there are no moments."""
    assert Watch(1.0).token_s == ()
    assert Watch(1.0).latency() == []


# Grow


def test_growth_draws_points_as_they_come_and_says_the_end() -> None:
    views: list[Growth] = list(Grow(engine_of(), NAMES).run(103_000))
    final = views[-1]
    assert final.done
    assert not final.error
    assert [(p.model, p.context) for p in final.points][:2] == [("fake", 1024), ("fake-teacher", 1024)]
    assert final.points[-1].context == 103_000
    assert "20,000" in final.ends["fake-teacher"]
    assert "fake" not in final.ends
    assert len({len(view.points) for view in views}) > 3, "the points came all at once"
    assert any("is reading" in view.doing for view in views)


def test_growth_stops_at_any_time_and_keeps_what_it_has() -> None:
    grow = Grow(engine_of(), NAMES)
    for view in grow.run(103_000):
        if view.points:
            grow.stop()
    assert view.done
    assert view.doing == "stopped"
    assert view.points
    assert view.points[-1].context < 103_000, "it went on to the end"


def test_messages_are_answered_while_the_context_grows() -> None:
    engine = engine_of()
    grow = Grow(engine, NAMES)
    answered = []
    for view in grow.run(103_000):
        if not answered and "reading" in view.doing:
            answered.append(last(engine.reply(Chat(), "mine")).text)
            assert not grow.growth.done, "the message had to wait for all of it"
            grow.stop()
    assert answered == ["turn 1 images 0: mine"]


def test_growth_of_a_model_that_cannot_be_loaded_is_told() -> None:
    assert "cut short" in last(Grow(engine_of(), ("broken",)).run()).error
    with pytest.raises(EngineError, match="31 minutes of reading"):
        last(Grow(engine_of(), NAMES).run(4096, 31 * 60))
    with pytest.raises(EngineError, match="100 tokens: this server grows contexts of 1,024 to 103,000"):
        last(Grow(engine_of(), NAMES).run(100))


def test_growth_with_real_models(tiny_dir: Path, tiny_teacher_dir: Path, tmp_path: Path) -> None:
    engine = Engine(str(tiny_dir), "cpu", "float32")
    picture = tmp_path / "red.png"
    Image.new("RGB", (60, 40), "red").save(picture)
    grow = Grow(engine, (str(tiny_dir), str(tiny_teacher_dir)), tmp_path / "states")
    final = last(grow.run(1024, image=picture))
    assert [p.context for p in final.points] == [1024, 1024]
    assert all(p.image_tokens for p in final.points)
    again = last(grow.run(1024, image=picture))
    assert [p.read_s for p in again.points] == [None, None], "what was read is kept for the next time"


def test_share_of_the_frozen_part(tiny_dir: Path, tiny_teacher_dir: Path) -> None:
    engine = Engine(str(tiny_dir), "cpu", "float32")
    student, teacher = (engine.models.get(str(d)).model for d in (tiny_dir, tiny_teacher_dir))
    theirs = dict(teacher.named_parameters())
    for name, p in student.named_parameters():
        if name in theirs and theirs[name].shape == p.shape and torch.equal(theirs[name], p):
            assert p is theirs[name], f"{name} lies in memory twice"
