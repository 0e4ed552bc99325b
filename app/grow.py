"""Grow the context: the sweep of `mmmamba.sweep` on the engine's lane, for a page that shows it as it goes."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from app.backend import Backend, SweepPlan
from app.engine import Engine
from app.errors import EngineError, plain
from app.follow import BEAT_S, STOP_GRACE_S
from app.turns import open_image

log = logging.getLogger(__name__)

CONTEXTS = (1024, 4096, 16_384, 65_536, 103_000)
BANDWIDTH_BYTES, BANDWIDTH_REPEATS = 2**27, 3  # a third of a second on a slow machine


@dataclass(frozen=True)
class Growth:
    """Where a sweep stands. `points` are `mmmamba.sweep.Point`, `predictions` by model, and so `ends`, which says in
    words why one goes no further, and `precisions`, what its weights are held in."""

    points: tuple[Any, ...] = ()
    predictions: Mapping[str, Any] = field(default_factory=dict)
    ends: Mapping[str, str] = field(default_factory=dict)
    precisions: Mapping[str, str] = field(default_factory=dict)
    doing: str = "waiting"
    error: str = ""
    done: bool = False


class Grow:
    """The sweep of one visitor over `names`. `states` keeps what was read, for the next time."""

    def __init__(self, engine: Engine, names: Sequence[str], states: Path | None = None) -> None:
        self.engine, self.names, self.states = engine, tuple(names), states
        self.growth = Growth(done=True)
        self._cancel = threading.Event()

    def run(
        self, longest: int = CONTEXTS[2], budget_s: float = 300.0, image: str | Path | None = None
    ) -> Iterator[Growth]:
        """Measure each model at every context up to `longest`, reading for at most `budget_s` seconds a model.

        Yields at least every 100 ms. Between two pieces of reading the messages of others are answered.
        Raises: EngineError for an image that cannot be read.
        """
        limits = self.engine.limits
        if not CONTEXTS[0] <= longest <= limits.max_context:
            raise EngineError(
                f"Up to {longest:,} tokens: this server grows contexts of {CONTEXTS[0]:,} to {limits.max_context:,}."
            )
        if not 0 < budget_s <= 60 * limits.max_minutes:
            minutes = f"{budget_s / 60:g} minutes of reading"
            raise EngineError(f"{minutes}: use more than 0; this server allows up to {limits.max_minutes:g}.")
        contexts = tuple(c for c in CONTEXTS if c <= longest)
        picture = None if image is None else open_image(image)
        cancel, ended = threading.Event(), threading.Event()
        self._cancel, self.growth = cancel, Growth()
        plan = SweepPlan(contexts, picture, budget_s, self.states, 0.0, None)
        job = self.engine.submit(lambda: self._steps(plan, cancel, ended), owner=self)
        try:
            while not self.growth.done:
                if cancel.wait(BEAT_S) and (self.engine.lane.drop(job) or not ended.wait(STOP_GRACE_S)):
                    break  # what is being computed just now ends out of sight
                yield self.growth
        finally:
            cancel.set()
            self.engine.lane.drop(job)
            if not self.growth.done:
                self._show(cancel, doing="stopped", done=True)
        yield self.growth

    def stop(self) -> None:
        self._cancel.set()

    def _steps(self, plan: SweepPlan, cancel: threading.Event, ended: threading.Event) -> Iterator[None]:
        """The lane's job, in steps of a piece of reading or one measurement."""
        try:
            yield from self._sweep(plan, cancel)
        except EngineError as error:
            self._show(cancel, error=str(error))
        except Exception as error:
            log.exception("growing the context failed")
            self._show(cancel, error=plain(error))
        finally:
            self._show(cancel, doing="stopped" if cancel.is_set() else "done", done=True)
            ended.set()

    def _sweep(self, plan: SweepPlan, cancel: threading.Event) -> Iterator[None]:
        from mmmamba.sweep import Point, Reading, run_together

        backends: list[Backend] = []
        for name in self.names:
            self._show(cancel, doing=f"loading {Path(name).name}")
            backends.append(self.engine.models.get(name))
            yield
        self._show(cancel, doing="measuring how fast memory is")
        plan = replace(plan, **measured_machine(backends[0].mover.device))
        sweeps: list[Any] = [backend.sweep(plan) for backend in backends]
        self._show(
            cancel,
            predictions={sweep.name: sweep.prediction for sweep in sweeps},
            precisions={backend.info.name: backend.info.precision for backend in backends},
        )
        yield
        for event in run_together(sweeps, cancel):
            if isinstance(event, Point):
                self._show(cancel, points=(*self.growth.points, event))
            elif isinstance(event, Reading):
                self._show(cancel, doing=f"{event.model} is reading: {event.seen:,} of {event.context:,} tokens")
            else:
                self._show(cancel, ends={**self.growth.ends, event.model: event.reason})
            yield

    def _show(self, run: threading.Event, **changes: Any) -> None:
        """Change what is shown, unless `run` was stopped and is over for the one who watches."""
        if run is self._cancel and not self.growth.done:
            self.growth = replace(self.growth, **changes)


def measured_machine(device: str) -> dict[str, Any]:
    """Bandwidth and free memory of a device, as `SweepPlan` takes them."""
    import torch

    from mmmamba.memory import free_memory_bytes, memory_bandwidth

    where = torch.device(device)
    bandwidth = memory_bandwidth(where, num_bytes=BANDWIDTH_BYTES, repeats=BANDWIDTH_REPEATS)
    return {"bandwidth": bandwidth, "free_bytes": free_memory_bytes(where)}
