"""Where the states of all conversations lie: on the device, in the computer's memory, on disk; each within a budget.

The longest unused moves on when its place is full, and comes back when asked for. What does not fit on disk either is
let go: the conversation is then read again.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, Self

from app.scratch import own_folder

log = logging.getLogger(__name__)

Place = Literal["device", "memory", "disk", "gone"]
FREE_SHARE = 0.25  # of the free memory (or disk) that states may take, unless someone says otherwise


class State(Protocol):
    """What the app needs of `mmmamba.state.DecodeState`."""

    num_image_tokens: int

    @property
    def nbytes(self) -> int: ...
    @property
    def recurrent_nbytes(self) -> int: ...
    @property
    def cache_nbytes(self) -> int: ...
    @property
    def num_text_tokens(self) -> int: ...
    def fork(self) -> Self: ...
    def share_(self, later: Self) -> None: ...
    def storages(self) -> Mapping[int, int]: ...
    def save(self, path: Path) -> None: ...


class Mover(Protocol):
    """Moves the states of one model, and holds nothing of the model itself."""

    device: str

    def to_memory(self, state: Any) -> Any: ...
    def to_device(self, state: Any) -> Any: ...
    def load_state(self, path: Path) -> Any:
        """A saved state, on the model's device."""
        ...


@dataclass(frozen=True)
class Budget:
    """Bytes that states may take in each place; None is a quarter of what is free when the first state is kept."""

    device: int | None = None
    memory: int | None = None
    disk: int | None = None


class Kept:
    """A state in the store's care. `place` says where it lies, `nbytes` how large it is."""

    def __init__(self, state: State, mover: Mover, place: Place, before: Kept | None = None) -> None:
        self.state: State | None = state
        self.before = before  # the snapshot that it went on from
        self.mover = mover
        self.place: Place = place
        self.nbytes = state.nbytes
        self.path: Path | None = None
        self.pieces: Mapping[int, int] = {}


class StateStore:
    """All kept states, the longest unused first. Safe to use from several threads."""

    def __init__(self, budget: Budget | None = None, directory: Path | None = None) -> None:
        self.budget = budget or Budget()
        self._limits: dict[Place, int] | None = None
        self._kept: OrderedDict[Kept, None] = OrderedDict()
        self._holders: Counter[tuple[Place, int]] = Counter()  # (place, address) -> how many states hold that memory
        self._used: dict[Place, int] = {"device": 0, "memory": 0, "disk": 0, "gone": 0}
        self._lock = threading.RLock()
        self._directory = directory
        self._count = 0

    def __len__(self) -> int:
        return len(self._kept)

    def used_bytes(self, place: Place) -> int:
        """Bytes that states take there; what several share is counted once."""
        return self._used[place]

    def keep(self, state: State, mover: Mover, before: Kept | None = None) -> Kept:
        """Take a state into care; the caller advances it no more. `before` is the snapshot it went on from: its keys
        and values, and those of the snapshots before it, are from now on those of `state`."""
        place = _home(mover)
        kept = Kept(state, mover, place, before)
        with self._lock:
            while before is not None and before.place == place and before.state is not None:
                old = dict(before.pieces)
                self._uncount(before)
                before.state.share_(state)
                self._count_in(before)
                if before.pieces == old:
                    break  # a recurrent state has nothing to share
                before = before.before
            self._count_in(kept)
            self._kept[kept] = None
            self._trim()
        return kept

    def take(self, kept: Kept) -> State | None:
        """A state to go on from, on the model's device; None if it was let go. The snapshot stays."""
        with self._lock:
            if kept not in self._kept:
                return None
            self._kept.move_to_end(kept)
            home = _home(kept.mover)
            if kept.place != home:
                try:
                    self._bring(kept, home)
                except (OSError, ValueError):
                    log.exception("a saved state could not be read; the conversation will be read again")
                    self.release(kept)
                    return None
            assert kept.state is not None
            fork = kept.state.fork()
            self._trim()
            return fork

    def release(self, kept: Kept) -> None:
        """Free a state for good."""
        with self._lock:
            if kept not in self._kept:
                return
            del self._kept[kept]
            self._move_out(kept)
            kept.place = "gone"

    def _bring(self, kept: Kept, home: Place) -> None:
        if kept.place == "disk":
            assert kept.path is not None
            state = kept.mover.load_state(kept.path)
        else:
            state = kept.mover.to_device(kept.state)
        self._move_out(kept)
        kept.state, kept.place = state, home
        self._count_in(kept)

    def _trim(self) -> None:
        """Move the longest unused on until every place is within its budget; the newest stays where it is."""
        if self._limits is None:
            self._limits = self._find_limits()
        limits = self._limits
        order: tuple[Place, ...] = ("device", "memory", "disk")
        for place in order:
            for kept in list(self._kept)[:-1]:
                if self._used[place] <= limits[place]:
                    break
                if kept.place == place:
                    self._demote(kept)

    def _demote(self, kept: Kept) -> None:
        if kept.place == "device":
            state = kept.mover.to_memory(kept.state)
            self._move_out(kept)
            kept.state, kept.place = state, "memory"
            self._count_in(kept)
        elif kept.place == "memory":
            assert kept.state is not None
            self._count += 1
            path = self._folder() / f"{self._count}.safetensors"
            try:
                kept.state.save(path)
            except OSError:
                log.warning("a state could not be written to %s; it is let go", path.parent)
                path.unlink(missing_ok=True)
                self.release(kept)
                return
            self._move_out(kept)
            kept.state, kept.path, kept.place = None, path, "disk"
            self._count_in(kept)
        else:
            self.release(kept)

    def _count_in(self, kept: Kept) -> None:
        if kept.state is not None:
            kept.pieces = kept.state.storages()
        else:
            assert kept.path is not None
            kept.pieces = {id(kept): kept.path.stat().st_size}
        for address, size in kept.pieces.items():
            self._holders[kept.place, address] += 1
            if self._holders[kept.place, address] == 1:
                self._used[kept.place] += size

    def _uncount(self, kept: Kept) -> None:
        for address, size in kept.pieces.items():
            self._holders[kept.place, address] -= 1
            if not self._holders[kept.place, address]:
                del self._holders[kept.place, address]
                self._used[kept.place] -= size
        kept.pieces = {}

    def _move_out(self, kept: Kept) -> None:
        self._uncount(kept)
        kept.state = None
        if kept.path is not None:
            kept.path.unlink(missing_ok=True)
            kept.path = None

    def _folder(self) -> Path:
        if self._directory is None:
            self._directory = own_folder("states")
            weakref.finalize(self, shutil.rmtree, self._directory, ignore_errors=True)
        return self._directory

    def _find_limits(self) -> dict[Place, int]:
        from mmmamba.memory import free_memory_bytes

        def free(place: Place) -> int:
            if place == "disk":
                return shutil.disk_usage(tempfile.gettempdir()).free
            devices = (kept.mover.device for kept in self._kept if _home(kept.mover) == place)
            return free_memory_bytes(next(devices, "cpu")) or 4 << 30

        chosen = {"device": self.budget.device, "memory": self.budget.memory, "disk": self.budget.disk}
        limits: dict[Place, int] = {}
        for place in ("device", "memory", "disk"):
            given = chosen[place]
            limits[place] = int(FREE_SHARE * free(place)) if given is None else given
        return limits


def _home(mover: Mover) -> Place:
    """Where a state of this model is worked on."""
    return "memory" if mover.device.startswith("cpu") else "device"
