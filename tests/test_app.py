"""The page's server: what it offers to scripts through `gradio_client`, what it keeps private, and what it shows."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError, AuthenticationError

from app import precision, views
from app.backend import ModelInfo
from app.chat import Chat, Metrics, Resumed
from app.engine import Engine, EngineError, Limits, LoadStatus, Reply, Settings
from app.handlers import turn_index
from app.likes import Likes
from app.options import Options
from app.ui import EXAMPLES, EXAMPLES_DIR, PageOptions, build, launch_options
from quantize import SCHEMES
from tests.fakes import STATE_BYTES, FakeLoader

ROOT = Path(__file__).parents[1]
LIMITS = Limits(max_text_chars=200, max_images=2, max_tiles=4, max_new_tokens=64)
PYRAMID = EXAMPLES_DIR / "pyramid.jpg"


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine("fake", loader=FakeLoader(0.01), limits=LIMITS)


@pytest.fixture(scope="module")
def demo(engine: Engine) -> Iterator[gr.Blocks]:
    blocks = build(engine)
    blocks.launch(prevent_thread_lock=True, quiet=True, **launch_options(engine))
    yield blocks
    blocks.close(verbose=False)


@pytest.fixture(scope="module")
def client(demo: gr.Blocks) -> Client:
    return Client(demo.local_url, download_files=False, verbose=False)


def message(text: str, *files: Path) -> dict[str, Any]:
    return {"text": text, "files": [handle_file(str(file)) for file in files]}


def ask(client: Client, text: str, *files: Path, **options: Any) -> list[dict[str, Any]]:
    job = client.submit(message(text, *files), api_name="/chat", **options)
    updates = list(job)
    job.result()  # a failed stream only looks finished; this raises
    return updates


# /chat


def test_chat_streams_json(client: Client) -> None:
    updates = ask(client, "what is this", PYRAMID)
    assert len(updates) > 1
    assert all(update["finish_reason"] is None for update in updates[:-1])
    final = updates[-1]
    assert final["text"] == "turn 1 images 1: what is this"
    assert final["finish_reason"] == "stop"
    assert len(final["session_id"]) > 15
    metrics = final["metrics"]
    assert metrics["image_tokens"] == 64
    assert metrics["num_tiles"] == 1
    assert metrics["state_bytes"] == STATE_BYTES
    assert metrics["ttft_ms"] > 0
    assert metrics["tok_per_sec"] > 0


def test_session_id_goes_on_with_the_conversation(client: Client) -> None:
    first = ask(client, "one", PYRAMID)[-1]
    second = ask(client, "two", session_id=first["session_id"])[-1]
    assert second["text"] == "turn 2 images 0: two"
    assert second["session_id"] == first["session_id"]
    assert second["metrics"]["text_tokens"] > first["metrics"]["text_tokens"]
    assert second["metrics"]["state_bytes"] == first["metrics"]["state_bytes"]
    assert ask(client, "three")[-1]["text"] == "turn 1 images 0: three", "without the id a new one begins"


def test_options_reach_the_model(client: Client) -> None:
    assert ask(client, "x", temperature=1.5)[-1]["text"].endswith("(hot)")
    reply = ask(client, "[long]", max_new_tokens=5)[-1]
    assert (reply["text"], reply["finish_reason"]) == ("word0 word1 word2 word3 word4", "length")
    assert ask(client, "x", PYRAMID, max_tiles=3)[-1]["metrics"]["num_tiles"] == 3


@pytest.mark.parametrize(
    ("text", "num_files", "options", "says"),
    [
        (" ", 0, {}, "empty"),
        ("x" * 201, 0, {}, "201 characters; 200 fit"),
        ("x", 3, {}, "3 images; 2 fit"),
        ("x", 0, {"max_new_tokens": 65}, "max_new_tokens is 65; this server allows up to 64"),
        ("x", 0, {"max_new_tokens": None}, "max_new_tokens is None; use a whole number"),
        ("x", 0, {"max_tiles": 5}, "max_tiles is 5; this server allows up to 4"),
        ("x", 0, {"temperature": 3}, r"temperature is 3; use a number from 0\.0 to 2\.0"),
        ("x", 0, {"temperature": "hot"}, "temperature is 'hot'"),
        ("x", 0, {"min_p": -0.5}, r"min_p is -0\.5"),
        ("x", 0, {"greedy": "maybe"}, "greedy is 'maybe'; use true or false"),
        ("x", 0, {"system": 5}, "system is 5; use a text"),
        ("x", 0, {"seed": -1}, "seed is -1"),
        ("x", 0, {"session_id": "made up"}, "session_id is not known"),
    ],
)
def test_limits_hold_for_scripts(client: Client, text: str, num_files: int, options: dict[str, Any], says: str) -> None:
    with pytest.raises(AppError, match=says):
        ask(client, text, *[PYRAMID] * num_files, **options)


def test_bad_image_is_told_by_name_only(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "letter.jpg"
    path.write_text("Dear Sir or Madam")
    with pytest.raises(AppError, match=r"letter\.jpg") as caught:
        ask(client, "what is this", path)
    assert "/" not in str(caught.value).replace("letter.jpg", "")
    other = tmp_path / "notes.txt"
    other.write_text("no image")
    with pytest.raises(AppError, match="Invalid file type"):
        ask(client, "what is this", other)


def test_files_of_the_server_cannot_be_read(client: Client) -> None:
    stolen = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
    with pytest.raises(AppError):
        client.predict({"text": "x", "files": [stolen]}, api_name="/chat")


def test_fault_of_the_model_keeps_the_session(client: Client) -> None:
    session_id = ask(client, "one")[-1]["session_id"]
    with pytest.raises(AppError, match="went wrong inside the model") as caught:
        ask(client, "[boom]", session_id=session_id)
    assert "/srv" not in str(caught.value)
    assert ask(client, "two", session_id=session_id)[-1]["text"] == "turn 2 images 0: two"


def test_cancel_keeps_a_whole_turn(client: Client, engine: Engine) -> None:
    session_id = ask(client, "one")[-1]["session_id"]
    job = client.submit(message("[long]"), session_id=session_id, api_name="/chat")
    for update in job:
        if len(update["text"].split()) > 5:
            job.cancel()
            break
    chat = engine.chats.get(("api", session_id))
    assert chat is not None
    ask(client, "whatever")  # takes the lane after it, so it has ended by then
    assert chat.turns[1].finish_reason == "cancel"
    assert 5 < len(chat.turns[1].reply.split()) < 64
    assert ask(client, "two", session_id=session_id)[-1]["text"] == "turn 3 images 0: two"


# What the page shows


def test_page_names_no_other_host(demo: gr.Blocks) -> None:
    config = str(demo.config)
    for outside in ("googleapis", "gstatic", "cdn.jsdelivr"):
        assert outside not in config
    assert not demo.analytics_enabled


def test_shipped_examples_are_images_with_sources() -> None:
    sources = (EXAMPLES_DIR / "README.md").read_text()
    assert any(not name for name, _ in EXAMPLES), "it chats without a picture too"
    for name, question in EXAMPLES:
        assert question
        if not name:
            continue
        assert (EXAMPLES_DIR / name).is_file()
        assert name in sources, f"say in app/examples/README.md where {name} comes from"


def test_figures_say_what_was_measured() -> None:
    info = ModelInfo("nano", "linear", "cpu", "float32", 1, 3 << 20)
    html = views.meter(Metrics(1234.0, 20.04, 9, 1, 90, 64, 6 << 20), info)
    for text in ("1.23 s", "20.0", "154 tokens", "90 text + 64 image", "6.0 MiB", "stays this size at any length"):
        assert text in html
    assert "3.0 MiB" in views.meter(Metrics(), info), "an empty conversation has the empty state's size"
    teacher = ModelInfo("t", "teacher", "cpu", "float32", 1, 0)
    assert "grows with every token" in views.meter(Metrics(state_bytes=1), teacher)


def test_tiles_and_resuming_are_told() -> None:
    html = views.meter(Metrics(image_tiles=(1, 5), resumed=Resumed(3, 2.2)), None)
    assert "2 pictures in this message: 1 + 5 tiles." in html
    assert "Resumed after turn 3 in 2 ms; nothing was read again." in html
    assert "Read 2 turns again in 1.5 s" in views.meter(Metrics(resumed=Resumed(3, 1500, 2)), None)


def test_saved_settings_come_back_where_they_fit() -> None:
    options = Options(LIMITS)
    updates = dict(
        zip(options.NAMES, options.restore({"temperature": 0.5, "max_new_tokens": 9999, "top_k": "x"}), strict=True)
    )
    assert updates["temperature"] == 0.5
    for name in ("max_new_tokens", "top_k", "seed"):
        assert updates[name] == gr.skip(), f"{name} is none that this server takes"
    assert options.values([1] * 9 + ["  "])["system"] is None


@pytest.mark.parametrize(("typed", "seed"), [("", None), (" ", None), (None, None), ("7", 7), (" 12 ", 12), ("-1", -1)])
def test_a_seed_is_typed_as_text(typed: str | None, seed: int | None) -> None:
    options = Options(LIMITS)
    assert options.values([1] * 8 + [typed, ""])["seed"] == seed
    if seed is not None and seed >= 0:
        assert options.restore({"seed": seed})[options.NAMES.index("seed")] == str(seed)


def test_a_seed_that_is_no_number_is_named() -> None:
    values = Options(LIMITS).values([0.5, 1, 1, 0, False, 0, 0, 1, "1.5x", ""])
    with pytest.raises(EngineError, match=r"seed is '1\.5x'; use a whole number"):
        Settings.from_dict(values)


def test_a_message_of_the_chatbot_belongs_to_a_turn() -> None:
    assert [turn_index(i) for i in (0, 1, 2, 3, (4, 1), [2, 0])] == [0, 0, 1, 1, 2, 1]


def test_what_is_shown_is_escaped() -> None:
    assert "<b>" not in views.notice("<b>")
    assert "<i>x" not in views.model_status(LoadStatus("failed", 0, "<i>x"), None, "m")
    assert views.notice("") == ""


@pytest.mark.parametrize(
    ("reply", "shows"),
    [
        (Reply(ahead=2), "2 messages come first"),
        (Reply(ahead=1), "one message comes first"),
        (Reply(ahead=1, wait_s=12.3), "one message comes first, about 12 s"),
        (Reply(stage="loading", progress=0.4, note="tensor 4 of 10"), "40%: tensor 4 of 10"),
        (Reply(stage="reading"), "Reading"),
        (Reply("It is **red**.", "writing"), "It is **red**."),
        (Reply(stage="done", finish_reason="stop"), "no answer"),
    ],
)
def test_stages_of_an_answer_are_shown(reply: Reply, shows: str) -> None:
    assert shows in views.reply_text(reply)


@pytest.mark.parametrize("text", ["88.", "3)", " 7. "])
def test_a_number_alone_is_no_empty_list(text: str) -> None:
    """Markdown would make an item of it, with nothing inside."""
    for shown in (views.reply_text(Reply(text, "writing")), views.answer(text)["content"]):
        assert "\u2060" in shown
        assert shown.replace("\u2060", "") == text
    assert views.answer("1. one\n2. two")["content"] == "1. one\n2. two"


def test_messages_hold_pictures_then_words() -> None:
    user = views.user_message("what", ["/tmp/a.png"])
    words = {"type": "text", "text": "what"}
    assert user == {"role": "user", "content": [{"path": "/tmp/a.png", "alt_text": "a.png"}, words]}
    assert views.messages(Chat()) == []


# The command


def load_command() -> Any:
    """app.py as a module: the package of the same name hides it from `import`."""
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("app_command", ROOT / "app.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_flags_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_SERVER_NAME", "0.0.0.0")
    monkeypatch.setenv("GRADIO_SERVER_PORT", "7999")
    monkeypatch.setenv("MMMAMBA_MAX_TILES", "3")
    parser = load_command().parser()
    args = parser.parse_args([])
    assert (args.host, args.port, args.max_tiles, args.model) == ("0.0.0.0", 7999, 3, "nano-linear")
    args = parser.parse_args(["--port", "8000", "--max-tiles", "5", "--device", "cpu"])
    assert (args.port, args.max_tiles, args.device) == (8000, 5, "cpu")


def test_what_the_page_offers_follows_the_flags() -> None:
    args = load_command().parser().parse_args(["--no-teacher", "--state-budget-mib", "64", "--contexts", "/tmp/x"])
    assert (args.no_teacher, args.state_budget_mib, args.state_disk_mib, args.contexts) == (True, 64, None, "/tmp/x")
    alone = str(build(Engine("fake", loader=FakeLoader()), PageOptions(switch=False)).config)
    assert "compare-clear" not in alone, "a model without a known teacher has nothing to be compared with"
    assert "switch-load" not in alone


def test_command_refuses_a_limit_below_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load_command().main(["--max-images", "0"])
    assert "--max-images is 0; use 1 or more" in capsys.readouterr().err


def test_importing_the_page_loads_no_torch() -> None:
    """The page opens before torch is imported; a model's loading does that."""
    code = "import sys, app.ui; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_every_flag_has_a_variable(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Spaces have no command line."""
    command = load_command()
    values = {"precision": "int4", "auth": "me:secret", "port": "8001", "host": "0.0.0.0"}
    numbers = {name: str(least + 7) for name, _, least, _ in command.LIMITS}
    numbers |= {name: str(i + 9) for i, (name, _) in enumerate(command.BUDGETS)}
    switches = dict.fromkeys((name for name, _ in command.SWITCHES), "1")
    texts = dict.fromkeys(("model", "device", "teacher", "contexts", "likes"), "x")
    given = values | numbers | switches | texts
    flags = {action.dest.replace("_", "-") for action in command.parser()._actions} - {"help"}
    assert set(given) == flags, "say here what the new flag takes"
    for name, value in given.items():
        monkeypatch.setenv(command.variable(name), value)
    args = command.read_args([])
    for name in flags:
        got = getattr(args, name.replace("-", "_"))
        assert got == (True if name in switches else int(given[name]) if name in (*numbers, "port") else given[name])
    assert "secret" not in command.parser().format_help()
    args = command.read_args(["--no-share", "--port", "9000", "--precision", "auto"])
    assert (args.share, args.port, args.precision) == (False, 9000, "auto"), "a flag comes before a variable"


