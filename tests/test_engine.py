"""The engine without Gradio: whole turns, stop, faults, order, memory; over a fake model, and a tiny real one."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from app.backend import MMMambaBackend, load_backend
from app.chat import Chat, ChatStore, Metrics, Turn
from app.engine import Engine, EngineError, Limits, Reply, Settings
from app.errors import without_folders
from app.follow import MIN_GAP_S, Mailbox, follow
from app.lane import Lane
from app.models import MemoryNeed
from app.states import Budget, StateStore
from mmmamba import load_model
from mmmamba.place import default_dtype
from mmmamba.tokenizer import StreamDecoder
from tests.fakes import STATE_BYTES, FakeLoader, Pace
from tests.test_lane import HANGS_S, wait_for

GREEDY = Settings(greedy=True, max_new_tokens=12)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "square.png"
    Image.new("RGB", (60, 40), "red").save(path)
    return path


@pytest.fixture
def not_a_picture(tmp_path: Path) -> Path:
    path = tmp_path / "letter.jpg"
    path.write_text("Dear Sir or Madam")
    return path


def engine_of(word_s: float = 0.0, **kwargs: Any) -> Engine:
    loader = kwargs.pop("loader", None) or FakeLoader(word_s)
    return Engine("/srv/models/fake", loader=loader, **kwargs)


@contextmanager
def occupied(**kwargs: Any) -> Iterator[tuple[Engine, Pace, list[Any]]]:
    """An engine that reads a message of somebody until `Pace.go` is set, and at the latest when this ends; what is said
    to that message goes to the list."""
    pace = Pace()
    engine = engine_of(loader=FakeLoader(pace=pace), **kwargs)
    out: list[Any] = []
    busy = start(engine, Chat(), "[hold]", out)
    try:
        wait_for(lambda: out and out[-1].stage == "reading")
        yield engine, pace, out
    finally:
        pace.go.set()
        busy.join(HANGS_S)


def last(replies: Any) -> Reply:
    return list(replies)[-1]


def start(engine: Engine, chat: Chat, text: str, into: list[Any]) -> threading.Thread:
    """Answer in a thread; replies, or the error, go to `into`."""

    def run() -> None:
        try:
            for reply in engine.reply(chat, text):
                into.append(reply)
        except EngineError as error:
            into.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def state_of(turn: Turn) -> Any:
    """The one snapshot of a turn."""
    (kept,) = turn.snapshots.values()
    assert kept.state is not None
    return kept.state


# Answers


def test_reply_streams_text_and_figures(picture: Path) -> None:
    engine, chat = engine_of(0.03), Chat()
    question = "what is this " * 10  # a second of answer, so that a stall hides no step of it
    replies = list(engine.reply(chat, question, [picture], Settings(max_tiles=3)))
    final = replies[-1]
    assert final.text == f"turn 1 images 1: {question}".strip()
    assert (final.stage, final.finish_reason) == ("done", "stop")
    texts = [reply.text for reply in replies]
    assert all(after.startswith(before) for before, after in itertools.pairwise(texts))
    assert len(set(texts)) >= 4, "the answer came in one piece"
    metrics = final.metrics
    assert metrics.num_tiles == 3
    assert metrics.image_tokens == 3 * 64
    assert metrics.text_tokens == state_of(chat.turns[0]).num_text_tokens > 0
    assert metrics.state_bytes == STATE_BYTES
    assert metrics.ttft_ms is not None
    assert metrics.ttft_ms >= 12
    assert metrics.num_tokens == 4 + 30


def test_next_turn_starts_from_the_kept_state(picture: Path) -> None:
    engine, chat = engine_of(), Chat()
    last(engine.reply(chat, "one", [picture]))
    assert last(engine.reply(chat, "two")).text == "turn 2 images 0: two"
    seen = state_of(chat.turns[1]).seen
    first = state_of(chat.turns[0]).seen
    assert seen[: len(first)] == first, "the second turn must go on from the first one's state"
    assert seen.count("<begin>") == 1
    assert "<1 images before>" in seen
    assert seen[len(first)] == "<close>", "only the new turn is read"


def test_length_limit_is_reported() -> None:
    chat = Chat()
    reply = last(engine_of().reply(chat, "[long]", settings=Settings(max_new_tokens=5)))
    assert (reply.finish_reason, reply.metrics.num_tokens) == ("length", 5)
    assert chat.turns[0].finish_reason == "length"


def test_retry_replaces_the_last_turn_from_the_state_before_it(picture: Path) -> None:
    engine, chat = engine_of(), Chat()
    last(engine.reply(chat, "one", [picture]))
    last(engine.reply(chat, "two", [picture]))
    before = chat.turns[0]
    reply = last(engine.retry(chat, Settings(temperature=1.5)))
    assert reply.text == "turn 2 images 1: two (hot)"
    assert [turn.text for turn in chat.turns] == ["one", "two"]
    assert chat.turns[0] is before
    assert state_of(chat.turns[1]).seen.count("two") == 2  # asked once, answered once


def test_retry_of_nothing_says_so() -> None:
    with pytest.raises(EngineError, match="nothing to answer again"):
        last(engine_of().retry(Chat()))


def test_two_interleaved_chats_equal_two_separate_ones() -> None:
    def talk(engine: Engine, chats: list[Chat]) -> list[Any]:
        for text in ("a", "b", "c"):
            for i, chat in enumerate(chats):
                last(engine.reply(chat, f"{text}{i}"))
        return [state_of(chat.turns[-1]).seen for chat in chats]

    together = talk(engine_of(), [Chat(), Chat()])
    apart = [talk(engine_of(), [Chat(), Chat()])[i] for i in (0, 1)]
    assert together == apart
    assert together[0] != together[1]


def test_ten_at_once_all_finish_and_never_mix() -> None:
    engine = engine_of(0.02)
    chats = [Chat() for _ in range(10)]
    outs: list[list[Any]] = [[] for _ in chats]
    threads = [start(engine, chat, f"mine{i}", outs[i]) for i, chat in enumerate(chats)]
    for thread in threads:
        thread.join(HANGS_S)
    assert [out[-1].text for out in outs] == [f"turn 1 images 0: mine{i}" for i in range(10)]
    assert any(reply.ahead > 0 for out in outs for reply in out), "nobody was told that others come first"


# Stop


def test_stop_keeps_a_whole_turn_of_exactly_what_is_shown() -> None:
    engine, chat = engine_of(0.02), Chat()
    shown = ""
    for reply in engine.reply(chat, "[long]"):
        shown = reply.text
        if len(shown.split()) >= 5:
            chat.stop()
    assert reply.finish_reason == "cancel"
    assert 5 <= len(shown.split()) < 200
    turn = chat.turns[0]
    assert turn.reply == shown
    assert state_of(turn).seen[-len(shown.split()) :] == tuple(shown.split())
    assert last(engine.reply(chat, "go on")).text == "turn 2 images 0: go on"


def test_stop_acts_even_while_reading() -> None:
    pace = Pace()
    engine, chat = engine_of(loader=FakeLoader(pace=pace)), Chat()
    out: list[Any] = []
    thread = start(engine, chat, "[hold]", out)
    wait_for(lambda: out and out[-1].stage == "reading")
    chat.stop()
    wait_for(lambda: not thread.is_alive(), HANGS_S / 2)
    assert not engine.lane.idle, "the stop waited until everything was read"
    assert (out[-1].text, out[-1].finish_reason) == ("", "cancel")
    pace.go.set()
    assert last(engine.reply(chat, "after")).text == "turn 1 images 0: after", "nothing was kept of the stopped turn"


def test_a_word_that_takes_long_is_still_shown_when_it_is_kept() -> None:
    engine, chat = engine_of(0.3), Chat()
    for reply in engine.reply(chat, "[long]"):
        if reply.text:
            chat.stop()
    assert reply.finish_reason == "cancel"
    wait_for(lambda: engine.lane.idle)
    assert chat.turns[0].reply == reply.text


def test_stop_before_the_first_word_of_a_retry_keeps_the_old_answer() -> None:
    engine, chat = engine_of(), Chat()
    last(engine.reply(chat, "[slow-read] one"))
    old = chat.turns[0]
    for reply in engine.retry(chat):
        if reply.stage == "reading":
            chat.stop()
    assert chat.turns == [old]


def test_stop_while_waiting_leaves_the_queue() -> None:
    chat, cancel = Chat(), threading.Event()
    with occupied() as (engine, _, out):
        waiting = engine.reply(chat, "me", cancel=cancel)
        assert next(waiting).ahead == 1
        cancel.set()
        assert last(waiting).finish_reason == "cancel"
        assert not chat.turns
    assert out[-1].finish_reason == "stop", "stopping one must not touch another"


def test_closing_the_iterator_stops_the_answer() -> None:
    engine, chat = engine_of(0.01), Chat()
    replies = engine.reply(chat, "[long]")
    for reply in replies:
        if len(reply.text.split()) > 3:
            break
    replies.close()
    assert not chat.busy
    wait_for(lambda: chat.turns)
    assert chat.turns[0].finish_reason == "cancel"
    assert 3 < len(chat.turns[0].reply.split()) < 200


def test_updates_come_neither_too_often_nor_too_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    """A word every 4 ms after a second without any, by a clock that only waiting moves."""
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    class Post(Mailbox):
        def wait(self, timeout: float) -> None:
            sleep(timeout if now[0] < 1 else min(timeout, 0.004))
            said = 0 if now[0] < 1 else int((now[0] - 1) / 0.004)
            if said:
                self.reply = Reply("word " * said, "done" if said >= 200 else "writing")

    monkeypatch.setattr("app.follow.time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    lane = Lane()
    job = lane.submit(lambda: None)
    seen = [(now[0], reply) for reply in follow(lane, job, Post(), threading.Event(), engine_of().models)]
    gaps = [after - before for (before, _), (after, _) in itertools.pairwise(seen)]
    assert min(gaps[:-1]) > MIN_GAP_S - 1e-9, "updates come more often than every 50 ms"  # the end does not wait
    assert max(gaps) < 0.1
    assert sum(reply.stage == "writing" for _, reply in seen) > 10
    assert len(seen) < 40


# Faults leave the conversation as it was


def test_fault_of_the_model_rolls_back_and_tells_no_secrets() -> None:
    engine, chat = engine_of(0.002), Chat()
    last(engine.reply(chat, "one"))
    turns = list(chat.turns)
    seen = state_of(turns[0]).seen
    with pytest.raises(EngineError) as caught:
        last(engine.reply(chat, "[boom]"))
    assert "/srv" not in str(caught.value)
    assert chat.turns == turns
    assert state_of(chat.turns[0]).seen == seen
    assert last(engine.reply(chat, "two")).text == "turn 2 images 0: two"


def test_bad_image_is_named_without_its_place(picture: Path, not_a_picture: Path) -> None:
    engine, chat = engine_of(), Chat()
    with pytest.raises(EngineError, match=r"letter\.jpg") as caught:
        last(engine.reply(chat, "what is this", [picture, not_a_picture]))
    assert caught.value.image == 1
    assert str(not_a_picture.parent) not in str(caught.value)
    with pytest.raises(EngineError, match=r"gone\.png") as caught:
        last(engine.reply(chat, "what is this", [picture.with_name("gone.png")]))
    assert str(picture.parent) not in str(caught.value)
    assert not chat.turns


def test_bad_image_is_reported_before_a_long_wait(not_a_picture: Path) -> None:
    with occupied() as (engine, _, out):
        with pytest.raises(EngineError, match="letter"):
            last(engine.reply(Chat(), "what is this", [not_a_picture]))
        assert out[-1].stage == "reading", "the fault was told only after the others' answers"


@pytest.mark.parametrize(
    ("text", "num_images", "settings", "says"),
    [
        ("  \n", 0, {}, "empty"),
        ("x" * 101, 0, {}, "101 characters; 100 fit"),
        ("x", 3, {}, "3 images; 2 fit"),
        ("x", 0, {"max_new_tokens": 65}, "max_new_tokens is 65; this server allows up to 64"),
        ("x", 0, {"max_tiles": 5}, "max_tiles is 5; this server allows up to 4"),
    ],
)
def test_limits_are_checked(picture: Path, text: str, num_images: int, settings: dict[str, Any], says: str) -> None:
    engine = engine_of(limits=Limits(max_text_chars=100, max_images=2, max_tiles=4, max_new_tokens=64))
    chosen = Settings.from_dict({"max_new_tokens": 8} | settings)
    chat = Chat()
    with pytest.raises(EngineError, match=says):
        last(engine.reply(chat, text, [picture] * num_images, chosen))
    assert not chat.turns
    assert not chat.busy


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", "warm"),
        ("top_p", 0),
        ("top_p", 1.1),
        ("max_new_tokens", 0),
        ("max_new_tokens", 2.5),
        ("max_new_tokens", True),
        ("max_tiles", -1),
        ("seed", -1),
        ("greedy", "yes"),
        ("style", "baroque"),
    ],
)
def test_settings_are_checked_by_name(name: str, value: Any) -> None:
    with pytest.raises(EngineError, match=name):
        Settings.from_dict({name: value})


def test_whole_numbers_from_a_page_may_be_floats() -> None:
    settings = Settings.from_dict({"max_new_tokens": 16.0, "seed": 3.0})
    assert (settings.max_new_tokens, settings.seed) == (16, 3)


def test_too_many_waiting_is_said() -> None:
    second: list[Any] = []
    with occupied(max_waiting=1) as (engine, _, _):
        thread = start(engine, Chat(), "x", second)
        wait_for(lambda: second)
        with pytest.raises(EngineError, match="1 messages wait"):
            last(engine.reply(Chat(), "y"))
    thread.join(HANGS_S)
    assert second[-1].finish_reason == "stop"


# Loading


def test_loads_once_with_visible_progress() -> None:
    shown: list[str] = []

    class Watched(FakeLoader):
        """Goes on when a step was shown."""

        def __call__(self, model: str, device: str, dtype: str, progress: Any, others: Any = ()) -> Any:
            def step(done: float, note: str) -> None:
                progress(done, note)
                wait_for(lambda: note in shown, 5)

            return super().__call__(model, device, dtype, step, others)

    loader = Watched()
    engine, chat = engine_of(loader=loader), Chat()
    assert (loader.calls, engine.info) == (0, None), "nothing is loaded before it is asked for"
    stages = []
    for reply in engine.reply(chat, "hello"):
        if reply.stage == "loading":
            stages.append(reply)
            shown.append(reply.note)
    assert {reply.note for reply in stages} >= {"tensor 2 of 4", "tensor 3 of 4"}
    assert sorted(reply.progress for reply in stages) == [reply.progress for reply in stages]
    last(engine.reply(chat, "again"))
    assert loader.calls == 1
    assert engine.info is not None
    assert engine.info.name == "fake"


def test_warm_loads_in_the_background_once() -> None:
    loader = FakeLoader(load_s=0.1)
    engine = engine_of(loader=loader)
    for _ in range(3):
        engine.warm()
    wait_for(lambda: engine.status.stage == "ready")
    engine.warm()
    assert last(engine.reply(Chat(), "hello")).text == "turn 1 images 0: hello"
    assert loader.calls == 1


def test_failed_load_is_told_and_tried_again() -> None:
    engine, chat = engine_of(loader=FakeLoader(failures=1)), Chat()
    with pytest.raises(EngineError, match=r'"fake" could not be loaded: no config\.json in fake$') as caught:
        last(engine.reply(chat, "hello"))
    assert "/srv" not in str(caught.value)
    assert engine.status.stage == "failed"
    assert last(engine.reply(chat, "hello")).finish_reason == "stop"
    assert engine.status.stage == "ready"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/srv/models/nano holds no config.json", "nano holds no config.json"),
        ('no file "/srv/a-b/c.d/x.json", sorry', 'no file "x.json", sorry'),
        ("see https://example.org/a/b or org/name", "see https://example.org/a/b or org/name"),
        (r"C:\Users\me\model is empty", "model is empty"),
        ("1/2 or 3 / 4", "1/2 or 3 / 4"),
    ],
)
def test_folders_of_the_server_are_left_out(text: str, shown: str) -> None:
    assert without_folders(text) == shown


def test_unknown_precision_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="float8"):
        Engine(precision="float8")


def test_metrics_default_to_nothing_measured() -> None:
    assert Metrics().ttft_ms is None
    assert Metrics().tok_per_sec is None


# A real model behind it


@pytest.fixture
def real(tiny_dir: Path) -> Engine:
    return Engine(str(tiny_dir), "cpu", "float32")


def test_real_model_is_described(tiny_dir: Path) -> None:
    backend = load_backend(str(tiny_dir), "cpu", "auto", lambda fraction, note: None)
    packed = load_backend(str(tiny_dir), "cpu", "int4", lambda fraction, note: None)
    assert (backend.model.scheme, packed.model.scheme) == (None, "int4")
    info = backend.info
    dtype = str(default_dtype(torch.device("cpu"))).removeprefix("torch.")
    assert (info.kind, info.device, info.dtype, info.precision) == ("linear", "cpu", dtype, dtype)
    assert (packed.info.dtype, packed.info.precision) == (dtype, "int4")
    assert info.state_bytes == backend.new_state().nbytes > 0


def test_real_state_has_seen_exactly_the_visible_conversation(
    tiny_dir: Path, real: Engine, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two turns, the first one stopped: the kept state equals one fresh pass over prompts and shown tokens."""
    tokens: list[int] = []
    push = StreamDecoder.push

    def recorded(self: StreamDecoder, token: int) -> str:
        tokens.append(token)
        if len(tokens) == 3:
            chat.stop()
        return push(self, token)

    monkeypatch.setattr(StreamDecoder, "push", recorded)
    chat = Chat()
    last(real.reply(chat, "What is it?", [picture], GREEDY))
    first_reply = list(tokens)
    last(real.reply(chat, "And now <|im_end|>?", settings=GREEDY))
    monkeypatch.undo()  # decoding a whole reply would be recorded too
    one, two = chat.turns
    assert one.finish_reason == "cancel"

    backend = MMMambaBackend(load_model(tiny_dir), "tiny")
    assert backend.tokenizer.decode(first_reply) == one.reply
    assert (len(first_reply), len(tokens)) == (one.metrics.num_tokens, one.metrics.num_tokens + two.metrics.num_tokens)
    tiles = backend.tile(Image.open(picture), None)
    ids = backend.encode(one.text, [len(tiles)], first=True, images_before=0) + first_reply
    ids += backend.encode(two.text, [], first=False, images_before=1) + tokens[len(first_reply) :]
    state = backend.model.new_state()
    with torch.inference_mode():
        backend.model(torch.tensor([ids]), tiles, state)

    kept = state_of(two)
    assert (kept.seqlen, kept.num_image_tokens) == (len(ids), state.num_image_tokens)
    assert two.metrics.text_tokens + two.metrics.image_tokens == len(ids)
    assert two.metrics.state_bytes == backend.info.state_bytes, "the memory of a linear model grew"
    for name, tensor in state.tensors().items():
        error = (tensor - kept.tensors()[name]).norm() / tensor.norm().clamp(min=1e-12)
        assert error < 1e-4, f"{name} differs from a fresh pass by {error:.2e}"


