"""The app as Spaces start it: CPU, GPU and ZeroGPU hardware, simulated by their environment and what is installed."""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import pytest
import torch
from gradio.context import LocalContext
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from app.chat import Chat
from app.engine import Engine, EngineError, Settings
from app.ui import EXAMPLES_DIR
from mmmamba.generate import decode_one_token
from tests.pages import app_process

ROOT = Path(__file__).parents[1]
FAKE_SPACES = Path(__file__).with_name("fake_spaces")
PYRAMID = EXAMPLES_DIR / "pyramid.jpg"
GREEDY = Settings(greedy=True, max_new_tokens=12)


@contextmanager
def space(model: Path, **env: str) -> Iterator[str]:
    """app.py without a flag, in the environment that a Space sets; ends it and looks at what it wrote."""
    spaces = {
        "SYSTEM": "spaces",
        "SPACE_ID": "someone/mmMamba",
        "SPACE_HOST": "someone-mmmamba.hf.space",
        "GRADIO_SERVER_NAME": "0.0.0.0",
        "GRADIO_SSR_MODE": "true",
        "MMMAMBA_MODEL": str(model),
        "MMMAMBA_DTYPE": "float32",
        "PYTHONPATH": str(FAKE_SPACES),
    }
    with app_process(**(spaces | env)) as page:
        yield page.url


def ask(client: Client, text: str, *files: Path, **options: Any) -> dict[str, Any]:
    message = {"text": text, "files": [handle_file(str(file)) for file in files]}
    return client.predict(message, api_name="/chat", greedy=True, max_new_tokens=12, **options)