def test_schemes_are_those_of_the_quantizer() -> None:
    """Named again: flags are read before anything that imports torch."""
    assert tuple(SCHEMES) == precision.SCHEMES


def test_older_names_of_the_precision_still_mean_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spaces may have set them; a name that is no longer read would be ignored without a word."""
    command = load_command()
    assert command.read_args(["--quantize", "int8"]).precision == "int8"
    monkeypatch.setenv("MMMAMBA_DTYPE", "float32")
    assert command.read_args([]).precision == "float32"
    monkeypatch.setenv("MMMAMBA_QUANTIZE", "int8")
    assert command.read_args([]).precision == "int8"
    monkeypatch.setenv("MMMAMBA_PRECISION", "bfloat16")
    assert command.read_args([]).precision == "bfloat16"


def test_a_precision_that_cannot_be_had_ends_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("app.precision.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        load_command().read_args(["--precision", "bnb-nf4"])
    assert "--precision bnb-nf4 needs the package bitsandbytes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("MMMAMBA_SHARE", "maybe", "MMMAMBA_SHARE is 'maybe'; use 1 or 0"),
        ("MMMAMBA_MAX_TILES", "many", "--max-tiles: invalid int value: 'many'"),
        ("MMMAMBA_MAX_TILES", "0", "--max-tiles is 0; use 1 or more"),
        ("MMMAMBA_MAX_CONTEXT", "100", "--max-context is 100; use 1024 or more"),
        ("MMMAMBA_PRECISION", "int2", "--precision is 'int2'; use one of auto"),
        ("MMMAMBA_AUTH", "secret", "--auth is no USER:PASSWORD"),
    ],
)
def test_variables_are_checked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, value: str, says: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        load_command().read_args([])
    error = capsys.readouterr().err
    assert says in error
    assert "secret" not in error


def test_the_page_asks_for_name_and_password() -> None:
    engine = Engine("fake", loader=FakeLoader(), limits=LIMITS)
    blocks = build(engine)
    blocks.launch(prevent_thread_lock=True, quiet=True, auth=("me", "secret"), **launch_options(engine, ["me:secret"]))
    try:
        with pytest.raises(AuthenticationError):
            Client(blocks.local_url, download_files=False, verbose=False)
        known = Client(blocks.local_url, download_files=False, verbose=False, auth=("me", "secret"))
        assert ask(known, "x")[-1]["text"] == "turn 1 images 0: x"
        assert httpx.get(f"{blocks.local_url}v1/models").status_code == 401
    finally:
        blocks.close(verbose=False)


def test_thumbs_are_kept_only_where_that_is_switched_on(tmp_path: Path) -> None:
    path = tmp_path / "kept" / "likes.jsonl"
    engine = Engine("fake", loader=FakeLoader())
    chat = engine.chats.new(("tab", "a"))
    list(engine.reply(chat, "one", [PYRAMID]))
    likes = Likes(path)
    likes.add(chat.turns[0], True, engine.info)
    likes.add(chat.turns[0], None, engine.info)
    first, second = map(json.loads, path.read_text().splitlines())
    assert (first["liked"], second["liked"]) == (True, None)
    assert (first["model"], first["turn"], first["images"]) == ("fake", 1, 1)
    assert (first["question"], first["answer"]) == ("one", "turn 1 images 1: one")
    assert str(PYRAMID) not in path.read_text()

    def events(page: PageOptions) -> set[str]:
        config = build(Engine("fake", loader=FakeLoader()), page).config
        return {name for dependency in config["dependencies"] for _, name in dependency["targets"]}

    assert "like" in events(PageOptions(likes=path))
    assert "like" not in events(PageOptions())


def test_help_is_quick_and_complete() -> None:
    parser: argparse.ArgumentParser = load_command().parser()
    text = parser.format_help()
    for flag in ("--model", "--device", "--precision", "--host", "--port", "--share", "--max-new-tokens"):
        assert flag in text