def test_real_answers_repeat_with_a_seed_and_after_retry(real: Engine) -> None:
    chat, settings = Chat(), Settings(temperature=1.0, seed=7, max_new_tokens=12)
    first = last(real.reply(chat, "Hello", settings=settings)).text
    assert first
    assert last(real.retry(chat, settings)).text == first
    assert last(real.retry(chat, Settings(temperature=1.0, seed=8, max_new_tokens=12))).text != first


# Branches: going back costs no reading, and gives what a fresh conversation with the same turns gives


def test_undo_and_going_on_makes_a_branch() -> None:
    engine, chat = engine_of(), Chat()
    for text in ("one", "two", "three"):
        last(engine.reply(chat, text))
    chat.go_back(1)
    assert last(engine.reply(chat, "other")).text == "turn 2 images 0: other"
    assert [turn.text for turn in chat.turns] == ["one", "other"]
    assert [[turn.text for turn in end.path] for end in chat.branches] == [["one", "two", "three"], ["one", "other"]]
    chat.go_to(0)
    assert last(engine.reply(chat, "four")).text == "turn 4 images 0: four"
    assert engine.models.get().read_again == [], "a state was there, and yet something was read again"


def test_any_turn_can_be_asked_in_other_words(picture: Path) -> None:
    engine, chat = engine_of(), Chat()
    last(engine.reply(chat, "one", [picture]))
    last(engine.reply(chat, "two"))
    reply = last(engine.retry(chat, index=0, text="uno"))
    assert reply.text == "turn 1 images 1: uno", "the picture stays with the question"
    assert [turn.text for turn in chat.turns] == ["uno"]
    assert len(chat.branches) == 2
    with pytest.raises(EngineError, match="it has 1 turns"):
        last(engine.retry(chat, index=1))
    assert last(engine.reply(chat, "new start", after=0)).text == "turn 1 images 0: new start"


