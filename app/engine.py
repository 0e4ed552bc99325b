"""Loads the model and answers, one message at a time. Knows nothing of Gradio.

An answer is computed in the lane's thread on a clone of the conversation's state and committed when it is whole, so an
error leaves the conversation as it was, and a stopped answer is kept with a state that has seen exactly what is shown.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from app.backend import DTYPES, Backend, Device, Dtype, Loader, ModelInfo, load_backend
from app.chat import Chat, ChatStore, FinishReason, Metrics, Turn
from app.errors import EngineError
from app.lane import Job, Lane, LaneFull
from app.settings import Limits, Settings

__all__ = ["Engine", "EngineError", "Limits", "LoadStatus", "Reply", "Settings"]

log = logging.getLogger(__name__)

MIN_GAP_S = 0.05  # between two updates: each costs the page about 5 ms
BEAT_S = 0.08  # without news an update is repeated, so that a closed page or a stop is noticed
STOP_GRACE_S = 0.25  # a stopped answer that has not ended by then (a long prefill) ends out of sight


@dataclass(frozen=True)
class LoadStatus:
    """`progress` from 0 to 1, `note` says what is being done or what went wrong."""

    stage: Literal["idle", "loading", "ready", "failed"] = "idle"
    progress: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Reply:
    """The answer so far. The last one of an answer has `stage` "done" and a `finish_reason`.

    `ahead` counts the messages that come first while waiting; `progress` and `note` tell of loading.
    A stop before the first word ends with an empty `text`, and the conversation stays as it was.
    """

    text: str = ""
    stage: Literal["waiting", "loading", "reading", "writing", "done"] = "waiting"
    ahead: int = 0
    progress: float = 0.0
    note: str = ""
    metrics: Metrics = field(default_factory=Metrics)
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class _Request:
    index: int
    text: str
    images: tuple[str | Path, ...]


class _Mailbox:
    """The newest reply of an answer being computed, its error, or its end."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._fresh = False
        self.reply: Reply | None = None
        self.error: EngineError | None = None

    @property
    def ended(self) -> bool:
        return self.error is not None or (self.reply is not None and self.reply.stage == "done")

    def put(self, item: Reply | EngineError) -> None:
        with self._changed:
            if isinstance(item, Reply):
                self.reply = item
            else:
                self.error = item
            self._fresh = True
            self._changed.notify_all()

    def wait(self, timeout: float) -> None:
        """Return at news, or after `timeout` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._fresh, timeout)
            self._fresh = False


class Engine:
    """One model, one compute lane, and the conversations (`chats`)."""

    def __init__(
        self,
        model: str = "nano",
        device: Device = "auto",
        dtype: Dtype = "auto",
        *,
        limits: Limits | None = None,
        chats: ChatStore | None = None,
        loader: Loader = load_backend,
        max_waiting: int = 16,
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f'dtype "{dtype}" is not known; use one of {", ".join(DTYPES)}')
        self.model, self.device, self.dtype = model, device, dtype
        self.limits = limits or Limits()
        self.chats = chats or ChatStore()
        self.status = LoadStatus()
        self._loader = loader
        self._backend: Backend | None = None
        self._lane = Lane(max_waiting)

    @property
    def info(self) -> ModelInfo | None:
        """About the model; None until it is loaded."""
        return self._backend.info if self._backend else None

    def warm(self) -> None:
        """Start loading the model, if nobody has yet, and return at once; `status` tells how it goes."""
        if self._backend is None and self._lane.idle:
            self.status = LoadStatus("loading", 0.0, "starting")
            self._lane.submit(self._load_quietly)

    def reply(
        self,
        chat: Chat,
        text: str,
        images: Sequence[str | Path] = (),
        settings: Settings | None = None,
        cancel: threading.Event | None = None,
    ) -> Iterator[Reply]:
        """Answer a new message of `chat`; only this message is read, the rest is in the state.

        Yields at most every 50 ms and at least every 100 ms. Setting `cancel` (or `chat.stop()`), or closing the
        iterator, ends the answer: what is written by then is kept as a whole turn.

        Raises: EngineError for anything that went wrong; `chat` is then as it was before.
        """
        settings = self._checked(text, images, settings)
        request = _Request(-1, text, tuple(images))
        if not self._lane.idle:
            # Say it before a long wait; the pixels are not kept meanwhile.
            for i, image in enumerate(images):
                _open(image, i)
        yield from self._answer(chat, lambda: replace(request, index=len(chat.turns)), settings, cancel)

    def retry(
        self, chat: Chat, settings: Settings | None = None, cancel: threading.Event | None = None
    ) -> Iterator[Reply]:
        """Answer the last message again, from the state before it; the old answer is replaced when the new one is
        whole. Like `reply` otherwise."""
        settings = self._checked(None, (), settings)

        def last() -> _Request:
            if not chat.turns:
                raise EngineError("There is nothing to answer again: the conversation is empty.")
            turn = chat.turns[-1]
            return _Request(len(chat.turns) - 1, turn.text, turn.images)

        yield from self._answer(chat, last, settings, cancel)

    def _checked(self, text: str | None, images: Sequence[str | Path], settings: Settings | None) -> Settings:
        settings, limits = settings or Settings(), self.limits
        if text is not None:
            if not text.strip():
                raise EngineError("The message is empty. Type a question.")
            if len(text) > limits.max_text_chars:
                raise EngineError(
                    f"The message has {len(text):,} characters; {limits.max_text_chars:,} fit. Send it in parts."
                )
        if len(images) > limits.max_images:
            raise EngineError(
                f"The message has {len(images)} images; {limits.max_images} fit. Send the others with the next message."
            )
        for name in ("max_new_tokens", "max_tiles"):
            value, limit = getattr(settings, name), getattr(limits, name)
            if value > limit:
                raise EngineError(f"{name} is {value}; this server allows up to {limit}.")
        return settings

    def _answer(
        self, chat: Chat, request: Callable[[], _Request], settings: Settings, cancel: threading.Event | None
    ) -> Iterator[Reply]:
        cancel = cancel or threading.Event()
        mailbox = _Mailbox()
        with chat.running(cancel):
            try:
                job = self._lane.submit(lambda: self._work(chat, request, settings, cancel, mailbox))
            except LaneFull:
                raise EngineError(
                    f"{self._lane.max_waiting} messages wait for an answer already. Try again in a minute."
                ) from None
            try:
                yield from self._follow(job, mailbox, cancel)
            except GeneratorExit:
                cancel.set()
                self._lane.drop(job)
                raise

    def _follow(self, job: Job, mailbox: _Mailbox, cancel: threading.Event) -> Iterator[Reply]:
        """What to show of a job until it ends."""
        cancelled_at = None
        last = 0.0
        while True:
            mailbox.wait(BEAT_S)
            if not mailbox.ended:
                time.sleep(max(0.0, last + MIN_GAP_S - time.monotonic()))
            last = time.monotonic()
            if mailbox.error is not None:
                raise mailbox.error
            reply = mailbox.reply or self._before(job)
            if not mailbox.ended and cancel.is_set():
                cancelled_at = cancelled_at or last
                if self._lane.drop(job) or last - cancelled_at > STOP_GRACE_S:
                    reply = replace(reply, stage="done", finish_reason="cancel")
            yield reply
            if reply.stage == "done":
                return

    def _before(self, job: Job) -> Reply:
        """What to show before there is anything to show of the answer."""
        ahead, status = self._lane.ahead(job), self.status
        if status.stage == "loading":
            return Reply(stage="loading", progress=status.progress, note=status.note)
        return Reply(stage="waiting", ahead=ahead)

    def _work(
        self,
        chat: Chat,
        request: Callable[[], _Request],
        settings: Settings,
        cancel: threading.Event,
        mailbox: _Mailbox,
    ) -> None:
        """The job: runs in the lane, and whatever happens, `mailbox` ends with a last reply or an error."""
        try:
            if cancel.is_set():
                mailbox.put(Reply(stage="done", finish_reason="cancel"))
            else:
                self._turn(self._load(), chat, request(), settings, cancel, mailbox)
        except EngineError as error:
            mailbox.put(error)
        except Exception as error:
            log.exception("an answer failed")
            mailbox.put(EngineError(_plain(error)))

    def _turn(
        self,
        backend: Backend,
        chat: Chat,
        request: _Request,
        settings: Settings,
        cancel: threading.Event,
        mailbox: _Mailbox,
    ) -> None:
        started = time.monotonic()
        mailbox.put(Reply(stage="reading"))
        before = chat.state_before(request.index)
        state = backend.new_state() if before is None else before.clone()
        tiles = [backend.tile(_open(image, i), settings.max_tiles or None) for i, image in enumerate(request.images)]
        images_before = sum(len(turn.images) for turn in chat.turns[: request.index])
        num_tiles = [len(t) for t in tiles]
        ids = backend.encode(request.text, num_tiles, first=before is None, images_before=images_before)
        prepared_ms = 1000 * (time.monotonic() - started)
        reply = Reply(stage="writing")
        for event in backend.stream(ids, tiles, state, settings, cancel):
            metrics = Metrics(
                ttft_ms=None if event.ttft_ms is None else event.ttft_ms + prepared_ms,
                tok_per_sec=event.tok_per_sec,
                num_tokens=event.num_tokens,
                num_tiles=sum(num_tiles),
                text_tokens=state.num_text_tokens,
                image_tokens=state.num_image_tokens,
                state_bytes=state.nbytes,
            )
            reply = Reply(event.reply, "writing", metrics=metrics, finish_reason=event.finish_reason)
            if event.finish_reason is None:
                mailbox.put(reply)
        if reply.finish_reason is None:
            raise RuntimeError("the model's stream ended without a finish_reason")
        if reply.text or reply.finish_reason != "cancel":
            turn = Turn(request.text, request.images, reply.text, reply.finish_reason, reply.metrics, state)
            chat.commit(request.index, turn)
            self.chats.trim()
        mailbox.put(replace(reply, stage="done"))

    def _load_quietly(self) -> None:
        try:
            self._load()
        except EngineError:
            log.warning("the model is not loaded; the next message tries again")

    def _load(self) -> Backend:
        """The model, loaded if it is not yet. A failed load is tried again by the next message."""
        if self._backend is None:
            self.status = LoadStatus("loading", 0.0, "starting")

            def progress(fraction: float, note: str) -> None:
                self.status = LoadStatus("loading", min(max(fraction, 0.0), 1.0), note)

            try:
                self._backend = self._loader(self.model, self.device, self.dtype, progress)
            except Exception as error:
                log.exception("loading the model failed")
                reason = str(error) if isinstance(error, OSError) else _plain(error)
                note = f"could not be loaded: {_without_folders(reason)}"
                self.status = LoadStatus("failed", 0.0, note)
                raise EngineError(f'The model "{Path(self.model).name}" {note}') from error
            self.status = LoadStatus("ready", 1.0, "")
        return self._backend


def _open(image: str | Path, index: int) -> Any:
    """Decode an image. Raises: EngineError that names the file."""
    from mmmamba.image import ImageError, load_image

    name = Path(image).name
    try:
        return load_image(image)
    except ImageError as error:
        message = str(error).replace(str(image), name)
        raise EngineError(message if name in message else f"{name}: {message}", image=index) from error


def _plain(error: Exception) -> str:
    """An unexpected fault in words for the person at the page; the log has the rest."""
    if isinstance(error, MemoryError) or "out of memory" in str(error) or "allocate memory" in str(error):
        return "There is not enough memory for this. Use fewer or smaller images, fewer tiles, or a new chat."
    if isinstance(error, ValueError):
        return _without_folders(str(error))
    return "Something went wrong inside the model; the conversation is as it was. The server's log has the details."


def _without_folders(text: str) -> str:
    """Absolute paths cut to their last part: where things lie on the server is not for its visitors."""
    return re.sub(r"""(?<![\w:/.])(?:[A-Z]:\\|/)(?:[^\s/\\:;,"']+[/\\])+(?=[^\s/\\:;,"'])""", "", text)
