"""One compute lane: jobs run one at a time, and whoever waits gets a turn after each other one who waits."""

from __future__ import annotations

import contextvars
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator

log = logging.getLogger(__name__)

Run = Callable[[], Iterator[None] | None]
OLD_SHARE = 0.7  # of the usual length of a job when the newest one is counted in


class LaneFull(RuntimeError):
    """Too many jobs wait already."""


class Job:
    """A function waiting for, or running in, a lane. Its outcome travels by what the function itself writes.

    A function that returns an iterator runs in steps; between two of them the others get their turns. It runs in the
    context (`contextvars`) of whoever submitted it: ZeroGPU finds there whose share of its GPUs the work takes.
    """

    def __init__(self, run: Run, owner: Hashable) -> None:
        self.run, self.owner = run, owner
        self.seconds = 0.0  # worked so far
        self._steps: Iterator[None] | None = None
        self._context = contextvars.copy_context()

    def step(self) -> bool:
        """Work; True if there is more to do."""
        started = time.monotonic()
        try:
            if self._steps is None:
                self._steps = self._context.run(self.run)
                return self._steps is not None
            self._context.run(next, self._steps)
            return True
        except StopIteration:
            return False
        finally:
            self.seconds += time.monotonic() - started

    def close(self) -> None:
        """End a job in steps that is not running: its own clean-up gets done."""
        if self._steps is not None and hasattr(self._steps, "close"):
            self._steps.close()


class Lane:
    """Queues, one an owner, and the one thread that empties them in turn; it starts with the first job.

    One thread for all models and conversations: they share the device, and timings of two at once would mean nothing.
    In turn: an owner with five messages makes nobody wait for more than one of them.
    """

    def __init__(self, max_waiting: int = 16, name: str = "lane") -> None:
        self.max_waiting = max_waiting
        self._name = name
        self._waiting: OrderedDict[Hashable, deque[Job]] = OrderedDict()  # whose turn is next stands first
        self._running: Job | None = None
        self._usual_s: float | None = None
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()

    @property
    def idle(self) -> bool:
        with self._changed:
            return self._running is None and not self._waiting

    def __len__(self) -> int:
        """Jobs that wait."""
        with self._changed:
            return sum(len(jobs) for jobs in self._waiting.values())

    def submit(self, run: Run, owner: Hashable = None) -> Job:
        """Put `run` at the end of its owner's queue; without an owner it is its own.

        Raises: LaneFull if `max_waiting` jobs wait already.
        """
        job = Job(run, object() if owner is None else owner)
        with self._changed:
            waiting = sum(len(jobs) for jobs in self._waiting.values())
            if waiting >= self.max_waiting:
                raise LaneFull(f"{waiting} jobs wait already")
            self._waiting.setdefault(job.owner, deque()).append(job)
            if self._thread is None:
                # A daemon: a long answer must not keep the process from ending.
                self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return job

    def ahead(self, job: Job) -> int:
        """Jobs that come before `job`, the running one included; 0 once it runs or has ended."""
        with self._changed:
            before = self._before(job)
            return 0 if before is None else before + (self._running is not None)

    def wait_s(self, job: Job) -> float | None:
        """Seconds that `job` is expected to wait, by how long jobs took lately; None if nothing is known yet."""
        with self._changed:
            before = self._before(job)
            if before is None:
                return 0.0
            if self._usual_s is None:
                return None
            rest = 0.0
            if self._running is not None:
                rest = max(self._usual_s - self._running.seconds, self._usual_s / 4)
            return rest + before * self._usual_s

    def drop(self, job: Job) -> bool:
        """Take a waiting job out of the queue; False if it runs just now or has ended."""
        with self._changed:
            jobs = self._waiting.get(job.owner)
            if jobs is None or job not in jobs:
                return False
            jobs.remove(job)
            if not jobs:
                del self._waiting[job.owner]
        job.close()
        return True

    def _before(self, job: Job) -> int | None:
        """Waiting jobs that come before `job`; None if it does not wait."""
        jobs = self._waiting.get(job.owner)
        if jobs is None or job not in jobs:
            return None
        rounds = jobs.index(job)
        count, earlier = rounds, True
        for owner, others in self._waiting.items():
            if owner == job.owner:
                earlier = False
            else:
                count += min(len(others), rounds + earlier)
        return count

    def _next(self) -> Job:
        """The first job of whose turn it is; that owner goes to the end."""
        owner, jobs = self._waiting.popitem(last=False)
        job = jobs.popleft()
        if jobs:
            self._waiting[owner] = jobs
        return job

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                job = self._running = self._next()
            more = False
            try:
                more = job.step()
            except Exception:  # a job reports its own faults; the lane must outlive one that did not
                log.exception("a job in the compute lane failed")
            finally:
                with self._changed:
                    self._running = None
                    if more:
                        self._waiting.setdefault(job.owner, deque()).appendleft(job)
                        self._waiting.move_to_end(job.owner)
                    elif job._steps is None:  # those in steps are no messages: nobody waits for all of one
                        usual = job.seconds if self._usual_s is None else self._usual_s
                        self._usual_s = OLD_SHARE * usual + (1 - OLD_SHARE) * job.seconds
