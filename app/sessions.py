"""What goes on from request to request, by key; the longest unused is closed when there are too many."""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict
from typing import Generic, Protocol, TypeVar

Key = tuple[str, str]


class Session(Protocol):
    @property
    def busy(self) -> bool: ...
    def close(self) -> None: ...


T = TypeVar("T", bound=Session)


class Sessions(Generic[T]):
    """At most `most` of them, the longest unused first. Safe to use from several threads."""

    def __init__(self, most: int = 256) -> None:
        self.most = most
        self._open: OrderedDict[Key, T] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._open)

    def get(self, key: Key) -> T | None:
        with self._lock:
            session = self._open.get(key)
            if session is not None:
                self._open.move_to_end(key)
            return session

    def put(self, key: Key, session: T) -> None:
        """Have `session` under `key`; one that was there is closed, and so are the longest unused ones beyond the
        limit, if they are not at work."""
        with self._lock:
            ended = [old] if (old := self._open.pop(key, None)) else []
            self._open[key] = session
            for other in list(self._open)[:-1]:
                if len(self._open) <= self.most:
                    break
                if not self._open[other].busy:
                    ended.append(self._open.pop(other))
        for old in ended:
            old.close()

    def drop(self, key: Key) -> None:
        with self._lock:
            session = self._open.pop(key, None)
        if session is not None:
            session.close()


def new_session_id() -> str:
    """An id that cannot be guessed: whoever knows it can go on with the conversation."""
    return secrets.token_urlsafe(16)
