"""The compute lane: one at a time, in turn over owners, with an honest word on the wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

import pytest

from app.lane import Lane, LaneFull

HANGS_S = 60.0  # what takes moments hangs by then


class Gate:
    """A lane whose first job waits, so that what comes after it can be put in order."""

    def __init__(self, max_waiting: int = 16) -> None:
        self.lane, self.ran, self.go = Lane(max_waiting), [], threading.Event()
        self.lane.submit(lambda: self.go.wait(HANGS_S) and None)
        wait_for(lambda: len(self.lane) == 0)

    def put(self, name: str, owner: Any = None) -> Any:
        return self.lane.submit(lambda: self.ran.append(name), owner)

    def open(self) -> list[str]:
        self.go.set()
        wait_for(lambda: self.lane.idle)
        return self.ran


def wait_for(condition: Any, seconds: float = HANGS_S) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not happen"
        time.sleep(0.002)


def test_keeps_the_order_and_outlives_a_failed_job() -> None:
    gate = Gate(max_waiting=3)
    gate.lane.submit(lambda: 1 / 0 and None)
    dropped, job = gate.put("dropped"), gate.put("last")
    with pytest.raises(LaneFull):
        gate.put("too many")
    assert (gate.lane.ahead(dropped), gate.lane.ahead(job)) == (2, 3)
    assert gate.lane.drop(dropped)
    assert not gate.lane.drop(dropped)
    assert gate.lane.ahead(job) == 2
    assert gate.open() == ["last"]


def test_owners_take_turns() -> None:
    gate = Gate()
    jobs = [gate.put(name, name[0]) for name in ("a1", "a2", "a3", "b1", "c1", "b2")]
    assert [gate.lane.ahead(job) for job in jobs] == [1, 4, 6, 2, 3, 5], "said before it happens"
    assert gate.open() == ["a1", "b1", "c1", "a2", "b2", "a3"]


def test_a_job_in_steps_lets_the_others_in_between() -> None:
    gate = Gate()

    def steps() -> Iterator[None]:
        for i in range(3):
            gate.ran.append(f"step{i}")
            yield

    gate.lane.submit(steps, "long")
    gate.put("x", "other")
    gate.put("y", "other")
    assert gate.open() == ["x", "step0", "y", "step1", "step2"] or gate.ran == ["step0", "x", "step1", "y", "step2"]


def test_dropping_a_job_between_its_steps_cleans_it_up() -> None:
    lane, log = Lane(), []
    hold = threading.Event()

    def steps() -> Iterator[None]:
        try:
            while True:
                log.append("step")
                yield
        finally:
            log.append("cleaned")

    job = lane.submit(steps, "long")
    wait_for(lambda: log)
    lane.submit(lambda: hold.wait(HANGS_S) and None, "other")
    wait_for(lambda: lane.ahead(job) == 1)
    assert lane.drop(job)
    assert log[-1] == "cleaned"
    hold.set()


def test_expected_wait_follows_how_long_jobs_took(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("app.lane.time", SimpleNamespace(monotonic=lambda: now[0]))
    lane = Lane()

    def job() -> None:
        now[0] += 0.05

    for _ in range(8):
        lane.submit(job)
    wait_for(lambda: lane.idle)
    hold = threading.Event()
    lane.submit(lambda: hold.wait(HANGS_S) and None)
    jobs = [lane.submit(lambda: None) for _ in range(4)]
    waits = [lane.wait_s(job) for job in jobs]
    assert waits == sorted(waits)
    assert waits[3] - waits[0] == pytest.approx(0.15), f"three jobs of 50 ms, expected {waits}"
    hold.set()


def test_nothing_is_promised_before_anything_is_known() -> None:
    gate = Gate()
    assert gate.lane.wait_s(gate.put("x")) is None
    gate.open()


def test_work_runs_in_the_context_of_whoever_gave_it() -> None:
    """Also its later steps: ZeroGPU finds there whose request it is."""
    visitor: ContextVar[str] = ContextVar("visitor", default="nobody")
    seen: list[str] = []
    ended = threading.Event()

    def steps() -> Iterator[None]:
        for _ in range(2):
            seen.append(visitor.get())
            yield
        ended.set()

    lane = Lane()
    visitor.set("me")
    lane.submit(steps)
    visitor.set("another")
    assert ended.wait(10)
    assert seen == ["me", "me"]
