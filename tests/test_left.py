"""A tab that was left: closed, or cut off and back again, which looks the same to the server."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import gradio as gr
import pytest

from app import handlers as module
from app.engine import Engine
from app.handlers import FORGOTTEN, Handlers
from app.keeping import Keeping
from app.options import Options
from app.ui import PageOptions, build, launch_options
from tests.fakes import FakeLoader

if TYPE_CHECKING:
    from playwright.sync_api import Browser

OPTIONS = (0.3, 0.9, 64, 0, False, 0, 0.0, 1.0, None, "")


class Tab:
    """What a browser's tab does to the server."""

    def __init__(self, page: Handlers, name: str) -> None:
        self.page, self.request = page, SimpleNamespace(session_hash=name)
        self.key = ("tab", name)
        page.opened(None, self.request)  # type: ignore[arg-type]

    def ask(self, text: str) -> list[Any]:
        """The last update."""
        return list(self.page.ask({"text": text, "files": []}, 1, self.request, *OPTIONS))[-1]  # type: ignore[arg-type,return-value]

    def leave(self) -> None:
        self.page.forget(self.request)  # type: ignore[arg-type]

    def texts(self) -> list[str]:
        chat = self.page.engine.chats.get(self.key)
        return [] if chat is None else [turn.text for turn in chat.turns]


@pytest.fixture
def page() -> Handlers:
    engine = Engine("fake", loader=FakeLoader())
    return Handlers(engine, Options(engine.limits))


def test_a_tab_that_comes_back_goes_on_and_its_states_were_freed(page: Handlers) -> None:
    tab = Tab(page, "a")
    tab.ask("one")
    tab.ask("two")
    assert len(page.engine.chats.states) == 2
    tab.leave()
    assert len(page.engine.chats.states) == 0
    tab.ask("three")
    assert tab.texts() == ["one", "two", "three"]
    chat = page.engine.chats.get(tab.key)
    assert chat is not None
    assert chat.turns[-1].reply == "turn 3 images 0: three", "it has read what was said before"
    assert chat.turns[-1].metrics.resumed.reread == 2
    assert len(page.engine.chats.states) == 3


def test_an_answer_under_way_is_stopped_and_keeps_no_state(page: Handlers) -> None:
    tab = Tab(page, "a")
    tab.ask("one")
    updates = page.ask({"text": "[long]", "files": []}, 1, tab.request, *OPTIONS)  # type: ignore[arg-type]
    for _ in range(3):
        next(updates)
    tab.leave()
    list(updates)
    page.engine.run(lambda: None)  # the lane is free again
    assert len(page.engine.chats.states) == 0
    assert tab.texts()[0] == "one"


def test_a_tab_without_a_word_leaves_nothing(page: Handlers) -> None:
    tab = Tab(page, "a")
    tab.leave()
    assert page.engine.chats.get(tab.key) is None
    assert tab.ask("one")[3] == ""
    assert tab.texts() == ["one"]


def test_what_was_left_for_long_is_dropped_and_that_is_said(page: Handlers, monkeypatch: pytest.MonkeyPatch) -> None:
    tab = Tab(page, "a")
    tab.ask("one")
    tab.leave()
    monkeypatch.setattr(module, "LEFT_S", -1)
    Tab(page, "b")
    assert page.engine.chats.get(tab.key) is None
    for _ in range(2):  # nothing takes its place
        box, shown, _, notice, _ = tab.ask("two")
        assert FORGOTTEN in notice
        assert box.value["text"] == "two", "the message is given back"
        assert shown == gr.skip(), "what is shown stays"
        assert page.engine.chats.get(tab.key) is None
    undone = page.undo(gr.UndoData(None, {"index": 0, "value": "one"}), tab.request)  # type: ignore[arg-type]
    assert FORGOTTEN in undone[3]
    kept = Keeping(page).remember(True, tab.request, *OPTIONS)  # type: ignore[arg-type]
    assert kept == gr.skip(), "what the browser has stays there"
    page.clear(tab.request)  # type: ignore[arg-type]
    tab.ask("new")
    assert tab.texts() == ["new"]


def test_only_so_many_are_kept(page: Handlers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_LEFT", 2)
    tabs = [Tab(page, name) for name in "abc"]
    for tab in tabs:
        tab.ask("one")
        tab.leave()
    assert [page.engine.chats.get(tab.key) is not None for tab in tabs] == [False, True, True]


class Relay:
    """Passes connections on to a port, until they are cut."""

    def __init__(self, port: int) -> None:
        self.to, self.listening = port, socket.create_server(("127.0.0.1", 0))
        self.port = self.listening.getsockname()[1]
        self.open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        for end in self.open:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.listening.close()
        self.cut()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self.listening.accept()
                far = socket.create_connection(("127.0.0.1", self.to))
                self.open += [near, far]
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=self._pass, args=ends, daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def relay() -> Iterator[tuple[Relay, Engine]]:
    engine = Engine("fake", loader=FakeLoader())
    blocks = build(engine, PageOptions(teacher=""))
    blocks.launch(prevent_thread_lock=True, quiet=True, **launch_options(engine))
    through = Relay(blocks.server_port)
    yield through, engine
    through.close()
    blocks.close(verbose=False)


@pytest.mark.browser
def test_a_laptop_that_slept_goes_on_with_its_conversation(browser: Browser, relay: tuple[Relay, Engine]) -> None:
    connection, engine = relay
    page = browser.new_page()
    page.set_default_timeout(15_000)
    page.goto(f"http://127.0.0.1:{connection.port}")
    page.wait_for_selector("#model .chip-ready")

    def ask(text: str, answer: str) -> None:
        page.fill("#box textarea", text)
        page.press("#box textarea", "Enter")
        page.locator("#chat [data-testid=bot]").last.filter(has_text=answer).wait_for()
        page.wait_for_selector("#box button.submit-button")

    ask("one", "turn 1 images 0: one")
    assert len(engine.chats.states) == 1
    connection.cut()
    for _ in range(100):
        if not len(engine.chats.states):
            break
        page.wait_for_timeout(100)
    assert not len(engine.chats.states), "the server has not seen that the tab is gone"
    ask("two", "turn 2 images 0: two")
    page.close()
