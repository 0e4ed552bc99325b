"""/compare, /benchmark and /info through `gradio_client`, over fake models; /chat is tested in test_app."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import gradio as gr
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from app.endpoints import SETTINGS, Endpoints
from app.engine import Engine, Limits, Reply, Settings
from app.grow import CONTEXTS, Growth
from app.sides import sides_of
from app.ui import EXAMPLES_DIR, PageOptions, build, launch_options
from mmmamba.sweep import Point, to_csv
from tests.fakes import STATE_BYTES, FakeLoader

LIMITS = Limits(max_text_chars=200, max_images=2, max_tiles=4, max_new_tokens=64, max_context=16_384, max_minutes=2)
PYRAMID = str(EXAMPLES_DIR / "pyramid.jpg")


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine("fake", loader=FakeLoader(0.03), limits=LIMITS)


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[Client]:
    patch = pytest.MonkeyPatch()
    patch.setattr("app.grow.measured_machine", lambda device: {"bandwidth": 1e10, "free_bytes": 1 << 30})
    blocks: gr.Blocks = build(engine, PageOptions(teacher="fake-teacher"))
    blocks.launch(prevent_thread_lock=True, quiet=True, **launch_options(engine))
    yield Client(blocks.local_url, download_files=False, verbose=False)
    blocks.close(verbose=False)
    patch.undo()


def call(client: Client, endpoint: str, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
    job = client.submit(*args, api_name=endpoint, **kwargs)
    updates = list(job)
    job.result()  # a failed stream only looks finished; this raises
    return updates


def message(text: str, *files: str) -> dict[str, Any]:
    return {"text": text, "files": [handle_file(file) for file in files]}


def test_only_these_are_public_with_named_parameters(client: Client) -> None:
    api = client.view_api(return_format="dict", print_info=False)
    assert list(api["named_endpoints"]) == ["/chat", "/compare", "/benchmark", "/info"]
    assert not api["unnamed_endpoints"]
    names = {
        endpoint: [p["parameter_name"] for p in about["parameters"]]
        for endpoint, about in api["named_endpoints"].items()
    }
    sampling = ["temperature", "top_p", "max_new_tokens", "max_tiles", "greedy", "seed", "top_k", "min_p"]
    assert names["/chat"] == ["message", "session_id", *sampling, "repetition_penalty", "system"]
    assert names["/compare"] == [*names["/chat"], "models"]
    assert names["/benchmark"] == ["longest", "minutes", "image", "models"]
    assert names["/info"] == []
    for about in api["named_endpoints"].values():
        assert all(p["parameter_has_default"] for p in about["parameters"][1:])


def test_every_setting_reaches_the_model(client: Client) -> None:
    final = call(client, "/chat", message("x"), system="Be brief", temperature=1.5, repetition_penalty=1.2, top_k=5)[-1]
    assert final["text"].endswith("(hot)")
    first = call(client, "/chat", message("one"))[-1]
    with pytest.raises(AppError, match="system opens a new conversation"):
        call(client, "/chat", message("two"), first["session_id"], system="Be long")
    with pytest.raises(AppError, match="top_k is -1"):
        call(client, "/chat", message("x"), top_k=-1)


# /compare


def test_compare_streams_both_answers_with_their_figures(client: Client) -> None:
    updates = call(client, "/compare", message("what is this", PYRAMID))
    assert len(updates) > 2
    assert all(not update["done"] for update in updates[:-1])
    final = updates[-1]
    assert final["done"]
    assert [side["text"] for side in final["sides"]] == ["turn 1 images 1: what is this"] * 2
    assert [side["model"] for side in final["sides"]] == ["fake", "fake-teacher"]
    assert [side["kind"] for side in final["sides"]] == ["linear", "teacher"]
    student, teacher = (side["figures"] for side in final["sides"])
    assert student["recurrent_bytes"] == STATE_BYTES
    assert student["cache_bytes"] == 0 < teacher["cache_bytes"]
    assert student["context"] == student["text_tokens"] + student["image_tokens"]
    assert student["ms_per_token"] > 0
    assert final["agreement"]["share"] == 1


def test_models_can_be_chosen(engine: Engine) -> None:
    blocks = build(engine, PageOptions(teacher="fake-hybrid,fake-teacher"))
    blocks.launch(prevent_thread_lock=True, quiet=True, **launch_options(engine))
    try:
        three = Client(blocks.local_url, download_files=False, verbose=False)
        final = call(three, "/compare", message("one"))[-1]
        assert [side["kind"] for side in final["sides"]] == ["linear", "hybrid", "teacher"]
        assert {name: says["share"] for name, says in final["agreements"].items()} == {"fake": 1, "fake-hybrid": 1}
        two = call(three, "/compare", message("one"), models=["fake-teacher", "fake-hybrid"])[-1]
        assert [side["model"] for side in two["sides"]] == ["fake-hybrid", "fake-teacher"]
        again = call(three, "/compare", message("two"), two["session_id"], models=["fake-hybrid", "fake-teacher"])[-1]
        assert again["sides"][0]["text"] == "turn 2 images 0: two"
        assert len(call(three, "/compare", message("two"), final["session_id"])[-1]["sides"]) == 3
        for session, models, says in (
            (two["session_id"], ["fake", "fake-teacher"], "models that it began with"),
            ("", ["fake"], "name two or more"),
            ("", ["fake", "other"], "other"),
        ):
            with pytest.raises(AppError, match=says):
                call(three, "/compare", message("x"), session, models=models)
    finally:
        blocks.close(verbose=False)


def test_compare_goes_on_from_both_states(client: Client) -> None:
    first = call(client, "/compare", message("one"))[-1]
    second = call(client, "/compare", message("two"), first["session_id"])[-1]
    assert second["session_id"] == first["session_id"]
    for before, after in zip(first["sides"], second["sides"], strict=True):
        assert after["text"] == "turn 2 images 0: two"
        assert after["figures"]["text_tokens"] > before["figures"]["text_tokens"]
    with pytest.raises(AppError, match="session_id is not known"):
        call(client, "/compare", message("x"), "made up")


@pytest.mark.parametrize(
    ("text", "num_files", "options", "says"),
    [
        (" ", 0, {}, "empty"),
        ("x" * 201, 0, {}, "201 characters; 200 fit"),
        ("x", 3, {}, "3 images; 2 fit"),
        ("x", 0, {"max_new_tokens": 65}, "65"),
    ],
)
def test_limits_hold_for_comparisons(
    client: Client, text: str, num_files: int, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(AppError, match=says):
        call(client, "/compare", message(text, *[PYRAMID] * num_files), **options)


def test_a_cancelled_comparison_leaves_the_lane(client: Client, engine: Engine) -> None:
    job = client.submit(message("[long]"), api_name="/compare")
    for update in job:
        if len(update["sides"][0]["text"].split()) > 3:
            job.cancel()
            break
    assert call(client, "/chat", message("mine"))[-1]["text"] == "turn 1 images 0: mine"


def test_without_a_teacher_there_is_nothing_to_compare() -> None:
    engine = Engine("fake", loader=FakeLoader())
    blocks = build(engine, PageOptions(teacher=""))
    blocks.launch(prevent_thread_lock=True, quiet=True, **launch_options(engine))
    try:
        alone = Client(blocks.local_url, download_files=False, verbose=False)
        with pytest.raises(AppError, match="compares with no teacher"):
            call(alone, "/compare", message("x"))
    finally:
        blocks.close(verbose=False)


# /benchmark


def test_benchmark_streams_points_over_predictions(client: Client) -> None:
    updates = call(client, "/benchmark", 4096, 1)
    final = updates[-1]
    assert final["done"]
    assert {(p["model"], p["context"]) for p in final["points"]} == {
        (name, context) for name in ("fake", "fake-teacher") for context in CONTEXTS[:2]
    }
    assert len({len(update["points"]) for update in updates}) > 2, "the points came all at once"
    prediction = final["predictions"]["fake-teacher"]
    assert prediction["contexts"] == [1024, 4096]
    assert prediction["bytes"][0] < prediction["bytes"][1]
    rows = list(csv.DictReader(io.StringIO(to_csv([Point(**point) for point in final["points"]]))))
    assert [int(row["context"]) for row in rows] == [p["context"] for p in final["points"]]


@pytest.mark.parametrize(
    ("longest", "minutes", "says"),
    [(100, 1, "1,024 to 16,384"), (65_536, 1, "1,024 to 16,384"), (4096, 3, "up to 2"), (4096, 0, "more than 0")],
)
def test_limits_hold_for_benchmarks(client: Client, longest: int, minutes: float, says: str) -> None:
    with pytest.raises(AppError, match=says):
        call(client, "/benchmark", longest, minutes)


def test_scripts_hear_news_not_the_same_again(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine repeats itself every 80 ms, for pages that may have been closed."""

    def twenty_times(*states: Any) -> Callable[..., Iterator[Any]]:
        return lambda *args: (state for state in states for _ in range(20))

    monkeypatch.setattr("app.grow.Grow.run", twenty_times(Growth(doing="reading"), Growth(doing="done", done=True)))
    replies = Reply(stage="reading"), Reply("Two", "writing"), Reply("Two.", "done", finish_reason="stop")
    monkeypatch.setattr(engine, "reply", twenty_times(*replies))
    endpoints = Endpoints(engine, sides_of("fake", "fake-teacher"))
    asked = {"text": "How many?", "files": []}
    options = [getattr(Settings(), name) for name in SETTINGS]
    assert [update["doing"] for update in endpoints.benchmark(1024, 1)] == ["reading", "done"]
    assert [update["text"] for update in endpoints.chat(asked, "", *options)] == ["", "Two", "Two."]
    monkeypatch.setattr("app.endpoints.REPEAT_S", 0.0)
    assert len(list(endpoints.benchmark(1024, 1))) == 40, "one that has left while nothing happens must be noticed"


