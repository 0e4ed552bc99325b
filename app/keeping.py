"""What the chat's events of keeping do: the browser's copy, files out, files in."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from app import saving, views
from app.chat import Chat
from app.engine import EngineError
from app.handlers import BUSY, FROM_FILE, FROM_LIST, KEEP_NOTHING, SAME, UNEXPECTED, Handlers, box_open, key_of
from app.scratch import scratch_folder

log = logging.getLogger(__name__)


class Keeping:
    """Events beside those of `Handlers`, over the same conversations."""

    def __init__(self, handlers: Handlers) -> None:
        self.handlers = handlers

    def remember(self, keep: bool, request: gr.Request, *options: Any) -> str:
        """What the browser keeps of the conversation: nothing if it is not to, or if it is too large; what it has, if
        the server has none."""
        if not keep:
            return KEEP_NOTHING
        chat = self.handlers.engine.chats.get(key_of(request))
        if chat is None:
            return SAME
        return saving.for_browser(chat, self.handlers.options.values(options)) or KEEP_NOTHING

    def save(self, how: str, request: gr.Request, *options: Any) -> tuple[Any, Any]:
        """(download, notice): the conversation as a file."""
        chat = self.handlers.chat_of(key_of(request))
        try:
            path = self._file(chat, how, self.handlers.options.values(options))
        except EngineError as error:
            return gr.skip(), views.notice(str(error))
        return gr.DownloadButton(value=str(path)), ""

    def _file(self, chat: Chat, how: str, settings: dict[str, Any]) -> Path:
        if not chat.turns:
            raise EngineError("There is nothing to save yet: the conversation is empty.")
        folder = scratch_folder("saved")
        record = saving.to_dict(chat, settings, self.handlers.engine.info)
        if how == "markdown":
            path = folder / "conversation.md"
            path.write_text(saving.to_markdown(chat, f"A conversation with {record['model'] or 'mmMamba'}"), "utf-8")
        elif how == "state":
            path = folder / "conversation.mmmamba"
            self.handlers.engine.save_state(
                chat, lambda info, state: saving.write_with_state(path, saving.to_dict(chat, settings, info), state)
            )
        else:
            path = folder / "conversation.json"
            path.write_text(json.dumps(record, ensure_ascii=False, indent=1), encoding="utf-8")
        return path

    def open(self, file: str | None, request: gr.Request) -> tuple[Any, ...]:
        """(*page, *options, how): go on with a saved conversation; the one that was there stays if the file cannot be
        used."""
        return self._go_on(FROM_FILE, request, (lambda folder: saving.read_file(Path(file), folder)) if file else None)

    def reopen(self, record: str, request: gr.Request) -> tuple[Any, ...]:
        """As `open`, for a conversation of the browser's list; an empty one is no longer there."""
        return self._go_on(FROM_LIST, request, lambda folder: (saving.read_json(record), None))

    def _go_on(
        self, how: str, request: gr.Request, read: Callable[[Path], tuple[Any, Path | None]] | None
    ) -> tuple[Any, ...]:
        def as_it_was(fault: str) -> tuple[Any, ...]:
            same = [gr.skip()] * len(self.handlers.options.NAMES)
            return gr.skip(), gr.skip(), gr.skip(), views.notice(fault), gr.skip(), *same, SAME

        key = key_of(request)
        chat = self.handlers.chat_of(key)
        if read is None or chat.busy:
            return as_it_was(BUSY if read else "")
        opened = Chat(self.handlers.engine.chats.states)
        try:
            with tempfile.TemporaryDirectory() as folder:
                record, state = read(Path(folder))
                settings = saving.fill(opened, record, self.handlers.engine.limits)
                note = "Opened. The next question reads the conversation again, once."
                if state is not None:
                    ms = self.handlers.engine.adopt_state(opened, state, lambda info: saving.check_model(record, info))
                    note = f"Opened with its memory in {ms:.0f} ms: nothing has to be read again."
        except EngineError as error:
            opened.close()
            return as_it_was(str(error))
        except Exception:
            log.exception("a saved conversation could not be opened")
            opened.close()
            return as_it_was(UNEXPECTED)
        self.handlers.engine.chats.put(key, opened)
        shown = self.handlers.everything(opened, box_open("", []), note)
        return *shown, *self.handlers.options.restore(settings), how
