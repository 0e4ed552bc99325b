"""What the chat's events do: the engine's replies turned into updates of components."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from app import saving, views
from app.boxes import draw_places, find_places
from app.chat import Chat, Metrics, Turn
from app.engine import Engine, EngineError, Reply, Settings
from app.likes import KEPT, Likes
from app.options import Options
from app.scratch import scratch_folder
from app.sessions import Key
from app.shown import typed
from app.turns import open_image
from app.video import Frames, pictures

log = logging.getLogger(__name__)

ASK_WITHOUT_WORDS = "What is in the picture?"
UNEXPECTED = "Something went wrong on the server. Nothing of the conversation is lost; try again."
BUSY = "An answer is being written. Wait for it, or stop it first."
NOTHING_YET = "Stopped before the first word; the conversation is as it was."
FORGOTTEN = (
    "The server no longer has this conversation: it was unused for long, or the server was started anew. "
    "Reload the page: what this browser kept comes back."
)
RESTORED = "This is the conversation that this browser kept. The next question reads it again, once."

LEFT_S, MOST_LEFT = 3600, 32  # how long, and how many conversations stay whose tab seems closed
MOST_OPENED = 4096
OPENING_S = 3.0  # how long the event that tells of a new tab may take after its first message

# What earlier.js is told in place of a conversation: to keep none, and which one the tab goes on with.
KEEP_NOTHING, SAME, FROM_LIST, FROM_FILE = "nothing", "", "list", "file"

# Updates of (box, chat, meter, notice, branch), in this order.
Update = tuple[Any, Any, Any, Any, Any]


def box_locked() -> Any:
    return gr.MultimodalTextbox(value={"text": "", "files": []}, interactive=False, submit_btn=False, stop_btn=True)


def box_open(text: str | None = None, files: Sequence[str] | None = None) -> Any:
    """The message box ready to type in; with `text`, also what it holds."""
    value: dict[str, Any] = {} if text is None else {"value": {"text": text, "files": list(files or [])}}
    return gr.MultimodalTextbox(interactive=True, submit_btn=True, stop_btn=False, **value)


class Handlers:
    """Events of one page, over one engine. A tab's conversation is keyed by its session, so nothing travels twice."""

    def __init__(self, engine: Engine, options: Options, likes: Likes | None = None) -> None:
        self.engine, self.options, self.likes = engine, options, likes
        # Tabs that were opened, and whether each may have a conversation; when a tab was last left.
        self._opened: dict[Key, bool] = {}
        self._left: dict[Key, float] = {}

    # Answers

    def ask(
        self, message: dict[str, Any] | None, frames: float, request: gr.Request, *options: Any
    ) -> Iterator[Update]:
        text, files = (message or {}).get("text") or "", list((message or {}).get("files") or [])
        if text.strip() or files:
            yield from self._ask(text, files, request, options, int(frames))
        else:  # a key that was pressed twice, say
            yield gr.skip(), gr.skip(), gr.skip(), gr.skip(), gr.skip()

    def example(self, question: str, files: list[str]) -> Callable[..., Iterator[Update]]:
        """What the button of an example does. Nothing that a browser sends names its file."""

        def ask_example(request: gr.Request, *options: Any) -> Iterator[Update]:
            yield from self._ask(question, files, request, options)

        return ask_example

    def _ask(
        self, text: str, files: list[str], request: gr.Request, options: Sequence[Any], frames: int = 1
    ) -> Iterator[Update]:
        key = key_of(request)
        self._await_opened(key)
        chat = self.chat_of(key)
        if files and not text.strip():
            text = ASK_WITHOUT_WORDS
        sampled: list[Frames] = []

        def start() -> Iterator[Reply]:
            images, found = pictures(files, frames)
            sampled.extend(found)
            if found:
                above[-1] = views.user_message(text, images)
            return self.engine.reply(chat, text, images, Settings.from_dict(self.options.values(options)))

        above = [*views.messages(chat), views.user_message(text, files)]
        yield from self._show(
            key,
            start,
            above,
            lambda bad: box_open(text, [file for i, file in enumerate(files) if i != bad]),
            lambda: " ".join(map(str, sampled)),
        )

    def retry(self, retried: gr.RetryData, request: gr.Request, *options: Any) -> Iterator[Update]:
        """Answer a message again; the old answer stays as a branch."""
        yield from self._again(turn_index(retried.index), None, request, options)

    def edit(self, edited: gr.EditData, request: gr.Request, *options: Any) -> Iterator[Update]:
        """Answer a message in other words, from the state before it; what followed stays as a branch."""
        text = edited.value if isinstance(edited.value, str) else str(edited.value)
        yield from self._again(turn_index(edited.index), typed(text), request, options)

    def _again(self, index: int, text: str | None, request: gr.Request, options: Sequence[Any]) -> Iterator[Update]:
        key = key_of(request)
        chat = self.chat_of(key)
        turns = chat.turns
        above = views.messages(chat, index)
        if index < len(turns):
            turn = turns[index]
            above.append(views.user_message(turn.text if text is None else text, turn.images))
        yield from self._show(
            key,
            lambda: self.engine.retry(chat, Settings.from_dict(self.options.values(options)), index=index, text=text),
            above,
            lambda bad: box_open(),
        )

    def _show(
        self,
        key: Key,
        start: Callable[[], Iterator[Reply]],
        above: list[views.Message],
        give_back: Callable[[int | None], Any],
        note: Callable[[], str] = lambda: "",
    ) -> Iterator[Update]:
        """Lock the box, stream the answer, and open the box whatever happens.

        `above` is what stands above the answer. `give_back` opens the box with the message in it, less the image that
        was at fault, after an answer that came to nothing. `note` is shown with a good answer.
        """
        chat = self.chat_of(key)
        if self._is_lost(key):
            yield give_back(None), gr.skip(), gr.skip(), views.notice(FORGOTTEN), gr.skip()
            return
        if chat.busy:
            yield gr.skip(), gr.skip(), gr.skip(), views.notice(BUSY), gr.skip()
            return
        yield box_locked(), above, gr.skip(), "", gr.skip()
        reply, shown, metrics, bad = Reply(), "", Metrics(), None
        try:
            for reply in start():
                if reply.stage == "done" or self.engine.chats.get(key) is not chat:
                    continue  # whatever comes to an end is told below
                text = views.reply_text(reply)
                # An update without news costs nothing, and lets a closed page end this generator.
                history = gr.skip() if text == shown else [*above, _assistant(text)]
                figures = gr.skip() if reply.metrics in (metrics, Metrics()) else self._meter(reply.metrics)
                shown, metrics = text, reply.metrics
                yield gr.skip(), history, figures, gr.skip(), gr.skip()
        except EngineError as error:
            fault, bad = str(error), error.image
        except Exception:
            log.exception("an answer failed outside the engine")
            fault = UNEXPECTED
        else:
            fault = "" if reply.text or reply.finish_reason != "cancel" else NOTHING_YET
        now = self.engine.chats.get(key)
        if now is None:
            return  # the tab is closed
        if now is not chat:
            # Cleared meanwhile. Said once more, as the browser gets this generator's last update after that of `clear`.
            yield self.everything(now, box_open())
        elif fault:
            yield self.everything(chat, give_back(bad), fault)
        else:
            if chat.head is not None and chat.head.reply == reply.text:
                draw_named(chat.head)
            answer = views.answer(reply.text, chat.head.drawn if chat.head else None)
            yield box_open(), [*above, answer], self._meter(reply.metrics), views.notice(note()), self._branch(chat)

    def everything(self, chat: Chat, box: Any, note: str = "") -> Update:
        """Everything as the conversation has it."""
        last = chat.head.metrics if chat.head else Metrics()
        return box, views.messages(chat), self._meter(last), views.notice(note), self._branch(chat)

    def _branch(self, chat: Chat) -> Any:
        names, here = views.branch_names(chat), views.branch_of(chat)
        # Shown after an undo too: there is no other way forward again.
        return gr.Dropdown(choices=names, value=here, visible=len(names) > (here is not None))

    # Going back and forth

    def stop(self, request: gr.Request) -> None:
        self.chat_of(key_of(request)).stop()

    def undo(self, undone: gr.UndoData, request: gr.Request) -> Update:
        """Go back to before a message, which returns to the box; what was said stays as a branch."""
        chat = self.chat_of(key_of(request))
        if self._is_lost(key_of(request)):
            return gr.skip(), gr.skip(), gr.skip(), views.notice(FORGOTTEN), gr.skip()
        turns, index = chat.turns, turn_index(undone.index)
        if chat.busy or not 0 <= index < len(turns):
            return gr.skip(), views.messages(chat), gr.skip(), views.notice(BUSY if chat.busy else ""), gr.skip()
        chat.go_back(index)
        return self.everything(chat, box_open(turns[index].text, [str(image) for image in turns[index].images]))

    def pick(self, index: int | None, request: gr.Request) -> Update:
        """Stand at the end of another branch."""
        chat = self.chat_of(key_of(request))
        if self._is_lost(key_of(request)):
            return gr.skip(), gr.skip(), gr.skip(), views.notice(FORGOTTEN), gr.skip()
        if chat.busy or index is None:
            return gr.skip(), gr.skip(), gr.skip(), views.notice(BUSY if chat.busy else ""), self._branch(chat)
        chat.go_to(int(index))
        return self.everything(chat, gr.skip())

    def like(self, liked: gr.LikeData, request: gr.Request) -> str:
        """Keep a thumb; says so."""
        assert self.likes is not None, "without a file there are no thumbs"
        turns, index = self.chat_of(key_of(request)).turns, turn_index(liked.index)
        if not 0 <= index < len(turns):
            return ""
        try:
            self.likes.add(turns[index], liked.liked if isinstance(liked.liked, bool) else None, self.engine.info)
        except OSError:
            log.exception("a thumb could not be kept")
            return views.notice("Your thumb could not be kept: the server's file cannot be written.")
        return views.note(KEPT)

    def clear(self, request: gr.Request) -> Update:
        # What stands in the box stays: it may have been typed since the click.
        return self.everything(self.engine.chats.new(key_of(request)), box_open())

    def forget(self, request: gr.Request) -> None:
        """The tab was closed: all states are freed. A connection that broke, of a laptop that slept, looks the same,
        and such a tab goes on as if nothing had been: so what was said stays for a while."""
        key = key_of(request)
        chat = self.engine.chats.get(key)
        if chat is not None and chat.all_turns:
            chat.rest()
            self._left[key] = time.monotonic()
        else:
            self.engine.chats.drop(key)
            if chat is not None:
                self._opened[key] = False  # nothing is lost with it
        self._drop_left()

    def _drop_left(self) -> None:
        for key, since in list(self._left.items()):  # the longest unused first
            if len(self._left) > MOST_LEFT or time.monotonic() - since > LEFT_S:
                self._left.pop(key, None)
                self.engine.chats.drop(key)

    def opened(self, kept: str | None, request: gr.Request) -> tuple[Any, ...]:
        """A tab was opened: start loading the model, and show what the browser kept. Whoever was quicker and has asked
        something already keeps that."""
        key = key_of(request)
        self.engine.warm()
        self._drop_left()
        chat = self.engine.chats.get(key) or self.engine.chats.new(key)
        self._opened[key] = True
        while len(self._opened) > MOST_OPENED:
            del self._opened[next(iter(self._opened))]
        if chat.busy or chat.turns:
            return self.status(), gr.skip(), gr.skip(), gr.skip(), gr.skip(), SAME
        note = ""
        if kept:
            try:
                saving.fill(chat, json.loads(kept), self.engine.limits)
                note = RESTORED if chat.turns else ""
            except (EngineError, ValueError):
                log.warning("what a browser kept could not be read; it starts anew")
        _, history, meter, notice, branch = self.everything(chat, None, note)
        return self.status(), history, meter, notice, branch, FROM_LIST if note else SAME

    def _await_opened(self, key: Key) -> None:
        """A message can be quicker than the event that tells of its tab, which looks like a tab of another server."""
        until = time.monotonic() + OPENING_S
        while key not in self._opened and time.monotonic() < until:
            time.sleep(0.05)

    def tick(self) -> tuple[Any, Any]:
        """Progress of loading; ends the timer with it."""
        return self.status(), gr.Timer(active=self.engine.status.stage in ("idle", "loading"))

    def status(self) -> str:
        return views.model_status(self.engine.status, self.engine.info, self.engine.model)

    def _meter(self, metrics: Metrics) -> str:
        return views.meter(metrics, self.engine.info)

    def chat_of(self, key: Key) -> Chat:
        """The conversation of a tab, from now on again in use; an empty one beside the others if it was lost, so that
        nothing takes its place in the browser's own storage."""
        if self._left.pop(key, None) is not None:
            self._left[key] = time.monotonic()  # its browser does not tell a second time that it has left
        if self._is_lost(key):
            return Chat(self.engine.chats.states)
        self._opened[key] = True
        return self.engine.chats.get(key) or self.engine.chats.new(key)

    def _is_lost(self, key: Key) -> bool:
        """Whether the server let a tab's conversation go, or never knew it: then it was another server's, before this
        one was started."""
        return self._opened.get(key, True) and self.engine.chats.get(key) is None

    # The model

    def need(self, model: str | None, precision: str | None) -> str:
        """What loading a model would take, said before it is loaded."""
        try:
            need = self.engine.models.need(model or "", precision or "auto")  # type: ignore[arg-type]
        except EngineError as error:
            return views.note(str(error))
        if need is None:
            return ""
        return views.note(f"N{str(need)[1:]}." if need.fits else f"Does not fit: {need}.")

    def switch(self, model: str | None, precision: str) -> Iterator[tuple[Any, Any, Any]]:
        """(button, status, notice) while another model is loaded; the old one stays if that fails."""
        yield gr.Button(interactive=False), gr.skip(), ""
        fault = ""
        try:
            for status in self.engine.switch(model or "", precision):  # type: ignore[arg-type]
                yield gr.skip(), views.model_status(status, None, model or ""), gr.skip()
        except EngineError as error:
            fault = f"{str(error).rstrip('.')}. {Path(self.engine.model).name} goes on answering."
        except Exception:
            log.exception("switching the model failed")
            fault = UNEXPECTED
        yield gr.Button(interactive=True), self.status(), views.notice(fault)


def turn_index(index: int | tuple[int, ...] | list[int]) -> int:
    """The turn of a message of the Chatbot: a question and its answer are two, and one with pictures has parts."""
    message = index if isinstance(index, int) else index[0]
    return int(message) // 2


def draw_named(turn: Turn) -> None:
    """Draw the places that an answer names on the newest picture; says nothing if that picture is gone."""
    places = find_places(turn.reply)
    image = next((turn.images[-1] for turn in reversed(turn.path) if turn.images), None)
    if not places or image is None:
        return
    try:
        picture = draw_places(open_image(image), places)
    except EngineError:
        return
    path = scratch_folder("boxes") / f"{Path(image).stem}-boxes.png"
    picture.save(path)
    turn.drawn = str(path)


def _assistant(text: str) -> views.Message:
    return {"role": "assistant", "content": text}


def key_of(request: gr.Request) -> Key:
    return "tab", str(request.session_hash)
