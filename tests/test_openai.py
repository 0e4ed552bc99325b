"""OpenAI's routes, called with the `openai` package; over a fake model, and a tiny real one for state and usage."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from openai import OpenAI
from PIL import Image

from app.engine import Engine, EngineError, Limits
from app.openai_request import read_request
from app.ui import PageOptions, build, launch_options
from tests.fakes import FakeLoader
from tests.test_lane import wait_for

LIMITS = Limits(max_text_chars=200, max_images=2, max_tiles=4, max_new_tokens=64)
USER = [{"role": "user", "content": "what is this"}]


def serve(engine: Engine, **options: Any) -> Iterator[str]:
    blocks = build(engine, PageOptions(teacher=""))
    blocks.launch(prevent_thread_lock=True, quiet=True, **launch_options(engine, **options))
    yield f"{blocks.local_url}v1"
    blocks.close(verbose=False)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine("/srv/models/fake", loader=FakeLoader(0.01), limits=LIMITS)


@pytest.fixture(scope="module")
def url(engine: Engine) -> Iterator[str]:
    yield from serve(engine)


@pytest.fixture(scope="module")
def client(url: str) -> OpenAI:
    return OpenAI(base_url=url, api_key="none", max_retries=0)


def picture(colour: str = "red", side: int = 40) -> dict[str, Any]:
    out = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(out, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def asked(text: str, *pictures: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": [*pictures, {"type": "text", "text": text}]}


def said(reply: str) -> dict[str, Any]:
    return {"role": "assistant", "content": reply}


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["fake"], "no folder of the server is told"
    assert client.models.retrieve("fake").owned_by == "mmmamba"
    with pytest.raises(openai.NotFoundError, match="this server has"):
        client.models.retrieve("gpt-5")


def test_answer_in_one_piece(client: OpenAI) -> None:
    done = client.chat.completions.create(model="fake", messages=[asked("what is this", picture(), picture("blue"))])
    (choice,) = done.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == "turn 1 images 2: what is this"
    assert choice.finish_reason == "stop"
    usage = done.usage
    assert usage is not None
    assert usage.completion_tokens == 7
    assert usage.prompt_tokens + usage.completion_tokens == usage.total_tokens
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.image_tokens == 2 * 64  # type: ignore[attr-defined]


def test_answer_streams(client: OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(model="fake", messages=USER, stream=True, stream_options={"include_usage": True})
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == "turn 1 images 0: what is this"
    assert len([text for text in texts if text]) > 1, "the answer came in one piece"
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons == [None] * (len(reasons) - 1) + ["stop"]
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 7
    assert len({chunk.id for chunk in chunks}) == 1


def test_conversation_is_found_again_by_what_was_said(client: OpenAI, engine: Engine) -> None:
    """Only the new message is read; a client that changes the past has the rest read again."""
    backend = engine.models.get()
    messages: list[Any] = [{"role": "system", "content": "Be brief"}, asked("one", picture("green"))]
    first = client.chat.completions.create(model="fake", messages=messages)
    before = len(backend.read_again)
    messages += [said(first.choices[0].message.content or ""), asked("two")]
    second = client.chat.completions.create(model="fake", messages=messages)
    assert second.choices[0].message.content == "turn 2 images 0: two"
    assert second.usage.prompt_tokens_details.cached_tokens == first.usage.total_tokens
    again = client.chat.completions.create(model="fake", messages=messages)
    assert again.choices[0].message.content == "turn 2 images 0: two", "the same question once more is a branch"
    assert again.usage.prompt_tokens == second.usage.prompt_tokens
    assert len(backend.read_again) == before, "something was read though its state was there"
    changed = [*messages[:2], said("something else"), messages[3]]
    third = client.chat.completions.create(model="fake", messages=changed)
    assert third.choices[0].message.content == "turn 2 images 0: two"
    assert third.usage.prompt_tokens_details.cached_tokens == 0
    assert len(backend.read_again) == before + 1
    state = engine.models.get().read_again[-1]
    assert "<Be brief>" in state
    assert state.endswith("something else")


def test_settings_reach_the_model(client: OpenAI) -> None:
    def ask(**options: Any) -> Any:
        return client.chat.completions.create(model="fake", **({"messages": USER} | options)).choices[0]

    assert ask(temperature=1.5).message.content.endswith("(hot)")
    long = [{"role": "user", "content": "[long]"}]
    assert ask(messages=long, max_tokens=3).finish_reason == "length"
    assert ask(messages=long, max_completion_tokens=3).message.content == "word0 word1 word2"
    stopped = ask(messages=long, stop=["word4"], seed=3, top_p=0.5, n=1, user="me")
    assert (stopped.message.content, stopped.finish_reason) == ("word0 word1 word2 word3", "stop")
    assert ask(extra_body={"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1}).finish_reason == "stop"


def test_a_stop_text_is_not_left_in_the_state(client: OpenAI, engine: Engine) -> None:
    first = client.chat.completions.create(model="fake", messages=[asked("[long]")], stop="word2")
    answer = first.choices[0].message.content or ""
    messages = [asked("[long]"), said(answer), asked("two")]
    second = client.chat.completions.create(model="fake", messages=messages)
    assert second.choices[0].message.content == "turn 2 images 0: two"
    assert engine.models.get().read_again[-1].endswith("word0 word1"), "the turn has to be read as it was shown"


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"messages": []}, "messages", "empty"),
        ({"messages": [said("hello")]}, "messages.0", "without a question"),
        ({"messages": [*USER, said("a")]}, "messages", "last message must be the user's"),
        ({"messages": [*USER, {"role": "system", "content": "x"}]}, "messages.1", "only stand first"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0", "'tool'"),
        ({"messages": [{"role": "user", "content": "x" * 201}]}, "messages", "201 characters; 200 fit"),
        ({"messages": [{"role": "user", "content": "  "}]}, "messages", "empty"),
        ({"messages": [asked("x", *[picture()] * 3)]}, "messages.0", "more than 2 images"),
        (
            {"messages": [asked("x", {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}})]},
            "messages.0.content.0",
            "fetches nothing",
        ),
        (
            {"messages": [asked("x", {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}})]},
            "messages.0.content.0",
            "cannot be read as an image",
        ),
        ({"messages": [asked("x", {"type": "input_audio"})]}, "messages.0.content.0", "input_audio"),
        ({"n": 2}, "n", "n is 2"),
        ({"max_tokens": 65}, "max_tokens", "allows up to 64"),
        ({"temperature": 3}, "temperature", "temperature is 3"),
        ({"top_p": 0}, "top_p", "top_p is 0"),
        ({"seed": -1}, "seed", "seed is -1"),
        ({"stop": ["a"] * 5}, "stop", "up to 4"),
        ({"stop": ""}, "stop", "1 to 100"),
        ({"stop": {"a": 1}}, "stop", "use a text or a list"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "0.5"),
        ({"tools": [{"type": "function"}]}, "tools", "tools is"),
        ({"response_format": {"type": "json_object"}}, "response_format", "json_object"),
        ({"stream": "yes"}, "stream", "use true or false"),
        ({"stream_options": {"speed": 1}}, "stream_options", "include_usage"),
        ({"colour": "red"}, "colour", "no parameter"),
        ({"model": None}, "model", "model is missing"),
    ],
)
def test_what_cannot_be_answered_is_named(change: dict[str, Any], param: str, says: str) -> None:
    with pytest.raises(EngineError, match=says) as caught:
        read_request({"model": "fake", "messages": USER} | change, LIMITS)
    assert caught.value.param == param  # type: ignore[attr-defined]


def test_neighbours_of_one_role_are_put_together() -> None:
    request = read_request(
        {
            "model": "fake",
            "messages": [
                {"role": "developer", "content": "a"},
                {"role": "system", "content": [{"type": "text", "text": "b"}]},
                asked("one", picture()),
                {"role": "user", "content": "two"},
                said("x"),
                said("y"),
                asked("three"),
            ],
        },
        LIMITS,
    )
    assert request.system == "a\n\nb"
    (turn,) = request.turns
    assert (turn.text, len(turn.images), turn.reply) == ("one\n\ntwo", 1, "x\n\ny")
    assert request.question.text == "three"


def test_a_picture_of_low_detail_is_one_tile() -> None:
    low = picture()
    low["image_url"]["detail"] = "low"
    request = read_request({"model": "m", "messages": [asked("one", low), said("x"), asked("two", picture())]}, LIMITS)
    assert (request.turns[0].max_tiles, request.settings.max_tiles) == (1, 0)


def test_errors_are_openais(client: OpenAI, url: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="fake", messages=USER, n=3)
    assert (caught.value.param, caught.value.type) == ("n", "invalid_request_error")
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-5", messages=USER)
    assert missing.value.code == "model_not_found"
    boom = [{"role": "user", "content": "[boom]"}]
    with pytest.raises(openai.InternalServerError, match="went wrong inside the model") as fault:
        client.chat.completions.create(model="fake", messages=boom)
    assert "/srv" not in str(fault.value)
    with pytest.raises(openai.APIError, match="went wrong inside the model"):
        list(client.chat.completions.create(model="fake", messages=boom, stream=True))
    for content, kind in ((b"{", "application/json"), (b"{}", "text/plain"), (b"[]", "application/json")):
        reply = httpx.post(f"{url}/chat/completions", content=content, headers={"Content-Type": kind})
        assert reply.status_code == 400
        assert reply.json()["error"]["type"] == "invalid_request_error"


def test_a_full_queue_is_429() -> None:
    engine = Engine("fake", loader=FakeLoader(0.02), limits=LIMITS, max_waiting=1)
    served = serve(engine)
    client = OpenAI(base_url=next(served), api_key="none", max_retries=0)
    long = [{"role": "user", "content": "[long]"}]
    gate = threading.Event()
    engine.submit(lambda: gate.wait(60) and None)
    wait_for(lambda: len(engine.lane) == 0)
    engine.submit(lambda: None)
    try:
        with pytest.raises(openai.RateLimitError, match="1 messages wait"):
            client.chat.completions.create(model="fake", messages=long)
        with pytest.raises(openai.RateLimitError, match="1 messages wait"):
            client.chat.completions.create(model="fake", messages=long, stream=True)
    finally:
        gate.set()
        next(served, None)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_answer(
    url: str, engine: Engine, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    backend = engine.models.get()
    reasons: list[Any] = []
    answer = backend.stream

    def watched(*args: Any) -> Iterator[Any]:
        for event in answer(*args):
            time.sleep(0.2)
            reasons.append(event.finish_reason)
            yield event

    monkeypatch.setattr(backend, "stream", watched)
    known = len(engine.chats.states)
    body = {"model": "fake", "messages": [{"role": "user", "content": "[long]"}], "stream": stream}
    connection = HTTPConnection(urlsplit(url).netloc)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    wait_for(lambda: len(reasons) > 1)
    connection.close()
    wait_for(lambda: engine.lane.idle)
    assert reasons[-1] == "cancel"
    wait_for(lambda: len(engine.chats.states) == known)  # nothing is kept that nobody could ask for


def test_a_key_is_asked_for_where_there_is_one() -> None:
    served = serve(Engine("fake", loader=FakeLoader(), limits=LIMITS), keys=("me:secret",))
    url = next(served)
    try:
        with pytest.raises(openai.AuthenticationError):
            OpenAI(base_url=url, api_key="wrong", max_retries=0).models.list()
        known = OpenAI(base_url=url, api_key="me:secret", max_retries=0)
        assert known.chat.completions.create(model="fake", messages=USER).choices[0].message.content
    finally:
        next(served, None)


def test_page_and_routes_share_the_lane(client: OpenAI, engine: Engine) -> None:
    """Two at once never mix, and both finish."""
    answers: dict[str, str] = {}

    def ask(name: str) -> None:
        done = client.chat.completions.create(model="fake", messages=[asked(name)])
        answers[name] = done.choices[0].message.content or ""

    threads = [threading.Thread(target=ask, args=(f"mine{i}",)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert answers == {f"mine{i}": f"turn 1 images 0: mine{i}" for i in range(6)}


def test_a_real_model_goes_on_as_if_it_had_read_everything(tiny_dir: Any) -> None:
    """The second answer from the kept state equals that of a server that has to read the conversation."""
    answers, counts = [], []
    history: list[Any] = []
    for keep in (True, False):
        engine = Engine(str(tiny_dir), "cpu", "float32")
        served = serve(engine)
        client = OpenAI(base_url=next(served), api_key="none", max_retries=0)
        options: dict[str, Any] = {"model": tiny_dir.name, "temperature": 0, "max_tokens": 8}
        if keep:
            history = [asked("Hi", picture())]
            first = client.chat.completions.create(messages=history, **options)
            history += [said(first.choices[0].message.content or ""), asked("And?")]
        second = client.chat.completions.create(messages=history, **options)
        answers.append(second.choices[0].message.content)
        counts.append(second.usage.prompt_tokens_details.cached_tokens)
        next(served, None)
    assert answers[0] == answers[1]
    assert counts[0] > 0 == counts[1]