def test_resuming_is_measured_and_said() -> None:
    engine, chat = engine_of(), Chat()
    for text in ("one", "two", "three"):
        last(engine.reply(chat, text))
    chat.go_back(2)
    started = time.monotonic()
    resumed = last(engine.reply(chat, "else")).metrics.resumed
    assert (resumed.turn, resumed.reread) == (2, 0)
    assert 0 < resumed.ms < 1e3 * (time.monotonic() - started), "resuming is a part of answering"


def test_a_state_that_is_gone_is_read_again_once() -> None:
    engine = engine_of(chats=ChatStore(states=StateStore(Budget(memory=0, disk=0))))
    chat = engine.chats.new(("tab", "a"))
    for text in ("one", "two"):
        last(engine.reply(chat, text))
    expected = state_of(chat.turns[1]).seen
    last(engine.reply(engine.chats.new(("tab", "b")), "pushes the others out"))
    reply = last(engine.reply(chat, "three"))
    assert reply.text == "turn 3 images 0: three"
    assert reply.metrics.resumed.reread == 2
    assert state_of(chat.turns[2]).seen[: len(expected)] == expected, "what was read again is not what was said"


def test_closing_a_tab_frees_everything_even_under_way() -> None:
    engine = engine_of(0.01)
    chat = engine.chats.new(("tab", "a"))
    last(engine.reply(chat, "one"))
    out: list[Any] = []
    thread = start(engine, chat, "[long]", out)
    wait_for(lambda: out and out[-1].text)
    engine.chats.drop(("tab", "a"))
    thread.join(HANGS_S)
    wait_for(lambda: engine.lane.idle)
    assert len(engine.chats.states) == 0
    assert engine.chats.states.used_bytes("memory") == 0
    assert chat.turns == []


