"""Conversations as files: there and back, on another machine, and everything that must be refused."""

from __future__ import annotations

import copy
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from app import saving
from app.chat import Chat
from app.engine import Engine, EngineError, Settings
from app.settings import Limits
from tests.fakes import FakeLoader

SETTINGS = {"temperature": 0.5, "system": None}


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "square.png"
    Image.new("RGB", (600, 400), "red").save(path)
    return path


def last(replies: Any) -> Any:
    return list(replies)[-1]


def engine_of(model: str = "fake") -> Engine:
    return Engine(model, loader=FakeLoader())


def talk(engine: Engine, picture: Path) -> Chat:
    """Two turns and a branch of the first."""
    chat = Chat(engine.chats.states)
    last(engine.reply(chat, "one", [picture], Settings(system="Be brief.")))
    last(engine.reply(chat, "two"))
    chat.go_back(1)
    last(engine.reply(chat, "other"))
    return chat


def shape(chat: Chat) -> list[tuple[Any, ...]]:
    return [([t.text for t in end.path], [t.reply for t in end.path], end is chat.head) for end in chat.branches]


def test_json_there_and_back_with_branches_and_pictures(picture: Path) -> None:
    engine = engine_of()
    chat = talk(engine, picture)
    record = json.loads(json.dumps(saving.to_dict(chat, SETTINGS, engine.info)))
    back = Chat()
    assert saving.fill(back, record, Limits()) == SETTINGS
    assert shape(back) == shape(chat)
    first = back.turns[0]
    assert first.system == "Be brief."
    assert Path(first.images[0]).read_bytes() == picture.read_bytes()
    assert Path(first.images[0]) != picture
    reply = last(engine_of().reply(back, "three"))
    assert reply.text == "turn 3 images 0: three", "it was not read again, or not as it was said"
    assert reply.metrics.resumed.reread == 2


