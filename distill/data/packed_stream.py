"""The packed batches that a loader's workers make together, and where they stand: what a checkpoint keeps of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from torch.utils.data import IterableDataset, get_worker_info

from distill.data.batches import Batch
from distill.data.packing import PackedBatch, Packer, PackerState, Piece, RowShape

Batches = Iterator[Batch | PackedBatch]  # what a stage trains on


class Position(NamedTuple):
    """Where the batches of one process stand.

    given: batches that it has taken.
    states: of its parts, one a worker: `state` of the last batch taken from each, in their order.
    """

    given: int
    states: tuple[PackerState, ...]

    @classmethod
    def start(cls, parts: int) -> Position:
        return cls(0, (PackerState(),) * parts)

    @classmethod
    def read(cls, plain: dict[str, Any]) -> Position:
        """From what `plain` gave."""
        states = (PackerState(next_index, tuple(held)) for next_index, held in plain["states"])
        return cls(plain["given"], tuple(states))

    def plain(self) -> dict[str, Any]:
        """In numbers, lists and dicts, as a checkpoint holds it."""
        return {"given": self.given, "states": [[state.next_index, list(state.held)] for state in self.states]}


def same_parts(kept: Sequence[dict[str, Any]], world_size: int, parts: int) -> bool:
    """Whether as many processes with as many parts each kept their positions."""
    return len(kept) == world_size and all(len(plain["states"]) == parts for plain in kept)


def position_of(kept: Sequence[dict[str, Any]], *, rank: int, world_size: int, parts: int) -> Position:
    """Where a process goes on, from the positions that all processes kept (none: the start).

    With as many processes and workers as then, exactly where it stopped. With others, behind every sample that any of
    them has looked at: nothing comes twice, and the few that waited for room are left out.
    """
    if not kept:
        return Position.start(parts)
    if same_parts(kept, world_size, parts):
        return Position.read(kept[rank])
    states = [state for plain in kept for state in Position.read(plain).states]
    # Part p of n looks at the samples p, p + n, p + 2n, ...
    seen = max(state.next_index for state in states) * len(states)
    return Position(0, (PackerState(-(-seen // (world_size * parts))),) * parts)


class PackedStream(Iterator[PackedBatch]):
    """The batches of one process, in order; knows where it stands, whatever its workers have made ahead of time.

    Args:
        batches: of a loader of `PackedBatches`.      at: where those begin.
    """

    def __init__(self, batches: Iterator[PackedBatch], at: Position) -> None:
        self._batches = batches
        self._given = at.given
        self._states = list(at.states)

    def __next__(self) -> PackedBatch:
        batch = next(self._batches)
        next_index, held = batch.state
        # On its way here a tuple may have become a list.
        self._states[self._given % len(self._states)] = PackerState(next_index, tuple(held))
        self._given += 1
        return batch

    @property
    def position(self) -> Position:
        """Behind the last batch that was taken."""
        return Position(self._given, tuple(self._states))


class PackedBatches(IterableDataset[PackedBatch]):
    """An endless stream of packed batches, for a `DataLoader` with `batch_size=None`.

    Processes that train together, and the loader's workers, take every n-th sample each, so that none is seen twice.
    The stream is the same for the same numbers of both.

    Args:
        fetch, shape, patience: as `Packer` takes them.
        rank, world_size: this process among those that train together.
        at: to go on where a run stopped.
    """

    def __init__(
        self,
        fetch: Callable[[int], Piece | None],
        shape: RowShape,
        *,
        patience: int = 16,
        rank: int = 0,
        world_size: int = 1,
        at: Position | None = None,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} must be from 0 to below world_size={world_size}")
        self.fetch = fetch
        self.shape = shape
        self.patience = patience
        self.rank = rank
        self.world_size = world_size
        self.at = at

    def __iter__(self) -> Iterator[PackedBatch]:
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        at = self.at or Position.start(workers)
        if len(at.states) != workers:
            raise ValueError(
                f"the stream was made by {len(at.states)} workers and is to go on with {workers}; use as many"
            )
        # The loader asks its workers in turn, from the first on; whose turn it was makes the next batch.
        part = (at.given + number) % workers
        first, step = self.rank * workers + part, self.world_size * workers
        packer = Packer(
            lambda index: self.fetch(first + index * step), self.shape, patience=self.patience, state=at.states[part]
        )
        while True:
            yield packer.batch()