def test_owner_of_many_messages_makes_nobody_wait_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    many, threads = Chat(), []
    with occupied() as (engine, _, _):
        for waiting, (chat, text) in enumerate([*((many, f"mine{i}") for i in range(4)), (Chat(), "yours")], 1):
            threads.append(start(engine, chat, text, []))
            wait_for(lambda waiting=waiting: len(engine.lane) == waiting)
        backend = engine.models.current
        answered, stream = [], backend.stream
        monkeypatch.setattr(backend, "stream", lambda ids, *args: (answered.append(ids[-1]), stream(ids, *args))[1])
    for thread in threads:
        thread.join(HANGS_S)
    assert answered == ["mine0", "yours", "mine1", "mine2", "mine3"]


def test_store_bounds_the_number_of_chats_but_keeps_those_at_work() -> None:
    store = ChatStore(max_chats=2)
    with store.new(("tab", "0")).running(threading.Event()):
        for i in (1, 2):
            store.new(("tab", str(i)))
        assert store.get(("tab", "0")) is not None
        assert store.get(("tab", "1")) is None
        assert len(store) == 2


def test_replaced_chat_is_stopped() -> None:
    store, cancel = ChatStore(), threading.Event()
    with store.new(("tab", "0")).running(cancel):
        store.new(("tab", "0"))
    assert cancel.is_set()


