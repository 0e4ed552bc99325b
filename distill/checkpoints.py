"""Checkpoints of a stage under way: all that a run needs to go on as if it had never stopped.

A file is whole or not there: it is written under another name, flushed to the disk and then renamed. The last two are
kept, so that a damaged one costs an interval and not the run.
"""

from __future__ import annotations

import os
import pickle
import random
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from distill.distributed import Processes

KEEP = 2
PARTIAL = ".*.partial"
_PATTERN = "step-*.pt"
_DAMAGED = (
    OSError,
    ValueError,
    RuntimeError,
    EOFError,
    KeyError,
    TypeError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)  # what reading a file that is not what was written may raise


@dataclass
class Checkpoint:
    """The state of a stage after a step.

    facts: what the stage was about (recipe, stage, ...), for comparison.
    batches: taken from each stream so far by all processes together.
    parameters: what trains, whole and in full precision.    optimizers: their `state_dict`s, with whole tensors.
    rng: `rng_state` of each process.
    streams: where the packed batches of each process stand, in plain values; empty if there are none.
    """

    facts: dict[str, Any]
    step: int
    elapsed_s: float
    batches: int
    parameters: dict[str, Tensor]
    optimizers: list[dict[str, Any]]
    rng: list[dict[str, Any]]
    streams: list[dict[str, Any]] = field(default_factory=list)

    def start(self, world_size: int) -> int:
        """Number of the first batch for each of `world_size` processes that no process has seen."""
        return -(-self.batches // world_size)

    def check_shapes(self, parameters: dict[str, nn.Parameter]) -> None:
        """Raises: ValueError if what trains now has other names or shapes."""
        now = {name: tuple(p.shape) for name, p in parameters.items()}
        then = {name: tuple(t.shape) for name, t in self.parameters.items()}
        if now != then:
            differ = sorted(name for name in now.keys() | then.keys() if now.get(name) != then.get(name))
            listed = ", ".join(f"{n} ({then.get(n, 'absent')}, now {now.get(n, 'absent')})" for n in differ[:4])
            raise ValueError(
                f"the checkpoint is of another network: {len(differ)} tensors differ, such as {listed}; take the "
                "teacher and recipe that it was made with, or another --out"
            )


class Checkpoints:
    """The checkpoints of one stage in one folder.

    Args:
        folder: theirs alone; made when the first is written.
        facts: what the stage is about, in plain values (see `Recipe.facts`).
    """

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.folder = folder
        self.facts = facts

    def paths(self) -> list[Path]:
        """The newest first."""
        return sorted(self.folder.glob(_PATTERN), reverse=True)

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write one, and then remove all but the last two.

        Raises: OSError if it cannot be written; those before it are as they were.
        """
        path = self.folder / f"step-{checkpoint.step:08d}.pt"
        write_whole(
            path, lambda file: torch.save({f.name: getattr(checkpoint, f.name) for f in fields(checkpoint)}, file)
        )
        # A process that was killed while writing leaves its unfinished file behind.
        for old in [*self.paths()[KEEP:], *self.folder.glob(PARTIAL)]:
            old.unlink()
        return path

    def latest(self, processes: Processes) -> Checkpoint | None:
        """The last one that is not damaged, the same in all processes, or None if there is none.

        Raises: ValueError if all are damaged, or the last is of another recipe or stage.
        """
        found: tuple[Path, Checkpoint] | None = None
        if processes.is_main:
            found = self._latest_whole()
        step = int(processes.first(-1.0 if found is None else found[1].step))
        if step < 0:
            return None
        if found is None:
            path = self.folder / f"step-{step:08d}.pt"
            if not path.is_file():
                raise ValueError(f"{path} is not there for this process; put --out where all hosts can read it")
            found = path, self._read(path)
        path, checkpoint = found
        if differ := differences(checkpoint.facts, self.facts):
            raise ValueError(
                f"{path} was made by another recipe: {', '.join(differ)}; put the recipe back, take another --out, or "
                f"delete {self.folder} to begin the stage anew"
            )
        return checkpoint

    def _latest_whole(self) -> tuple[Path, Checkpoint] | None:
        paths = self.paths()
        for path in paths:
            try:
                return path, self._read(path)
            except _DAMAGED as error:
                print(f"{path} is damaged ({_short(error)}); trying the one before it", file=sys.stderr, flush=True)
        if paths:
            raise ValueError(f"every checkpoint in {self.folder} is damaged; delete it to begin the stage anew")
        return None

    def _read(self, path: Path) -> Checkpoint:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the sums that it wrote
            if damaged := archive.testzip():
                raise ValueError(f"the sum of {damaged} is wrong")
        return Checkpoint(**torch.load(path, map_location="cpu", weights_only=True))

    def clear(self) -> None:
        """Remove all: the stage is finished and what it made is kept elsewhere."""
        for path in self.paths():
            path.unlink()
        for leftover in self.folder.glob(PARTIAL):
            leftover.unlink()
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs, as "name is 2, was 1"."""
    names = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
    return [f"{name} is {now.get(name)!r}, was {then.get(name)!r}" for name in names]


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file that is there whole or, after a crash or on a full disk, not at all.

    Raises: OSError naming the file; what was there before is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with _os_errors(), partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(
            error.errno,
            f"cannot be written ({reason}); what was there before is untouched. Make room and go on",
            str(path),
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    _sync_folder(path.parent)


def write_bytes_whole(path: Path, content: bytes) -> None:
    """`write_whole` of what is there already."""
    write_whole(path, lambda file: file.write(content))


@contextmanager
def writing_model(out: Path) -> Iterator[None]:
    """Around what writes a model's files.  Raises: OSError naming the folder if one of them cannot be written.

    safetensors has an error of its own for that, which is no OSError.
    """
    try:
        yield
    except (SafetensorError, OSError) as error:
        said = " ".join(str(error).split())
        raise OSError(
            f"{out} cannot be written ({said}); make room and run the same command again: what was trained is kept"
        ) from error


@contextmanager
def _os_errors() -> Iterator[None]:
    """torch's writer hides the file's error behind one of its own; this brings it back."""
    try:
        yield
    except RuntimeError as error:
        behind: BaseException | None = error
        while behind is not None and not isinstance(behind, OSError):
            behind = behind.__cause__ or behind.__context__
        if behind is None:
            raise
        raise behind from error


def _sync_folder(folder: Path) -> None:
    """So that the new name outlives a power cut too; where folders cannot be opened, the system sees to it."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def rng_state() -> dict[str, Any]:
    """The generators of this process, in plain values and tensors."""
    version, numbers, gauss = random.getstate()
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *map(float, rest)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what `rng_state` returned."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), int(position), int(has_gauss), cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 120 else text[:117] + "..."