def test_the_browser_gets_what_fits(picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = talk(engine_of(), picture)
    text = saving.for_browser(chat, SETTINGS)
    assert text is not None
    back = Chat()
    saving.fill(back, json.loads(text), Limits())
    assert max(Image.open(back.turns[0].images[0]).size) == saving.BROWSER_SIDE_PX
    monkeypatch.setattr(saving, "BROWSER_BYTES", 1500)
    text = saving.for_browser(chat, SETTINGS)
    assert text is not None
    assert "too large to be kept" in text
    monkeypatch.setattr(saving, "BROWSER_BYTES", 100)
    assert saving.for_browser(chat, SETTINGS) is None
    assert saving.for_browser(Chat(), SETTINGS) is None


def test_markdown_is_for_people(picture: Path) -> None:
    text = saving.to_markdown(talk(engine_of(), picture), "A conversation")
    assert text.startswith("# A conversation")
    assert "**You:** one `square.png`" in text
    assert "turn 2 images 0: other" in text
    assert "two" not in text, "another branch"


def save(engine: Engine, chat: Chat, path: Path) -> None:
    engine.save_state(chat, lambda info, state: saving.write_with_state(path, saving.to_dict(chat, {}, info), state))


def open_(engine: Engine, path: Path, tmp_path: Path) -> Chat:
    record, state = saving.read_file(path, tmp_path)
    chat = Chat(engine.chats.states)
    saving.fill(chat, record, Limits())
    assert state is not None
    engine.adopt_state(chat, state, lambda info: saving.check_model(record, info))
    return chat


@pytest.mark.parametrize("fixture", ["tiny_dir", "tiny_teacher_dir"])
def test_with_its_memory_it_goes_on_at_once(
    fixture: str, request: pytest.FixtureRequest, picture: Path, tmp_path: Path
) -> None:
    """On "another machine": another engine, that gives the answer that this one gives."""
    directory = str(request.getfixturevalue(fixture))
    here, there = (Engine(directory, "cpu", "float32") for _ in range(2))
    chat = talk(here, picture)
    path = tmp_path / "conversation.mmmamba"
    save(here, chat, path)
    greedy = Settings(greedy=True, max_new_tokens=8)
    expected = last(here.reply(chat, "And?", settings=greedy)).text
    opened = open_(there, path, tmp_path)
    reply = last(there.reply(opened, "And?", settings=greedy))
    assert reply.text == expected
    assert (reply.metrics.resumed.turn, reply.metrics.resumed.reread) == (2, 0)


def test_memory_of_another_model_is_refused(
    tiny_dir: Path, tiny_teacher_dir: Path, picture: Path, tmp_path: Path
) -> None:
    here, path = Engine(str(tiny_dir), "cpu", "float32"), tmp_path / "conversation.mmmamba"
    save(here, talk(here, picture), path)
    with pytest.raises(EngineError, match='saved with "linear", whose memory does not fit "hovle"'):
        open_(Engine(str(tiny_teacher_dir), "cpu", "float32"), path, tmp_path)
    record, _ = saving.read_file(path, tmp_path)
    assert here.info is not None
    with pytest.raises(EngineError, match='other weights of "linear"'):
        saving.check_model(record | {"weights": "another training"}, here.info)


def test_a_damaged_memory_is_refused(tiny_dir: Path, picture: Path, tmp_path: Path) -> None:
    engine, path = Engine(str(tiny_dir), "cpu", "float32"), tmp_path / "conversation.mmmamba"
    save(engine, talk(engine, picture), path)
    with zipfile.ZipFile(path) as archive:
        chat = archive.read(saving.CHAT_FILE)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(saving.CHAT_FILE, chat)
        archive.writestr(saving.STATE_FILE, b"no tensors")
    with pytest.raises(EngineError, match="memory in this file is damaged"):
        open_(engine, path, tmp_path)


def test_nothing_to_save_is_said() -> None:
    with pytest.raises(EngineError, match="nothing to save"):
        engine_of().save_state(Chat(), lambda info, state: None)


@pytest.mark.parametrize("content", [b"", b"hello", b"[1, 2]", b'{"format": "other"}', b"\x89PNG", b'"text"'])
def test_files_of_others_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)

    def open_it() -> None:
        record, _ = saving.read_file(path, tmp_path)
        saving.fill(Chat(), record, Limits())

    with pytest.raises(EngineError, match="no conversation of this page"):
        open_it()


def test_an_archive_with_other_files_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.mmmamba"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../evil.txt", "x")
        archive.writestr(saving.CHAT_FILE, "{}")
    with pytest.raises(EngineError, match="no conversation"):
        saving.read_file(path, tmp_path)
    assert not (tmp_path.parent / "evil.txt").exists()


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("text", 5, "turn 2 has no text"),
        ("text", "x" * 99_999, "turn 2 is too long"),
        ("parent", 7, "does not follow"),
        ("parent", 1, "does not follow"),
        ("finish_reason", "boredom", "settings that this server does not know"),
        ("max_tiles", 999, "settings that this server does not know"),
        ("images", [{"name": "a.png", "data": "@@"}], "one of its pictures cannot be read"),
        ("images", [{"name": "a.png", "data": "aGVsbG8="}], "one of its pictures cannot be read"),
        ("images", [{}] * 99, "too many pictures"),
        ("state_bytes", "many", "figures that are no numbers"),
    ],
)
def test_every_field_is_checked(picture: Path, name: str, value: Any, says: str) -> None:
    record = copy.deepcopy(saving.to_dict(talk(engine_of(), picture), SETTINGS, None))
    record["turns"][1][name] = value
    chat = Chat()
    with pytest.raises(EngineError, match=says):
        saving.fill(chat, record, Limits())
    assert chat.turns == []


def test_names_in_a_file_name_no_places(picture: Path) -> None:
    record = saving.to_dict(talk(engine_of(), picture), SETTINGS, None)
    record["turns"][0]["images"][0]["name"] = "../../../etc/passwd.png"
    chat = Chat()
    saving.fill(chat, record, Limits())
    assert Path(chat.turns[0].images[0]).name == "1-1.png"
