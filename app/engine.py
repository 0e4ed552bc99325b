"""Answers, one message at a time, from the state that the conversation has. Knows nothing of Gradio.

An answer is computed in the lane's thread on a fork of the state before it and committed when it is whole, so an error
leaves the conversation as it was, and a stopped answer is kept with a state that has seen exactly what is shown.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from app.backend import Device, Loader, ModelInfo, load_backend
from app.chat import Chat, ChatStore
from app.errors import EngineError, plain
from app.follow import BEAT_S, LoadStatus, Mailbox, Reply, follow
from app.lane import Job, Lane, LaneFull, Run
from app.models import Models, Need, memory_need
from app.precision import PRECISIONS, Precision
from app.settings import Limits, Settings
from app.states import State
from app.turns import Cancelled, Request, Turns, open_image

__all__ = ["Engine", "EngineError", "Limits", "LoadStatus", "Reply", "Settings"]

log = logging.getLogger(__name__)
T = TypeVar("T")


class Engine:
    """Models, one compute lane, and the conversations (`chats`)."""

    def __init__(
        self,
        model: str = "nano-linear",
        device: Device = "auto",
        precision: Precision = "auto",
        *,
        limits: Limits | None = None,
        chats: ChatStore | None = None,
        loader: Loader = load_backend,
        need: Need = memory_need,
        max_waiting: int = 16,
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f'precision "{precision}" is not known; use one of {", ".join(PRECISIONS)}')
        self.limits = limits or Limits()
        self.chats = ChatStore() if chats is None else chats  # an empty store is falsy
        self.turns = Turns(self.chats.states)
        self.models = Models(model, device, precision, loader, need)
        self.lane = Lane(max_waiting)

    @property
    def model(self) -> str:
        return self.models.model

    @property
    def status(self) -> LoadStatus:
        return self.models.status

    @property
    def info(self) -> ModelInfo | None:
        """About the model; None until it is loaded."""
        return self.models.info

    def warm(self) -> None:
        """Start loading the model, if nobody has yet, and return at once; `status` tells how it goes."""
        if self.models.current is None and self.lane.idle:
            self.models.status = LoadStatus("loading", 0.0, "starting")
            self.lane.submit(self._load_quietly)

    def reply(
        self,
        chat: Chat,
        text: str,
        images: Sequence[str | Path] = (),
        settings: Settings | None = None,
        cancel: threading.Event | None = None,
        *,
        after: int | None = None,
    ) -> Iterator[Reply]:
        """Answer a new message of `chat`; only this message is read, the rest is in the state.

        Yields at most every 50 ms and at least every 100 ms. Setting `cancel` (or `chat.stop()`), or closing the
        iterator, ends the answer: what is written by then is kept as a whole turn.

        Args:
            after: how many turns of the conversation to keep before the message; None is all. What was said after them
                stays as a branch.
        Raises: EngineError for anything that went wrong; `chat` is then as it was before.
        """
        settings = self.limits.checked(text, images, settings)
        if not self.lane.idle:
            # Say it before a long wait; the pixels are not kept meanwhile.
            for i, image in enumerate(images):
                open_image(image, i)

        def request() -> Request:
            turns = chat.turns[:after]
            return Request(turns[-1] if turns else None, text, tuple(images))

        yield from self._answer(chat, request, settings, cancel)

    def retry(
        self,
        chat: Chat,
        settings: Settings | None = None,
        cancel: threading.Event | None = None,
        *,
        index: int = -1,
        text: str | None = None,
    ) -> Iterator[Reply]:
        """Answer a message again, the last one or number `index`, with other words if `text` is given, from the state
        before it. The old answer stays as a branch. Like `reply` otherwise."""
        settings = self.limits.checked(text, (), settings)

        def again() -> Request:
            turns = chat.turns
            if not -len(turns) <= index < len(turns):
                what = "the conversation is empty" if not turns else f"it has {len(turns)} turns"
                raise EngineError(f"There is nothing to answer again: {what}.")
            turn = turns[index]
            return Request(turn.parent, turn.text if text is None else text, turn.images)

        yield from self._answer(chat, again, settings, cancel)

    def submit(self, run: Run, owner: object = None) -> Job:
        """Give work to the lane.  Raises: EngineError if too much waits already."""
        try:
            return self.lane.submit(run, owner)
        except LaneFull:
            raise EngineError(
                f"{self.lane.max_waiting} messages wait for an answer already. Try again in a minute.", blame="busy"
            ) from None

    def run(self, work: Callable[[], T], timeout_s: float = 60.0) -> T:
        """Do something short in the lane, where no model is at work, and wait for it.

        Raises: what `work` raises; EngineError if others took too long.
        """
        out: list[T] = []
        errors: list[Exception] = []
        ended = threading.Event()

        def job() -> None:
            try:
                out.append(work())
            except Exception as error:
                errors.append(error)
            finally:
                ended.set()

        waiting = self.submit(job)
        if not ended.wait(timeout_s) and self.lane.drop(waiting):
            raise EngineError("The answers of others take too long. Try again in a minute.", blame="busy")
        ended.wait()
        if errors:
            raise errors[0]
        return out[0]

    def switch(self, model: str, precision: Precision) -> Iterator[LoadStatus]:
        """Load another model, and have it answer from now on; how it goes, at least every 100 ms.

        Raises: EngineError if it cannot be loaded or does not fit; the old one goes on answering then.
        """
        if precision not in PRECISIONS:
            raise EngineError(f'The precision "{precision}" is not known; use one of {", ".join(PRECISIONS)}.')
        if not model.strip():
            raise EngineError("Name a model: a bundled one, a directory or a hub id.")
        errors: list[EngineError] = []
        ended = threading.Event()

        def job() -> None:
            try:
                self.models.switch(model.strip(), precision)
            except EngineError as error:
                errors.append(error)
            finally:
                ended.set()

        self.submit(job)
        while not ended.wait(BEAT_S):
            yield self.models.status
        if errors:
            raise errors[0]
        yield self.models.status

    def save_state(self, chat: Chat, write: Callable[[ModelInfo, State], None]) -> None:
        """Call `write` in the lane with the model and the state at the end of `chat`; read again if it was let go.

        Raises: EngineError if there is nothing to save.
        """
        if chat.head is None:
            raise EngineError("There is nothing to save yet: the conversation is empty.")

        def work() -> None:
            backend = self.models.get()
            state, _ = self.turns.state_after(backend, chat.head, threading.Event())
            write(backend.info, state)

        self.run(work, timeout_s=600)

    def adopt_state(self, chat: Chat, path: Path, check: Callable[[ModelInfo], None]) -> float:
        """Give the end of `chat` a state from a file, if `check` accepts the model; the milliseconds that took.

        Raises: EngineError if the state does not fit.
        """
        head = chat.head
        if head is None:
            raise EngineError("The file holds a memory but no conversation; open one that this page has saved.")

        def work() -> float:
            backend = self.models.get()
            check(backend.info)
            started = time.monotonic()
            try:
                state = backend.mover.load_state(path)
            except (ValueError, KeyError, OSError) as error:
                raise EngineError("The memory in this file is damaged; save the conversation again.") from error
            head.snapshots[backend.key] = self.chats.states.keep(state, backend.mover)
            return 1e3 * (time.monotonic() - started)

        return self.run(work)

    def _answer(
        self, chat: Chat, request: Callable[[], Request], settings: Settings, cancel: threading.Event | None
    ) -> Iterator[Reply]:
        cancel = cancel or threading.Event()
        mailbox = Mailbox()
        chat.resting = False
        with chat.running(cancel):
            job = self.submit(lambda: self._work(chat, request, settings, cancel, mailbox), owner=chat)
            try:
                yield from follow(self.lane, job, mailbox, cancel, self.models)
            except GeneratorExit:
                cancel.set()
                self.lane.drop(job)
                raise

    def _work(
        self,
        chat: Chat,
        request: Callable[[], Request],
        settings: Settings,
        cancel: threading.Event,
        mailbox: Mailbox,
    ) -> None:
        """The job: runs in the lane, and whatever happens, `mailbox` ends with a last reply or an error."""
        try:
            if cancel.is_set():
                raise Cancelled
            self.turns.answer(self.models.get(), chat, request(), settings, cancel, mailbox.put)
        except Cancelled:
            mailbox.put(Reply(stage="done", finish_reason="cancel"))
        except EngineError as error:
            mailbox.put(error)
        except Exception as error:
            log.exception("an answer failed")
            mailbox.put(EngineError(plain(error), blame="server"))
        finally:
            if chat.closed:
                chat.close()
            elif chat.resting:
                chat.rest()

    def _load_quietly(self) -> None:
        try:
            self.models.get()
        except EngineError:
            log.warning("the model is not loaded; the next message tries again")
