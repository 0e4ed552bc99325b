"""What the page's and the endpoint's events do: the engine's replies turned into updates of components."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import gradio as gr

from app import views
from app.chat import Chat, Key, Metrics, new_session_id
from app.engine import Engine, EngineError, Reply, Settings

log = logging.getLogger(__name__)

ASK_WITHOUT_WORDS = "What is in the picture?"
UNEXPECTED = "Something went wrong on the server. Nothing of the conversation is lost; try again."
BUSY = "An answer is being written. Wait for it, or stop it first."
NOTHING_YET = "Stopped before the first word; the conversation is as it was."
FORGOTTEN = "The server no longer held the earlier conversation (too long unused, or restarted): this is a new one."

# Updates of (box, chat, meter, notice), in this order.
Update = tuple[Any, Any, Any, Any]


def box_locked() -> Any:
    return gr.MultimodalTextbox(value={"text": "", "files": []}, interactive=False, submit_btn=False, stop_btn=True)


def box_open(text: str | None = None, files: list[str] | None = None) -> Any:
    """The message box ready to type in; with `text`, also what it holds."""
    value: dict[str, Any] = {} if text is None else {"value": {"text": text, "files": files or []}}
    return gr.MultimodalTextbox(interactive=True, submit_btn=True, stop_btn=False, **value)


class Handlers:
    """Events of one page, over one engine. A tab's conversation is keyed by its session, so nothing travels twice."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    # The page

    def ask(
        self,
        message: dict[str, Any] | None,
        temperature: float,
        top_p: float,
        max_new_tokens: float,
        max_tiles: float,
        greedy: bool,
        request: gr.Request,
    ) -> Iterator[Update]:
        text, files = (message or {}).get("text") or "", list((message or {}).get("files") or [])
        settings = _settings(temperature, top_p, max_new_tokens, max_tiles, greedy)
        yield from self._ask(text, files, settings, request)

    def example(self, question: str, files: list[str]) -> Callable[..., Iterator[Update]]:
        """What the button of an example does. Nothing that a browser sends names its file."""

        def ask_example(
            temperature: float,
            top_p: float,
            max_new_tokens: float,
            max_tiles: float,
            greedy: bool,
            request: gr.Request,
        ) -> Iterator[Update]:
            settings = _settings(temperature, top_p, max_new_tokens, max_tiles, greedy)
            yield from self._ask(question, files, settings, request)

        return ask_example

    def _ask(self, text: str, files: list[str], settings: dict[str, Any], request: gr.Request) -> Iterator[Update]:
        key = _key(request)
        note = "" if self.engine.chats.get(key) else FORGOTTEN
        chat = self._chat(key)
        if files and not text.strip():
            text = ASK_WITHOUT_WORDS
        yield from self._show(
            key,
            lambda: self.engine.reply(chat, text, files, Settings.from_dict(settings)),
            [*views.messages(chat), views.user_message(text, files)],
            lambda bad: box_open(text, [file for i, file in enumerate(files) if i != bad]),
            note,
        )

    def retry(
        self,
        temperature: float,
        top_p: float,
        max_new_tokens: float,
        max_tiles: float,
        greedy: bool,
        request: gr.Request,
    ) -> Iterator[Update]:
        key = _key(request)
        chat = self._chat(key)
        settings = _settings(temperature, top_p, max_new_tokens, max_tiles, greedy)
        yield from self._show(
            key,
            lambda: self.engine.retry(chat, Settings.from_dict(settings)),
            views.messages(chat)[:-1],
            lambda bad: box_open(),
        )

    def _show(
        self,
        key: Key,
        start: Callable[[], Iterator[Reply]],
        above: list[views.Message],
        give_back: Callable[[int | None], Any],
        note: str = "",
    ) -> Iterator[Update]:
        """Lock the box, stream the answer, and open the box whatever happens.

        `above` is what stands above the answer. `give_back` opens the box with the message in it, less the image that
        was at fault, after an answer that came to nothing. `note` is shown with a good answer.
        """
        chat = self._chat(key)
        if chat.busy:
            yield gr.skip(), gr.skip(), gr.skip(), views.notice(BUSY)
            return
        yield box_locked(), above, gr.skip(), ""
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
                yield gr.skip(), history, figures, gr.skip()
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
        last = now.turns[-1].metrics if now.turns else Metrics()
        if now is not chat:
            # Cleared meanwhile. Said once more, as the browser gets this generator's last update after that of `clear`.
            yield box_open(), views.messages(now), self._meter(last), ""
        elif fault:
            yield give_back(bad), views.messages(chat), self._meter(last), views.notice(fault)
        else:
            answer = _assistant(views.reply_text(reply))
            yield box_open(), [*above, answer], self._meter(reply.metrics), views.notice(note)

    def stop(self, request: gr.Request) -> None:
        self._chat(_key(request)).stop()

    def clear(self, request: gr.Request) -> Update:
        self.engine.chats.new(_key(request))
        return box_open("", []), [], self._meter(Metrics()), ""

    def forget(self, request: gr.Request) -> None:
        """The tab was closed."""
        self.engine.chats.drop(_key(request))

    def opened(self, request: gr.Request) -> tuple[str, str]:
        """A tab was opened: start loading the model."""
        self.engine.chats.new(_key(request))
        self.engine.warm()
        return self.status(), self._meter(Metrics())

    def tick(self) -> tuple[Any, Any]:
        """Progress of loading; ends the timer with it."""
        return self.status(), gr.Timer(active=self.engine.status.stage in ("idle", "loading"))

    def status(self) -> str:
        return views.model_status(self.engine.status, self.engine.info, self.engine.model)

    def _meter(self, metrics: Metrics) -> str:
        return views.meter(metrics, self.engine.info)

    def _chat(self, key: Key) -> Chat:
        return self.engine.chats.get(key) or self.engine.chats.new(key)

    # The endpoint

    def chat(
        self,
        message: dict[str, Any] | None,
        session_id: str = "",
        temperature: float = 0.3,
        top_p: float = 0.9,
        max_new_tokens: float = 256,
        max_tiles: float = 0,
        greedy: bool = False,
        seed: float | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Ask about images, or go on with a conversation; streams the answer.

        Each update holds the whole answer so far: {"text", "finish_reason" (null until the last update, then "stop",
        "length" or "cancel"), "metrics" ("ttft_ms", "tok_per_sec", "num_tokens", "num_tiles", "text_tokens",
        "image_tokens", "state_bytes"), "session_id" (pass it with the next message to go on)}.
        """
        text, files = (message or {}).get("text") or "", list((message or {}).get("files") or [])
        chat: Chat | None = None
        try:
            settings = _settings(temperature, top_p, max_new_tokens, max_tiles, greedy) | {"seed": seed}
            session_id = str(session_id or "").strip()
            chat = self.engine.chats.get(("api", session_id)) if session_id else None
            if session_id and chat is None:
                raise EngineError(
                    "This session_id is not known: it has ended or was unused for long. Leave it empty to start anew."
                )
            if chat is None:
                session_id = new_session_id()
                chat = self.engine.chats.new(("api", session_id))
            for reply in self.engine.reply(chat, text, files, Settings.from_dict(settings)):
                yield {
                    "text": reply.text,
                    "finish_reason": reply.finish_reason,
                    "metrics": asdict(reply.metrics),
                    "session_id": session_id,
                }
        except EngineError as error:
            if chat is not None and not chat.turns:
                self.engine.chats.drop(("api", session_id))
            raise gr.Error(str(error), print_exception=False) from error


def _settings(
    temperature: float, top_p: float, max_new_tokens: float, max_tiles: float, greedy: bool
) -> dict[str, Any]:
    return {
        "temperature": temperature,
        "top_p": top_p,
        "max_new_tokens": max_new_tokens,
        "max_tiles": max_tiles,
        "greedy": greedy,
    }


def _assistant(text: str) -> views.Message:
    return {"role": "assistant", "content": text}


def _key(request: gr.Request) -> Key:
    return "tab", str(request.session_hash)
