"""A conversation as the server holds it: a tree of turns, the model's state after each, what is being answered now."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from app.sessions import Key, Sessions
from app.states import Kept, StateStore

FinishReason = Literal["stop", "length", "cancel"]


@dataclass(frozen=True)
class Resumed:
    """Where an answer started: after turn number `turn` (0: at the beginning), which took `ms`.

    `reread` turns had no state left (imported, or let go to save memory), so they were read again.
    """

    turn: int = 0
    ms: float = 0.0
    reread: int = 0


@dataclass(frozen=True)
class Metrics:
    """Figures of one turn, by the model's own clock (waiting in the queue and loading are not counted).

    Attributes:
        ttft_ms: from the start of work on the message (tiling, prefill) to the first token; None before it.
        tok_per_sec: decoding only, after the first token; None before the second.
        num_tokens: tokens written in this turn.    num_tiles: tiles of the images of this turn, thumbnails included.
        text_tokens, image_tokens: what the state has seen over the whole conversation.
        state_bytes: the memory that carries the conversation on, spare room of caches included.
        recurrent_bytes, cache_bytes: the parts of it that stay as they are, and that grow with every token.
        image_tiles: tiles of every image of this turn, in order.
    """

    ttft_ms: float | None = None
    tok_per_sec: float | None = None
    num_tokens: int = 0
    num_tiles: int = 0
    text_tokens: int = 0
    image_tokens: int = 0
    state_bytes: int = 0
    recurrent_bytes: int = 0
    cache_bytes: int = 0
    image_tiles: tuple[int, ...] = ()
    resumed: Resumed = Resumed()


@dataclass(eq=False)
class Turn:
    """A question and its whole answer; `parent` is the turn before it, None for a first one.

    `snapshots` are the states that have seen all up to and including this answer, by the model they belong to; a model
    without one reads the turn again. `system` is the system prompt of a first turn, None for the model's own.
    `drawn` is a picture with the places on it that the answer names.
    """

    text: str
    images: tuple[str | Path, ...]
    reply: str
    finish_reason: FinishReason
    metrics: Metrics = field(default_factory=Metrics)
    system: str | None = None
    max_tiles: int = 0
    parent: Turn | None = field(default=None, repr=False)
    drawn: str | None = None
    snapshots: dict[str, Kept] = field(default_factory=dict, repr=False)

    @property
    def path(self) -> list[Turn]:
        """The turns from the beginning to this one."""
        turns: list[Turn] = []
        turn: Turn | None = self
        while turn is not None:
            turns.append(turn)
            turn = turn.parent
        return turns[::-1]


class Chat:
    """One conversation and its branches. Turns are whole: an answer that failed leaves no trace, a stopped one is as
    long as it got. Going back moves `head`; what was said after it stays as a branch."""

    def __init__(self, states: StateStore | None = None) -> None:
        self.states = StateStore() if states is None else states
        self.all_turns: list[Turn] = []
        self.head: Turn | None = None
        self.closed = False
        self.resting = False  # until the next message
        self._ended: list[Turn] = []
        self._running: set[threading.Event] = set()
        self._lock = threading.Lock()

    @property
    def turns(self) -> list[Turn]:
        """The turns that lead to where the conversation stands, in order."""
        return self.head.path if self.head else []

    @property
    def busy(self) -> bool:
        return bool(self._running)

    @property
    def branches(self) -> list[Turn]:
        """The last turn of every branch, in order of their making."""
        parents = {id(turn.parent) for turn in self.all_turns if turn.parent is not None}
        return [turn for turn in self.all_turns if id(turn) not in parents]

    def commit(self, turn: Turn) -> None:
        """Add `turn` after its parent and stand there. A conversation that was closed meanwhile frees it at once."""
        with self._lock:
            if not self.closed:
                self.all_turns.append(turn)
                self.head = turn
                return
        for kept in turn.snapshots.values():
            self.states.release(kept)

    def go_back(self, num_turns: int) -> None:
        """Stand after the first `num_turns` turns of this branch; the rest stays as a branch of its own."""
        with self._lock:
            turns = self.turns
            self.head = turns[num_turns - 1] if 0 < num_turns <= len(turns) else None

    def go_to(self, index: int) -> None:
        """Stand at the end of branch `index` of `branches`."""
        ends = self.branches
        if 0 <= index < len(ends):
            self.head = ends[index]

    @contextmanager
    def running(self, cancel: threading.Event) -> Iterator[None]:
        """While an answer is being written: lets `stop` reach it."""
        with self._lock:
            self._running.add(cancel)
        try:
            yield
        finally:
            with self._lock:
                self._running.discard(cancel)

    def stop(self) -> None:
        """Ask whatever answer is being written or waits to be written to end."""
        with self._lock:
            for cancel in self._running:
                cancel.set()

    def rest(self) -> None:
        """Stop, and free every state; what was said stays, and is read again when it goes on. Called again after a job
        that was under way, as `close` is."""
        self.resting = True
        self.stop()
        for turn in self.all_turns:
            self._free(turn)

    def _free(self, turn: Turn) -> None:
        while turn.snapshots:
            self.states.release(turn.snapshots.popitem()[1])

    def close(self) -> None:
        """Stop, and free every state. Called again after a job that was under way, it frees what that one made."""
        self.stop()
        with self._lock:
            self.closed = True
            self._ended += self.all_turns
            self.all_turns, self.head = [], None
        for turn in self._ended:
            self._free(turn)


class ChatStore(Sessions[Chat]):
    """All conversations of the server. Their states share one budget (`states`)."""

    def __init__(self, max_chats: int = 256, states: StateStore | None = None) -> None:
        super().__init__(max_chats)
        self.states = StateStore() if states is None else states

    def new(self, key: Key) -> Chat:
        """An empty conversation under `key`; one that was there is stopped and freed."""
        chat = Chat(self.states)
        self.put(key, chat)
        return chat