# Switching models


def need_of(needed: int, free: int) -> Any:
    return lambda model, device, dtype: MemoryNeed(needed, free)


def test_switch_keeps_conversations_and_comes_back_without_reading() -> None:
    engine, chat = engine_of(), Chat()
    last(engine.reply(chat, "one"))
    engine.models.switch("/srv/other", "float32")
    reply = last(engine.reply(chat, "two"))
    assert reply.text == "turn 2 images 0: two"
    assert reply.metrics.resumed.reread == 1, "another model has to read what this one has not"
    engine.models.switch("/srv/models/fake", "float32")
    chat.go_back(1)
    assert last(engine.reply(chat, "three")).metrics.resumed.reread == 0


def test_failed_switch_keeps_the_old_model() -> None:
    engine = engine_of(need=need_of(1, 2))
    last(engine.reply(Chat(), "one"))
    with pytest.raises(EngineError, match=r'"broken" could not be loaded: its file is cut short'):
        engine.models.switch("/srv/broken", "float32")
    assert engine.model == "/srv/models/fake"
    assert engine.status.stage == "ready"
    assert last(engine.reply(Chat(), "two")).text == "turn 1 images 0: two"


def test_what_does_not_fit_is_refused_with_both_numbers() -> None:
    engine = engine_of(need=need_of(8 << 30, 2 << 30))
    with pytest.raises(EngineError, match=r"needs 8\.0 GiB of memory, 2\.0 GiB are free: it does not fit"):
        last(engine.reply(Chat(), "one"))


