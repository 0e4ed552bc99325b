"""One compute lane: jobs run one at a time, in the order in which they came."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable

log = logging.getLogger(__name__)


class LaneFull(RuntimeError):
    """Too many jobs wait already."""


class Job:
    """A function waiting for, or running in, a lane. Its outcome travels by what the function itself writes."""

    def __init__(self, run: Callable[[], None]) -> None:
        self.run = run


class Lane:
    """A queue and the one thread that empties it, started with the first job.

    One thread for all models and conversations: they share the device, and timings of two at once would mean nothing.
    """

    def __init__(self, max_waiting: int = 16, name: str = "lane") -> None:
        self.max_waiting = max_waiting
        self._name = name
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()

    @property
    def idle(self) -> bool:
        with self._changed:
            return self._running is None and not self._waiting

    def submit(self, run: Callable[[], None]) -> Job:
        """Put `run` at the end of the queue.

        Raises: LaneFull if `max_waiting` jobs wait already.
        """
        job = Job(run)
        with self._changed:
            if len(self._waiting) >= self.max_waiting:
                raise LaneFull(f"{len(self._waiting)} jobs wait already")
            self._waiting.append(job)
            if self._thread is None:
                # A daemon: a long answer must not keep the process from ending.
                self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return job

    def ahead(self, job: Job) -> int:
        """Jobs that come before `job`, the running one included; 0 once it runs or has ended."""
        with self._changed:
            if job not in self._waiting:
                return 0
            return self._waiting.index(job) + (self._running is not None)

    def drop(self, job: Job) -> bool:
        """Take a waiting job out of the queue; False if it already runs or has ended."""
        with self._changed:
            if job not in self._waiting:
                return False
            self._waiting.remove(job)
            return True

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                self._running = self._waiting.popleft()
            try:
                self._running.run()
            except Exception:  # a job reports its own faults; the lane must outlive one that did not
                log.exception("a job in the compute lane failed")
            finally:
                with self._changed:
                    self._running = None
