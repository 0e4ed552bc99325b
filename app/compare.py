"""One prompt through several models, in turn on one device; what each says and costs, live. No Gradio in it.

Each model has a conversation of its own that goes on from question to question, so that the context grows in both.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from app.chat import Chat
from app.engine import Engine
from app.errors import EngineError, plain
from app.follow import BEAT_S, MIN_GAP_S, STOP_GRACE_S, Reply
from app.metrics import Agreement, Figures, Trace, agreement, figures, smooth
from app.settings import Settings
from app.sides import kind_of
from app.turns import Cancelled, Request

MOST_POINTS = 240  # of a line in the chart


@dataclass(frozen=True)
class Side:
    """One model's part. `kind` is "" until it is loaded, if it is none of those known by name; so is `precision`, what
    its weights are held in. `trace` is what was observed of this answer; `latency` and `memory` hold (tokens of
    context, milliseconds or bytes) for every token of the conversation so far."""

    name: str
    kind: str = ""
    precision: str = ""
    stage: Literal["waiting", "loading", "reading", "writing", "done", "failed"] = "waiting"
    text: str = ""
    note: str = ""
    trace: Trace | None = None
    latency: tuple[tuple[float, float], ...] = ()
    memory: tuple[tuple[float, float], ...] = ()

    @property
    def figures(self) -> Figures | None:
        return None if self.trace is None else figures(self.trace)


@dataclass(frozen=True)
class Comparison:
    """Where a comparison stands. `ahead` and `wait_s` are the lane's while it has not begun."""

    question: str
    images: tuple[str | Path, ...]
    sides: tuple[Side, ...]
    ahead: int = 0
    wait_s: float | None = None
    done: bool = False

    @property
    def agreement(self) -> Agreement | None:
        """Of the first answer and the last one, once all are whole."""
        return next(iter(self.agreements.values()), None)

    @property
    def agreements(self) -> dict[str, Agreement]:
        """Of every answer with that of the last model, by model, once all are whole; a failed one has none."""
        if not self.sides:
            return {}
        *others, last = self.sides
        if last.stage != "done" or any(side.stage not in ("done", "failed") for side in others):
            return {}
        return {side.name: agreement(side.text, last.text) for side in others if side.stage == "done"}


