"""A tab that was left: closed, or cut off and back again, which looks the same to the server."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import gradio as gr
import pytest

from app import handlers as module
from app import panel_views, visits
from app.engine import Engine
from app.handlers import FORGOTTEN, Handlers
from app.keeping import Keeping
from app.options import Options
from app.panel import BEGUN_ANEW, CHANGED, GOES_ON, LOST, Panel
from app.sides import sides_of
from app.ui import PageOptions, build, launch_options
from tests.fakes import FakeLoader, Pace

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

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
    assert kept == "", "what the browser has stays there"
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
    """Passes connections on to a port, until they are cut; at rest it refuses them, as a server that is down."""

    def __init__(self, port: int) -> None:
        self.to, self.port = port, 0
        self.open: list[socket.socket] = []
        self.listen()
        self.port = self.listening.getsockname()[1]

    def listen(self) -> None:
        self.listening = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=[self.listening], daemon=True).start()

    def cut(self) -> None:
        for end in self.open:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with suppress(OSError):
            self.listening.shutdown(socket.SHUT_RDWR)  # or a thread that waits in accept takes one more
        self.listening.close()
        self.cut()

    def _accept(self, listening: socket.socket) -> None:
        with suppress(OSError):
            while True:
                near, _ = listening.accept()
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
    with serving() as (port, engine):
        through = Relay(port)
        yield through, engine
        through.close()


@contextmanager
def serving() -> Iterator[tuple[int, Engine]]:
    engine = Engine("fake", loader=FakeLoader(pace=Pace(long_s=0.1)))
    blocks = build(engine, PageOptions(teacher="fake-teacher"))
    blocks.launch(prevent_thread_lock=True, quiet=True, **launch_options(engine))
    yield blocks.server_port, engine
    blocks.close(verbose=False)


@pytest.fixture
def tab(browser: Browser, relay: tuple[Relay, Engine]) -> Iterator[Page]:
    tab = browser.new_page()
    tab.set_default_timeout(15_000)
    tab.goto(f"http://127.0.0.1:{relay[0].port}")
    tab.wait_for_selector("#model .chip-ready")
    yield tab
    tab.close()


def send(tab: Page, text: str) -> None:
    tab.fill("#box textarea", text)
    tab.press("#box textarea", "Enter")


def ask(tab: Page, text: str, answer: str) -> None:
    send(tab, text)
    tab.locator("#chat [data-testid=bot]").last.filter(has_text=answer).wait_for()
    tab.wait_for_selector("#box button.submit-button")


def compare(tab: Page, text: str, answer: str) -> None:
    tab.click("#compare-tab-button")
    tab.fill("#compare-box textarea", text)
    tab.press("#compare-box textarea", "Enter")
    tab.wait_for_selector(f"#panel .side-teacher .words:has-text({answer!r})")
    tab.wait_for_selector("#compare-box button.submit-button")


def holds(tab: Page, box: str, text: str) -> None:
    tab.wait_for_function(f"text => document.querySelector('{box} textarea')?.value === text", arg=text)


@pytest.mark.browser
def test_a_laptop_that_slept_goes_on_with_its_conversations(tab: Page, relay: tuple[Relay, Engine]) -> None:
    connection, engine = relay
    ask(tab, "one", "turn 1 images 0: one")
    compare(tab, "one", "turn 1 images 0: one")
    assert len(engine.chats.states) == 3
    connection.cut()
    for _ in range(100):
        if not len(engine.chats.states):
            break
        tab.wait_for_timeout(100)
    assert not len(engine.chats.states), "the server has not seen that the tab is gone"
    compare(tab, "two", "turn 2 images 0: two")
    tab.click("button[role=tab] >> nth=0")
    ask(tab, "two", "turn 2 images 0: two")


@pytest.mark.browser
def test_what_is_sent_while_the_server_is_down_is_kept(tab: Page, relay: tuple[Relay, Engine]) -> None:
    connection, _ = relay
    ask(tab, "one", "turn 1 images 0: one")
    tab.wait_for_timeout(500)  # the browser keeps it
    connection.close()
    send(tab, "two <b>words</b>")
    tab.wait_for_selector(".lost:has-text('What you wrote is kept')")
    assert tab.input_value("#box textarea") == "two <b>words</b>"
    connection.listen()
    tab.wait_for_selector(".lost:has-text('What you wrote stands in the box')")
    holds(tab, "#box", "two <b>words</b>")
    tab.locator("#chat [data-testid=bot]").last.filter(has_text="turn 1 images 0: one").wait_for()
    tab.press("#box textarea", "Enter")
    tab.locator("#chat [data-testid=bot]").last.filter(has_text="turn 2 images 0: two").wait_for()
    tab.wait_for_selector(".lost", state="detached")
    tab.wait_for_timeout(500)
    tab.reload()
    tab.locator("#chat [data-testid=bot]").last.filter(has_text="turn 2 images 0: two").wait_for()
    tab.wait_for_timeout(500)
    assert tab.input_value("#box textarea") == "", "it was answered"


@pytest.mark.browser
def test_a_question_whose_answer_was_cut_off_comes_back(tab: Page, relay: tuple[Relay, Engine]) -> None:
    connection, _ = relay
    send(tab, "[long] story")
    tab.locator("#chat [data-testid=bot]").last.filter(has_text="word2").wait_for()
    connection.close()
    tab.wait_for_selector(".lost:has-text('What you wrote is kept')")
    connection.listen()
    holds(tab, "#box", "[long] story")


@pytest.mark.browser
def test_a_comparison_goes_on_after_the_page_was_loaded_again(tab: Page, relay: tuple[Relay, Engine]) -> None:
    connection, _ = relay
    compare(tab, "one", "turn 1 images 0: one")
    tab.click("#grow-start")
    tab.wait_for_selector("#growth .points tbody tr >> nth=1")
    connection.close()
    tab.wait_for_selector(".lost:visible:has-text('What you wrote is kept')")
    with tab.expect_navigation():
        connection.listen()
    tab.wait_for_selector("#model .chip-ready")
    tab.click("#compare-tab-button")
    tab.wait_for_selector("#compare-notice:has-text('This is the comparison as it was')")
    tab.wait_for_selector("#panel .side-teacher .words:has-text('turn 1 images 0: one')")
    tab.wait_for_selector("#growth .points tbody tr >> nth=1")
    compare(tab, "two", "turn 2 images 0: two")


@pytest.mark.browser
def test_a_server_that_was_started_anew_is_said_and_takes_nothing(tab: Page, relay: tuple[Relay, Engine]) -> None:
    connection, _ = relay
    compare(tab, "one", "turn 1 images 0: one")
    tab.click("button[role=tab] >> nth=0")
    ask(tab, "one", "turn 1 images 0: one")
    tab.wait_for_timeout(500)
    with serving() as (connection.to, _):
        connection.cut()
        send(tab, "two")
        tab.wait_for_selector("#notice [role=alert]:has-text('the server was started anew')")
        holds(tab, "#box", "two")
        assert tab.locator("#chat [data-testid=bot]").count() == 1, "what is shown stays"
        tab.reload()
        tab.locator("#chat [data-testid=bot]").last.filter(has_text="turn 1 images 0: one").wait_for()
        holds(tab, "#box", "two")
        tab.press("#box textarea", "Enter")
        tab.locator("#chat [data-testid=bot]").last.filter(has_text="turn 2 images 0: two").wait_for()
        tab.click("#compare-tab-button")
        tab.wait_for_selector("#compare-notice [role=alert]:has-text('the server no longer has this comparison')")
        assert "turn 1 images 0: one" in tab.inner_text("#panel"), "what was there is kept"
        compare(tab, "two", "turn 1 images 0: two")


# Comparisons


class Comparing:
    """A tab that compares."""

    def __init__(self, panel: Panel, session: str, name: str = "") -> None:
        self.panel, self.request = panel, SimpleNamespace(session_hash=session)
        self.loaded = panel.opened(name, panel_views.EMPTY_PANEL, panel_views.EMPTY_GROWTH, self.request)  # type: ignore[arg-type]

    def ask(self, text: str, *models: str) -> tuple[str, str]:
        """What is shown in the end, and what is said of it."""
        message, names = {"text": text, "files": []}, list(models or ("fake", "fake-teacher"))
        updates = list(self.panel.ask(message, names, self.request, *OPTIONS))  # type: ignore[arg-type]
        return [panel for _, panel, _ in updates if isinstance(panel, str)][-1], updates[0][2]


@pytest.fixture
def panel() -> Panel:
    engine = Engine("fake", loader=FakeLoader())
    return Panel(engine, sides_of("fake", "fake-hybrid,fake-teacher"), Options(engine.limits), None)


def test_a_comparison_stays_with_its_tab(panel: Panel) -> None:
    first = Comparing(panel, "a", "tab")
    first.ask("one")
    panel.forget(first.request)  # type: ignore[arg-type]
    assert len(panel.engine.chats.states) == 0
    again, other = Comparing(panel, "b", "tab"), Comparing(panel, "c", "other")
    shown, said, models, *_ = again.loaded
    assert "turn 1 images 0: one" in shown
    assert GOES_ON in said
    assert models == ["fake", "fake-teacher"]
    assert "turn 2 images 0: two" in again.ask("two")[0]
    assert other.loaded[:2] == (panel_views.EMPTY_PANEL, "")
    assert "turn 1 images 0: two" in other.ask("two")[0]
    panel.forget(first.request)  # type: ignore[arg-type]
    assert "turn 3 images 0: three" in again.ask("three")[0], "its old session ended late"


def test_a_comparison_that_was_let_go_is_said(panel: Panel, monkeypatch: pytest.MonkeyPatch) -> None:
    tab = Comparing(panel, "a", "tab")
    tab.ask("one")
    panel.forget(tab.request)  # type: ignore[arg-type]
    monkeypatch.setattr(visits, "MOST_LEFT", 0)
    Comparing(panel, "b")
    shown, said = tab.ask("two")
    assert "turn 1 images 0: two" in shown
    assert BEGUN_ANEW in said
    assert tab.ask("three")[1] == "", "once is enough"
    kept, note, *_ = panel.opened("tab", "<p>kept</p>", "", SimpleNamespace(session_hash="c"))  # type: ignore[arg-type]
    assert kept == "<p>kept</p>"
    assert LOST in note


def test_other_models_begin_a_new_comparison_and_that_is_said(panel: Panel) -> None:
    tab = Comparing(panel, "a")
    assert tab.ask("one")[1] == ""
    shown, said = tab.ask("two", "fake", "fake-hybrid")
    assert "turn 1 images 0: two" in shown
    assert CHANGED in said


def test_a_conversation_of_another_server_is_not_begun_anew(page: Handlers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "OPENING_S", 0.1)
    tab = Tab(page, "a")
    page._opened.clear()
    page.engine.chats.drop(tab.key)
    assert FORGOTTEN in tab.ask("two")[3]
    assert Keeping(page).remember(True, tab.request, *OPTIONS) == ""  # type: ignore[arg-type]


def test_a_message_may_come_before_its_tab_was_told(page: Handlers) -> None:
    request = SimpleNamespace(session_hash="quick")
    timer = threading.Timer(0.2, page.opened, (None, request))
    timer.start()
    updates = list(page.ask({"text": "one", "files": []}, 1, request, *OPTIONS))  # type: ignore[arg-type]
    assert updates[-1][3] == ""
    timer.join()


@pytest.mark.parametrize("sent", ["", "{", "[]", '{"format": "mmmamba-chat", "version": 9, "turns": []}'])
def test_an_earlier_conversation_that_cannot_be_used_changes_nothing(page: Handlers, sent: str) -> None:
    tab = Tab(page, "a")
    tab.ask("one")
    *_, notice, _ = (out := Keeping(page).reopen(sent, tab.request))[:5]  # type: ignore[arg-type]
    assert 'role="alert"' in notice
    assert out[-1] == "", "the browser is not told that the tab goes on with it"
    assert [turn.text for turn in page.engine.chats.get(tab.key).turns] == ["one"]  # type: ignore[union-attr]
