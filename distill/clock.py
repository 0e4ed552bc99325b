"""Time of a run: its progress, the rate since the last log line, the share spent waiting for data, when to save."""

from __future__ import annotations

import time

from distill.config import StageConfig


class Clock:
    """Counts from its making on, or goes on from what a checkpoint says had passed."""

    def __init__(self, config: StageConfig, *, elapsed_s: float = 0.0, step: int = 0) -> None:
        self.config = config
        self.last_lap = self.last_save = time.perf_counter()
        self.started = self.last_lap - elapsed_s
        self.lap_step = self.saved_step = step
        self.waited_s = 0.0
        self._wait_began = 0.0

    @property
    def elapsed_s(self) -> float:
        """Seconds of training, those before an interruption included."""
        return time.perf_counter() - self.started

    def progress(self, step: int) -> float:
        """The larger of the shares of steps and of minutes."""
        minutes = self.elapsed_s / 60
        by_time = minutes / self.config.max_minutes if self.config.max_minutes else 0.0
        return max(step / self.config.steps, by_time)

    def waiting(self) -> Clock:
        """A context in which time counts as waiting for data."""
        return self

    def __enter__(self) -> None:
        self._wait_began = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.waited_s += time.perf_counter() - self._wait_began

    def lap(self, step: int) -> dict[str, float]:
        """Times a step since the last call."""
        now = time.perf_counter()
        steps = max(1, step - self.lap_step)
        line = {
            "seconds": round(now - self.started, 1),
            "ms_per_step": round((now - self.last_lap) * 1e3 / steps, 1),
            "data_ms": round(self.waited_s * 1e3 / steps, 1),
        }
        self.last_lap, self.lap_step, self.waited_s = now, step, 0.0
        return line

    def save_due(self, step: int) -> bool:
        """Whether the minutes since the last save have passed, or the step is one of every `save_steps`."""
        minutes, steps = self.config.save_minutes, self.config.save_steps
        by_time = bool(minutes) and time.perf_counter() - self.last_save >= 60 * minutes
        return step > self.saved_step and (by_time or (bool(steps) and step % steps == 0))

    def saved(self, step: int) -> None:
        """A checkpoint of this step has been written, or could not be: the interval begins anew."""
        self.last_save, self.saved_step = time.perf_counter(), step