class Compare:
    """The conversations of one visitor with each of `names`."""

    def __init__(self, engine: Engine, names: Sequence[str]) -> None:
        self.engine, self.names = engine, tuple(names)
        self.chats = {name: Chat(engine.chats.states) for name in names}
        self.sides = {name: Side(Path(name).name, kind_of(name)) for name in names}
        self.busy = False
        self._shown: Comparison | None = None
        self._cancel = threading.Event()
        self._changed = threading.Condition()

    def ask(
        self, text: str, images: Sequence[str | Path] = (), settings: Settings | None = None
    ) -> Iterator[Comparison]:
        """Answer with one model after the other. Yields at most every 50 ms and at least every 100 ms; `stop` ends it,
        and what was written by then stays.

        Raises: EngineError for a message over a limit. A fault of one model is told in its `note`.
        """
        settings = self.engine.limits.checked(text, images, settings)
        cancel = self._cancel = threading.Event()
        for name, side in self.sides.items():
            self.sides[name] = replace(side, stage="waiting", text="", note="", trace=None)
        ended = threading.Event()
        job = self.engine.submit(lambda: self._steps(text, tuple(images), settings, cancel, ended), owner=self)
        view = self._shown = Comparison(text, tuple(images), ())
        self.busy = True
        for chat in self.chats.values():
            chat.resting = False
        try:
            while True:
                over = ended.wait(MIN_GAP_S)
                with self._changed:
                    self._changed.wait(0 if over else BEAT_S - MIN_GAP_S)
                    sides = tuple(self.sides.values())
                started = any(side.stage != "waiting" for side in sides)
                view = replace(view, sides=sides, ahead=0, wait_s=None, done=over)
                if not started:
                    view = replace(view, ahead=self.engine.lane.ahead(job), wait_s=self.engine.lane.wait_s(job))
                yield view
                if over:
                    return
                if cancel.is_set() and (self.engine.lane.drop(job) or not ended.wait(STOP_GRACE_S)):
                    ended.set()  # a long prefill ends out of sight
        finally:
            if cancel is self._cancel:
                self.busy = False
            cancel.set()
            self.engine.lane.drop(job)

    @property
    def shown(self) -> Comparison | None:
        """The last question with what was answered; None before the first."""
        if self._shown is None:
            return None
        with self._changed:
            sides = [side if side.text or side.note else replace(side, stage="done") for side in self.sides.values()]
        return replace(self._shown, sides=tuple(sides), done=True)

    def stop(self) -> None:
        self._cancel.set()

    def rest(self) -> None:
        """Stop, and free every state; what was said stays, and is read again with the next question."""
        self.stop()
        for chat in self.chats.values():
            chat.rest()

    def close(self) -> None:
        """Stop, and free every state."""
        self.stop()
        for chat in self.chats.values():
            chat.close()

    def _steps(
        self,
        text: str,
        images: tuple[str | Path, ...],
        settings: Settings,
        cancel: threading.Event,
        ended: threading.Event,
    ) -> Iterator[None]:
        """The lane's job: a step for each model, so that the messages of others get in between but never into one."""
        try:
            for name, chat in self.chats.items():
                if cancel.is_set():
                    return
                self._answer(name, chat, Request(chat.head, text, images), settings, cancel)
                yield
        finally:
            ended.set()

    def _answer(self, name: str, chat: Chat, request: Request, settings: Settings, cancel: threading.Event) -> None:
        try:
            self._show(cancel, name, stage="loading", note=self.engine.models.note(name))
            backend = self.engine.models.get(name)
            peak = backend.peak_memory()
            before = self.sides[name]
            self._show(cancel, name, kind=backend.info.kind, precision=backend.info.precision, stage="reading", note="")
            watch = Watch(time.perf_counter())

            def put(reply: Reply) -> None:
                watch.see(reply, time.perf_counter())
                self._show(
                    cancel,
                    name,
                    stage="writing" if reply.text else "reading",
                    text=reply.text,
                    trace=watch.trace(peak()) if watch.seen_s else None,  # before that there is nothing to measure
                    latency=thin((*before.latency, *watch.latency())),
                    memory=thin((*before.memory, *watch.memory)),
                )

            self.engine.turns.answer(backend, chat, request, settings, cancel, put)
            self._show(cancel, name, stage="done")
        except Cancelled:
            self._show(cancel, name, stage="done")
        except EngineError as error:
            self._show(cancel, name, stage="failed", note=str(error))
        except Exception as error:
            self._show(cancel, name, stage="failed", note=plain(error))
        finally:
            if chat.closed:
                chat.close()
            elif chat.resting:
                chat.rest()

    def _show(self, run: threading.Event, name: str, **changes: object) -> None:
        with self._changed:
            if run is not self._cancel:
                return  # of a question that was stopped; another one is shown by now
            self.sides[name] = replace(self.sides[name], **changes)  # type: ignore[arg-type]
            self._changed.notify_all()


@dataclass
class Watch:
    """Notes the moments of one answer as its replies come by."""

    started_s: float
    seen_s: list[float] = field(default_factory=list)
    contexts: list[int] = field(default_factory=list)
    memory: list[tuple[float, float]] = field(default_factory=list)
    last: Reply = field(default_factory=Reply)

    def see(self, reply: Reply, now_s: float) -> None:
        metrics = reply.metrics
        if metrics.num_tokens > self.last.metrics.num_tokens:
            self.seen_s.append(now_s)
            self.contexts.append(metrics.text_tokens + metrics.image_tokens)
            self.memory.append((self.contexts[-1], metrics.recurrent_bytes + metrics.cache_bytes))
        self.last = reply

    @property
    def token_s(self) -> tuple[float, ...]:
        """When each token was there: a reply comes by before its token is fed back."""
        return tuple(self.seen_s)

    def trace(self, peak_bytes: int) -> Trace:
        metrics = self.last.metrics
        return Trace(
            self.started_s,
            self.token_s,
            metrics.text_tokens,
            metrics.image_tokens,
            metrics.recurrent_bytes,
            metrics.cache_bytes,
            peak_bytes,
        )

    def latency(self) -> list[tuple[float, float]]:
        """(context, milliseconds) of every token but the first, single slow moments smoothed away."""
        times = self.token_s
        gaps = smooth([1e3 * (b - a) for a, b in zip(times, times[1:], strict=False)])  # noqa: RUF007 (two lists)
        return list(zip(self.contexts[1:], gaps, strict=False))


def thin(points: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
    """Every second point left out until few enough are there; the last one stays."""
    while len(points) > MOST_POINTS:
        points = (*points[:-1:2], points[-1])
    return points
