"""What a run says of itself: JSON lines in a file and on a pipe, a progress bar on a terminal, TensorBoard if asked."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from distill.config import StageConfig


class Monitor:
    """The lines of one stage, written by the main process; the others have one that says nothing.

    Args:
        tensorboard: folder for event files, or None. Its curves are named STAGE/VALUE.
        quiet: write and print nothing.
    Raises: ValueError if TensorBoard is asked for and not installed.
    """

    def __init__(
        self,
        name: str,
        config: StageConfig,
        log_path: Path,
        *,
        tensorboard: Path | None = None,
        quiet: bool = False,
        progress: float = 0.0,
    ) -> None:
        self.name = name
        self.log_path = log_path
        self.quiet = quiet
        self.rows = config.accumulate * (config.image_batch + config.text_batch)
        self._events = None if quiet or tensorboard is None else _event_writer(tensorboard / name)
        if not quiet:
            log_path.parent.mkdir(parents=True, exist_ok=True)
        self._bar: Any = None
        if not quiet and sys.stderr.isatty():
            # In shares of the run, which minutes may bound as well as steps: so the time left is right for both.
            layout = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
            self._bar = tqdm(total=1.0, initial=min(progress, 1.0), desc=name, bar_format=layout, dynamic_ncols=True)

    def say(self, text: str) -> None:
        """A line for people."""
        if self.quiet:
            return
        if self._bar is None:
            print(text, flush=True)
        else:
            self._bar.write(text)

    def write(self, line: dict[str, Any]) -> None:
        """A line of values: `step`, `progress`, `ms_per_step` and what else was measured."""
        if self.quiet:
            return
        text = json.dumps({"stage": self.name} | line)
        append_line(self.log_path, text)
        if self._bar is None:
            print(text, flush=True)
        else:
            rate = 1e3 * self.rows / max(line["ms_per_step"], 1e-6)
            losses = {k: f"{v:.4g}" for k, v in line.items() if k.endswith(("_ce", "_kl", "_mse", "loss"))}
            self._bar.set_postfix(step=line["step"], rows_per_s=f"{rate:.0f}", **losses)
        if self._events is not None:
            for key, value in line.items():
                if key != "step" and isinstance(value, int | float):
                    self._events.add_scalar(f"{self.name}/{key}", float(value), line["step"])

    def move(self, progress: float) -> None:
        """Put the bar forward."""
        if self._bar is not None:
            self._bar.update(min(progress, 1.0) - self._bar.n)

    def close(self) -> None:
        """Finish the bar and the event file."""
        if self._bar is not None:
            self._bar.close()
        if self._events is not None:
            self._events.close()


def append_line(path: Path, text: str) -> None:
    """Add a line to a log. What cannot be written, on a full disk, is lost with a warning: training is worth more."""
    try:
        with path.open("a", encoding="utf-8") as log:
            log.write(text + "\n")
    except OSError as error:
        print(f"{path}: a line cannot be written ({error.strerror or error}); training goes on", file=sys.stderr)


def _event_writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            "--tensorboard needs the package tensorboard, which is not installed; install requirements-distill.txt, or "
            "leave the option out: the log file holds the same values"
        ) from error
    return SummaryWriter(str(folder))
