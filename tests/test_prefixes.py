"""Conversations found again by what was said: the right turn, nobody else's, and nothing that grows for ever."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from app import prefixes as module
from app.chat import Chat
from app.engine import Engine
from app.openai_request import Said
from app.prefixes import Prefixes
from tests.fakes import FakeLoader


def engine_of() -> tuple[Engine, Prefixes]:
    engine = Engine("fake", loader=FakeLoader())
    return engine, Prefixes(engine.chats.states)


def answer(engine: Engine, prefixes: Prefixes, turns: list[Said], question: str, system: str | None = None) -> Chat:
    """Ask after `turns`, as a request does; the turn goes into `turns`."""
    key, chat = prefixes.take(system, turns)
    *_, reply = engine.reply(chat, question)
    turns.append(Said(question, reply=reply.text))
    prefixes.give_back(key, (system, turns))
    return chat


def test_the_longest_known_beginning_is_taken() -> None:
    engine, prefixes = engine_of()
    turns: list[Said] = []
    chat = answer(engine, prefixes, turns, "one")
    assert answer(engine, prefixes, turns, "two") is chat
    fork = turns[:1]
    assert answer(engine, prefixes, fork, "other") is chat, "a branch of the same conversation"
    assert [turn.text for turn in chat.turns] == ["one", "other"]
    changed = [turns[0], Said("two", reply="never said")]
    assert answer(engine, prefixes, changed, "three") is chat
    assert engine.models.get().read_again[-1].endswith("never said"), "only what is not known is read"
    assert len(engine.models.get().read_again) == 1


@pytest.mark.parametrize("other", [Said("one", (b"x",)), Said("one", max_tiles=1), Said("One")])
def test_another_beginning_is_another_conversation(other: Said) -> None:
    engine, prefixes = engine_of()
    turns: list[Said] = []
    chat = answer(engine, prefixes, turns, "one")
    asked = Said(other.text, other.images, other.max_tiles, turns[0].reply)
    assert prefixes.take(None, [asked])[1] is not chat
    assert prefixes.take("Be brief", turns)[1] is not chat


def test_a_conversation_at_work_is_nobody_elses() -> None:
    engine, prefixes = engine_of()
    turns: list[Said] = []
    chat = answer(engine, prefixes, turns, "one")
    key, taken = prefixes.take(None, turns)
    assert taken is chat
    other_key, other = prefixes.take(None, turns)
    assert other is not chat
    assert [turn.reply for turn in other.turns] == [turns[0].reply]
    prefixes.give_back(key, None)
    prefixes.give_back(other_key, None)
    assert prefixes.chats.get(other_key) is None, "nobody could find it again"
    assert prefixes.take(None, turns)[1] is chat


def test_what_was_let_go_is_begun_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_CHATS", 1)
    engine, prefixes = engine_of()
    turns: list[Said] = []
    chat = answer(engine, prefixes, turns, "one")
    answer(engine, prefixes, [], "somebody else's")
    assert chat.closed
    assert answer(engine, prefixes, turns, "two") is not chat
    monkeypatch.setattr(module, "MOST_IN_A_CHAT", 2)
    long = prefixes.chats.get(next(iter(prefixes.chats._open)))
    assert prefixes.take(None, turns)[1] is not long, "a conversation has only so many branches"


def test_scripts_push_no_visitor_out() -> None:
    engine, prefixes = engine_of()
    tab = engine.chats.new(("tab", "a"))
    for i in range(module.MOST_CHATS + 3):
        answer(engine, prefixes, [], f"question {i}")
    assert engine.chats.get(("tab", "a")) is tab
    assert len(prefixes.chats) == module.MOST_CHATS


def test_few_ends_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_KNOWN", 3)
    engine, prefixes = engine_of()
    for i in range(6):
        answer(engine, prefixes, [], f"question {i}")
    assert len(prefixes._known) == 3


def test_pictures_are_kept_once_and_not_for_ever() -> None:
    _, prefixes = engine_of()
    one, two = prefixes.files([b"one", b"two"])
    assert prefixes.files([b"one"]) == (one,)
    assert (one.read_bytes(), two.read_bytes()) == (b"one", b"two")
    old = time.time() - module.KEEP_S - 60
    os.utime(one, (old, old))
    prefixes.files([b"three"])
    assert not one.exists()
    assert two.exists()
    for path in Path(two).parent.iterdir():
        path.unlink()
    two.parent.rmdir()
    (again,) = prefixes.files([b"two"])
    assert again.read_bytes() == b"two", "a folder that was cleaned up is made anew"


def test_pictures_of_a_kept_conversation_are_where_they_lie_now() -> None:
    _, prefixes = engine_of()
    said = Said("what", (b"one",), reply="this")
    key, chat = prefixes.take(None, [said])
    prefixes.give_back(key, (None, [said]))
    (old,) = chat.turns[0].images
    shutil.rmtree(Path(old).parent)
    assert prefixes.take(None, [said])[1] is chat
    (new,) = chat.turns[0].images
    assert Path(new).read_bytes() == b"one"
