"""A conversation as the server holds it: turns, the model's state after each, and what is being answered now."""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Protocol, Self

from app.errors import EngineError

FinishReason = Literal["stop", "length", "cancel"]
Key = tuple[str, str]


class State(Protocol):
    """What the app needs of `mmmamba.state.DecodeState`."""

    num_image_tokens: int

    @property
    def nbytes(self) -> int: ...
    @property
    def num_text_tokens(self) -> int: ...
    def clone(self) -> Self: ...


@dataclass(frozen=True)
class Metrics:
    """Figures of one turn, by the model's own clock (waiting in the queue and loading are not counted).

    Attributes:
        ttft_ms: from the start of work on the message (tiling, prefill) to the first token; None before it.
        tok_per_sec: decoding only, after the first token; None before the second.
        num_tokens: tokens written in this turn.    num_tiles: tiles of the images of this turn, thumbnails included.
        text_tokens, image_tokens: what the state has seen over the whole conversation.
        state_bytes: the memory that carries the conversation on.
    """

    ttft_ms: float | None = None
    tok_per_sec: float | None = None
    num_tokens: int = 0
    num_tiles: int = 0
    text_tokens: int = 0
    image_tokens: int = 0
    state_bytes: int = 0


@dataclass(frozen=True)
class Turn:
    """A question and its whole answer. `state` has seen all up to and including this answer; None if let go."""

    text: str
    images: tuple[str | Path, ...]
    reply: str
    finish_reason: FinishReason
    metrics: Metrics
    state: State | None = field(repr=False)


@dataclass(eq=False)
class Chat:
    """One conversation. Turns are whole: an answer that failed leaves no trace, a stopped one is as long as it got."""

    turns: list[Turn] = field(default_factory=list)
    _running: set[threading.Event] = field(default_factory=set, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of all states kept."""
        return sum(turn.state.nbytes for turn in self.turns if turn.state is not None)

    @property
    def busy(self) -> bool:
        return bool(self._running)

    def state_before(self, index: int) -> State | None:
        """The state that turn `index` starts from, None at the beginning. Clone it before advancing it.

        Raises: EngineError if that snapshot was let go to save memory.
        """
        if index == 0:
            return None
        state = self.turns[index - 1].state
        if state is None:
            raise EngineError(
                f"Turn {index + 1} is too far back: the server no longer holds the memory from before it. "
                "Start a new chat and ask again."
            )
        return state

    def commit(self, index: int, turn: Turn) -> None:
        """Make `turn` the turn number `index` and the last one."""
        with self._lock:
            self.turns = [*self.turns[:index], turn]

    def drop_snapshots(self, keep: int = 2) -> None:
        """Let go of all states but the last `keep` (two: to go on, and to answer the last question again)."""
        with self._lock:
            cut = len(self.turns) - keep
            self.turns = [replace(turn, state=None) if i < cut else turn for i, turn in enumerate(self.turns)]

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


class ChatStore:
    """All conversations of the server, by key, the longest unused first; bounded in number and in bytes.

    Over the limit, old snapshots go first, then whole idle conversations.
    """

    def __init__(self, max_chats: int = 256, max_bytes: int = 2 << 30) -> None:
        self.max_chats, self.max_bytes = max_chats, max_bytes
        self._chats: OrderedDict[Key, Chat] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._chats)

    def get(self, key: Key) -> Chat | None:
        with self._lock:
            chat = self._chats.get(key)
            if chat is not None:
                self._chats.move_to_end(key)
            return chat

    def new(self, key: Key) -> Chat:
        """An empty conversation under `key`; one that was there is stopped and forgotten."""
        self.drop(key)
        with self._lock:
            chat = self._chats[key] = Chat()
        self.trim()
        return chat

    def drop(self, key: Key) -> None:
        with self._lock:
            chat = self._chats.pop(key, None)
        if chat is not None:
            chat.stop()

    def trim(self) -> None:
        """Get back under the limits. Conversations being answered, and the most recent one, are kept."""
        with self._lock:
            for chat in self._chats.values():
                if self._nbytes() <= self.max_bytes:
                    break
                chat.drop_snapshots()
            for key in [key for key, chat in list(self._chats.items())[:-1] if not chat.busy]:
                if len(self._chats) <= self.max_chats and self._nbytes() <= self.max_bytes:
                    break
                del self._chats[key]

    def _nbytes(self) -> int:
        return sum(chat.nbytes for chat in self._chats.values())


def new_session_id() -> str:
    """An id that cannot be guessed: whoever knows it can go on with the conversation."""
    return secrets.token_urlsafe(16)
