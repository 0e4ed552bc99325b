"""The way of an answer from the lane's thread to whoever shows it: the newest reply, an error, or the end."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from app.chat import FinishReason, Metrics
from app.errors import EngineError
from app.lane import Job, Lane

MIN_GAP_S = 0.05  # between two updates: each costs the page about 5 ms
BEAT_S = 0.08  # without news an update is repeated, so that a closed page or a stop is noticed
STOP_GRACE_S = 0.15  # a stopped answer that has not ended by then (a long prefill) ends out of sight
WORD_GRACE_S = 2.0  # the same for one that has words: the word under way is kept, so it has to be shown


@dataclass(frozen=True)
class LoadStatus:
    """`progress` from 0 to 1, `note` says what is being done or what went wrong."""

    stage: Literal["idle", "loading", "ready", "failed"] = "idle"
    progress: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Reply:
    """The answer so far. The last one of an answer has `stage` "done" and a `finish_reason`.

    `ahead` counts the messages that come first while waiting and `wait_s` is how long they should take (None: not
    known); `progress` and `note` tell of loading. A stop before the first word ends with an empty `text`, and the
    conversation stays as it was.
    """

    text: str = ""
    stage: Literal["waiting", "loading", "reading", "writing", "done"] = "waiting"
    ahead: int = 0
    wait_s: float | None = None
    progress: float = 0.0
    note: str = ""
    metrics: Metrics = field(default_factory=Metrics)
    finish_reason: FinishReason | None = None


class Mailbox:
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


def follow(lane: Lane, job: Job, mailbox: Mailbox, cancel: threading.Event, status: Status) -> Iterator[Reply]:
    """What to show of a job until it ends, at most every 50 ms and at least every 100 ms.  Raises: its EngineError."""
    cancelled_at = None
    last = 0.0
    while True:
        mailbox.wait(BEAT_S)
        if not mailbox.ended:
            time.sleep(max(0.0, last + MIN_GAP_S - time.monotonic()))
        last = time.monotonic()
        if mailbox.error is not None:
            raise mailbox.error
        reply = mailbox.reply or _before(lane, job, status.status)
        if not mailbox.ended and cancel.is_set():
            cancelled_at = cancelled_at or last
            if lane.drop(job) or last - cancelled_at > (WORD_GRACE_S if reply.text else STOP_GRACE_S):
                reply = replace(reply, stage="done", finish_reason="cancel")
        yield reply
        if reply.stage == "done":
            return


class Status:
    """Something that tells how far it is with loading."""

    status: LoadStatus


def _before(lane: Lane, job: Job, status: LoadStatus) -> Reply:
    """What to show before there is anything to show of the answer."""
    ahead = lane.ahead(job)
    if status.stage == "loading":
        return Reply(stage="loading", progress=status.progress, note=status.note)
    return Reply(stage="waiting", ahead=ahead, wait_s=lane.wait_s(job))