def talk(url: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two turns in one session."""
    client = Client(url, download_files=False, verbose=False)
    first = ask(client, "What is it?", PYRAMID)
    return first, ask(client, "And now?", session_id=first["session_id"])


@pytest.fixture(scope="module")
def expected(tiny_dir: Path) -> list[str]:
    """What the same two turns give without any Space."""
    engine, chat = Engine(str(tiny_dir), "cpu", "float32"), Chat()
    asked = (("What is it?", [PYRAMID]), ("And now?", []))
    return [list(engine.reply(chat, text, images, GREEDY))[-1].text for text, images in asked]


def test_cpu_space(tiny_dir: Path, expected: list[str]) -> None:
    with space(tiny_dir, MMMAMBA_NO_TEACHER="1") as url:
        first, second = talk(url)
        assert [first["text"], second["text"]] == expected
        assert second["metrics"]["resumed"]["reread"] == 0
        assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == tiny_dir.name
        info = Client(url, download_files=False, verbose=False).predict(api_name="/info")
        assert (info["device"], info["compared"]) == ("cpu", [tiny_dir.name])
        page = str(httpx.get(f"{url}/config").json())
        assert "switch-load" not in page, "visitors of a Space must not load models for everybody"


@pytest.mark.parametrize(
    ("device", "says"),
    [
        ("cuda:9", rf'the device is "cuda:9", and torch sees {torch.cuda.device_count()} CUDA devices here'),
        ("tpu9", 'the device "tpu9" is not known'),
    ],
)
def test_missing_hardware_is_told_by_the_first_question(tiny_dir: Path, device: str, says: str) -> None:
    """A Space that was downgraded: the page opens all the same."""
    engine = Engine(str(tiny_dir), device)
    with pytest.raises(EngineError, match=says) as caught:
        last(engine.reply(Chat(), "Hi"))
    assert caught.value.blame == "server"
    assert engine.status.stage == "failed"


@pytest.mark.cuda
def test_gpu_space(tiny_dir: Path) -> None:
    with space(tiny_dir) as url:
        first, second = talk(url)
        assert first["text"]
        assert second["metrics"]["resumed"]["reread"] == 0
        assert Client(url, download_files=False, verbose=False).predict(api_name="/info")["device"].startswith("cuda")


def test_zero_gpu_space(tiny_dir: Path, tiny_teacher_dir: Path, expected: list[str]) -> None:
    """Answers come from forked workers, and the conversation goes on from the state that came back."""
    zero = {"SPACES_ZERO_GPU": "true", "MMMAMBA_TEACHER": str(tiny_teacher_dir)}
    with space(tiny_dir, **zero) as url:
        first, second = talk(url)
        assert [first["text"], second["text"]] == expected
        assert second["metrics"]["resumed"] | {"ms": 0} == {"turn": 1, "ms": 0, "reread": 0}
        assert second["metrics"]["text_tokens"] > first["metrics"]["text_tokens"]
        client = Client(url, download_files=False, verbose=False)
        info = client.predict(api_name="/info")
        assert (info["device"], info["status"]["stage"]) == ("ZeroGPU", "ready")
        message = {"text": "Hi", "files": []}
        sides = client.predict(message, api_name="/compare", greedy=True, max_new_tokens=4)["sides"]
        assert [side["stage"] for side in sides] == ["done", "done"]
        assert sides[0]["figures"]["cache_bytes"] == 0 < sides[1]["figures"]["cache_bytes"]
        with pytest.raises(AppError, match="needs a GPU of its own"):
            client.predict(1024, 1, api_name="/benchmark")
        asked = {"model": tiny_dir.name, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
        assert httpx.post(f"{url}/v1/chat/completions", json=asked, timeout=60).json()["choices"][0]["message"]


# The backend alone


@pytest.fixture
def zero(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from app.zero import ZeroGPU

    monkeypatch.syspath_prepend(str(FAKE_SPACES))
    token = LocalContext.request.set(gr.Request())
    monkeypatch.setenv("MMMAMBA_DECODER", "auto")  # what a worker sets ends with it, but here it is this process
    yield ZeroGPU()
    LocalContext.request.reset(token)
    sys.modules.pop("spaces", None)


def last(replies: Any) -> Any:
    return list(replies)[-1]


@pytest.mark.parametrize("fixture", ["tiny_dir", "tiny_teacher_dir"])
def test_states_that_travel_equal_those_that_stay(zero: Any, fixture: str, request: pytest.FixtureRequest) -> None:
    directory = str(request.getfixturevalue(fixture))
    kept = []
    for engine in (Engine(directory, "cpu", "float32", loader=zero.load), Engine(directory, "cpu", "float32")):
        chat = Chat(engine.chats.states)
        texts = [last(engine.reply(chat, text, settings=GREEDY)).text for text in ("Hi", "And?")]
        chat.go_back(1)
        texts.append(last(engine.reply(chat, "Else?", settings=GREEDY)).text)
        (snapshot,) = chat.turns[-1].snapshots.values()
        kept.append((texts, snapshot.state.fork().tensors()))
    assert kept[0][0] == kept[1][0]
    for name, tensor in kept[0][1].items():
        assert torch.allclose(tensor, kept[1][1][name], atol=1e-5), name
        assert not tensor.is_shared(), f"{name} holds on to memory of the worker"


def test_a_state_that_was_let_go_is_read_again_by_a_worker(zero: Any, tiny_dir: Path) -> None:
    engine = Engine(str(tiny_dir), "cpu", "float32", loader=zero.load)
    chat = Chat(engine.chats.states)
    first = last(engine.reply(chat, "Hi", settings=GREEDY))
    (kept,) = chat.turns[0].snapshots.values()
    engine.chats.states.release(kept)
    second = last(engine.reply(chat, "And?", settings=GREEDY))
    assert second.metrics.resumed.reread == 1
    other = Chat()
    plain = Engine(str(tiny_dir), "cpu", "float32")
    assert [last(plain.reply(other, text, settings=GREEDY)).text for text in ("Hi", "And?")] == [
        first.text,
        second.text,
    ]


def test_a_stop_reaches_the_worker_and_the_state_comes_back(
    zero: Any, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = lambda *args: (time.sleep(0.05), decode_one_token(*args))[1]  # noqa: E731 (forked along with the rest)
    monkeypatch.setattr("mmmamba.generate.decode_one_token", slow)
    engine = Engine(str(tiny_dir), "cpu", "float32", loader=zero.load)
    chat = Chat(engine.chats.states)
    cancel = threading.Event()
    shown: set[tuple[int, int]] = set()
    for reply in engine.reply(chat, "Hi", settings=Settings(temperature=2, seed=1, max_new_tokens=1000), cancel=cancel):
        if reply.stage == "writing":
            shown.add((reply.metrics.num_tokens, reply.metrics.text_tokens))
        if reply.metrics.num_tokens >= 3:
            cancel.set()
    deadline = time.monotonic() + 20
    while not engine.lane.idle:
        assert time.monotonic() < deadline, "the worker goes on"
        time.sleep(0.01)
    (turn,) = chat.turns
    assert turn.finish_reason == "cancel"
    assert 3 <= turn.metrics.num_tokens < 200
    (kept,) = turn.snapshots.values()
    prompt = engine.models.get().encode("Hi", [], first=True, images_before=0)
    assert kept.state.seqlen == len(prompt) + turn.metrics.num_tokens == turn.metrics.text_tokens
    assert shown
    assert all(seen == len(prompt) + count - 1 for count, seen in shown), "the context does not move while it streams"


def test_no_gpu_left_is_told_in_words(zero: Any, tiny_dir: Path) -> None:
    sys.modules["spaces"].used.value = 1000
    engine = Engine(str(tiny_dir), "cpu", "float32", loader=zero.load)
    with pytest.raises(EngineError, match=r"^You have exceeded your GPU quota \(60s requested\)\.$") as caught:
        last(engine.reply(Chat(), "Hi"))
    assert caught.value.blame == "busy"


# The README's front matter


def test_front_matter_is_what_spaces_take() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("---")[1]
    values = dict(re.findall(r"^(\w+): (.+)$", text, re.MULTILINE))
    assert (values["sdk"], values["app_file"]) == ("gradio", "app.py")
    assert len(values["short_description"]) <= 60
    assert {values["colorFrom"], values["colorTo"]} <= {
        "red",
        "yellow",
        "green",
        "blue",
        "indigo",
        "purple",
        "pink",
        "gray",
    }
    hardware = ("cpu-basic", "cpu-upgrade", "zero-a10g", "t4-small", "l4x1", "a10g-small", "a100-large")
    assert values["suggested_hardware"] in hardware
    assert re.fullmatch(r'"3\.\d+"', values["python_version"]), "unquoted, 3.10 would become 3.1"