# A real model behind branches


@pytest.mark.parametrize("fixture", ["tiny_dir", "tiny_teacher_dir"])
def test_a_branch_equals_a_fresh_conversation(fixture: str, request: pytest.FixtureRequest, picture: Path) -> None:
    """Ask, ask, go back, ask otherwise, return to the first branch: states and answers equal those of conversations
    that never branched, and of one that was read again from its words."""
    directory = request.getfixturevalue(fixture)
    engine = Engine(str(directory), "cpu", "float32")

    def talk(chat: Chat, *texts: str) -> Reply:
        return [last(engine.reply(chat, text, [picture] if text == "A" else [], GREEDY)) for text in texts][-1]

    chat = Chat(engine.chats.states)
    talk(chat, "A", "B", "C")
    chat.go_back(1)
    branch = talk(chat, "D")
    straight = Chat(engine.chats.states)
    assert talk(straight, "A", "D").text == branch.text
    same_states(chat.head, straight.head)
    chat.go_to(0)
    again = talk(chat, "E")
    straight = Chat(engine.chats.states)
    assert talk(straight, "A", "B", "C", "E").text == again.text
    same_states(chat.head, straight.head)
    assert again.metrics.resumed.reread == 0


def same_states(one: Turn | None, other: Turn | None) -> None:
    assert one is not None
    assert other is not None
    mine, theirs = (state_of(turn).fork().tensors() for turn in (one, other))
    for name, tensor in mine.items():
        assert torch.allclose(tensor, theirs[name], atol=1e-5), f"{name} differs"


@pytest.mark.parametrize("fixture", ["tiny_dir", "tiny_teacher_dir"])
def test_interleaved_sessions_equal_each_alone(fixture: str, request: pytest.FixtureRequest) -> None:
    directory = request.getfixturevalue(fixture)
    prompts = [["Hi", "What?", "Why?"], ["Lo", "Where?", "Who?"]]

    def talk(engine: Engine, chats: list[Chat]) -> list[list[str]]:
        answers: list[list[str]] = [[] for _ in chats]
        for i in range(3):
            threads = [
                threading.Thread(
                    target=lambda n=n, i=i: answers[n].append(
                        last(engine.reply(chats[n], prompts[n][i], settings=GREEDY)).text
                    )
                )
                for n in range(len(chats))
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(HANGS_S)
        return answers

    together = talk(Engine(str(directory), "cpu", "float32"), [Chat(), Chat()])
    for n in (0, 1):
        engine, chat = Engine(str(directory), "cpu", "float32"), Chat()
        alone = [last(engine.reply(chat, text, settings=GREEDY)).text for text in prompts[n]]
        assert together[n] == alone