@pytest.mark.parametrize("value", ["far", None])
def test_a_benchmark_wants_numbers(client: Client, value: Any) -> None:
    with pytest.raises(AppError, match="use numbers"):
        call(client, "/benchmark", value, 1)


# Messages


@pytest.mark.parametrize("endpoint", ["/chat", "/compare"])
@pytest.mark.parametrize(
    ("sent", "says"),
    [
        (5, 'message is 5; use {"text"'),
        ({"text": ["a"], "files": []}, "message is "),
        ({"text": "a", "files": "x.png"}, "handle_file"),
        ({"text": "a", "files": ["x.png"]}, "handle_file"),
    ],
)
def test_what_is_no_message_is_told(client: Client, endpoint: str, sent: Any, says: str) -> None:
    with pytest.raises(AppError, match=re.escape(says)):
        call(client, endpoint, sent)


def test_a_text_alone_is_a_message(client: Client) -> None:
    assert call(client, "/chat", "hello")[-1]["text"] == "turn 1 images 0: hello"
    assert call(client, "/chat", {"text": "hello"})[-1]["text"] == "turn 1 images 0: hello"


# /info


def test_info_tells_model_and_limits(client: Client) -> None:
    call(client, "/chat", message("x"))
    info = client.predict(api_name="/info")
    assert (info["model"], info["kind"], info["device"], info["precision"]) == ("fake", "linear", "cpu", "float32")
    assert info["compared"] == ["fake", "fake-teacher"]
    assert info["limits"] == asdict(LIMITS)
    assert info["contexts"] == [1024, 4096, 16_384]
    assert info["status"]["stage"] == "ready"
    assert (info["waiting"], info["max_waiting"]) == (0, 16)
