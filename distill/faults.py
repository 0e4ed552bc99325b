"""What can go wrong in the middle of a run: values that are not finite, too little memory, Ctrl-C."""

from __future__ import annotations

import math
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from distill.checkpoints import write_whole
from distill.config import StageConfig
from distill.inputs import Inputs
from distill.memory import StageMemory

WeightedInputs = list[tuple[float, Inputs]]
# On a GPU, values are looked at so many steps later: a look at once would wait for the device in every step.
LOOK_BEHIND = 2


class Interrupted(Exception):
    """A run was asked to stop and did, with everything saved; the text says how to go on."""


class Interrupts:
    """While open, Ctrl-C and SIGTERM set `asked`, and the trainer stops after its step; a second one stops at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread handle signals
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            signal.signal(number, self._before[number])
            signal.raise_signal(number)
        self.asked = True
        # Not `print`: the signal may have come in the middle of one.
        os.write(2, b"\nStopping after this step; once more stops at once and loses what is not saved.\n")


def ignore_interrupts(worker: int) -> None:
    """For the processes that make batches: Ctrl-C reaches them too, and the step under way may still need them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@dataclass(frozen=True)
class _Seen:
    step: int
    names: list[str]
    values: Tensor  # on the host, perhaps still under way
    arrived: Any  # torch.cuda.Event, or None
    batches: list[WeightedInputs]


class Watch:
    """Looks at every step's losses and gradient norm without making the device wait.

    Args:
        folder: where a batch goes whose values are not finite.
        rank: of this process; the batch's file is named by it.
    Raises (from `push` and `drain`): FloatingPointError, with the batch in a file that the message names.
    """

    def __init__(self, name: str, folder: Path, rank: int) -> None:
        self.name = name
        self.folder = folder
        self.rank = rank
        self._waiting: deque[_Seen] = deque()

    def push(self, step: int, values: dict[str, Tensor], batches: list[WeightedInputs]) -> None:
        """Note a step's values, scalars on the device, and look at those of an earlier step.

        `batches` are the step's, on the CPU.
        """
        stacked = torch.stack([v.detach().float().reshape(()) for v in values.values()])
        arrived = None
        if stacked.is_cuda:
            host = torch.empty(len(values), pin_memory=True)
            host.copy_(stacked, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
            stacked = host
        self._waiting.append(_Seen(step, list(values), stacked, arrived, batches))
        while len(self._waiting) > (LOOK_BEHIND if arrived is not None else 0):
            self._look(self._waiting.popleft())

    def drain(self) -> None:
        """Look at everything: before a checkpoint is written, and at the end."""
        while self._waiting:
            self._look(self._waiting.popleft())

    def _look(self, seen: _Seen) -> None:
        if seen.arrived is not None:
            seen.arrived.synchronize()
        numbers = dict(zip(seen.names, seen.values.tolist(), strict=True))
        if all(math.isfinite(v) for v in numbers.values()):
            return
        path = self.folder / f"{self.name}-step{seen.step}-process{self.rank}.batch.pt"
        try:
            save_batches(path, seen.batches)
            where = f"the batch is in {path}"
        except OSError as error:
            where = f"the batch could not be kept ({error})"
        raise FloatingPointError(
            f"{self.name}: not finite at step {seen.step}: {numbers}; {where}; lower the learning rate or clip; "
            "the same command goes on from the last checkpoint"
        )


def save_batches(path: Path, batches: list[WeightedInputs]) -> None:
    """Write the batches of one step, to be looked at or run again.  Raises: OSError as `write_whole`."""
    plain = [[{"weight": weight} | _plain(inputs) for weight, inputs in batch] for batch in batches]
    write_whole(path, lambda file: torch.save(plain, file))


def _plain(value: Any) -> Any:
    """Named tuples as dicts, so that the file can be read without our classes."""
    if hasattr(value, "_asdict"):
        return {name: _plain(part) for name, part in value._asdict().items()}
    return [_plain(part) for part in value] if isinstance(value, tuple | list) else value


@contextmanager
def explain_memory(
    name: str, config: StageConfig, batches: WeightedInputs, estimate: StageMemory | None = None
) -> Iterator[None]:
    """Inside, running out of memory says what to lower, with today's values, and what was to be expected.

    Raises: MemoryError.
    """
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one; the CPU's allocator raises it plain
        text = str(error)
        if not isinstance(error, torch.OutOfMemoryError) and "not enough memory" not in text:
            raise
        rows = " and ".join(
            f"{'image' if inputs.is_image else 'text'}_batch={inputs.shape[0]} of {inputs.shape[1]} tokens"
            for _, inputs in batches
        )
        expected = "" if estimate is None else f". A step was estimated at {estimate}"
        raise MemoryError(
            f"{name}: out of memory ({text.splitlines()[0]}). Lower {rows}, and raise accumulate={config.accumulate} "
            "as much to keep the step the same; or lower image_seqlen and text_seqlen; or set activation_checkpointing "
            f"(now {config.activation_checkpointing}); or spread the weights over several cards with --shard{expected}"
        ) from error
