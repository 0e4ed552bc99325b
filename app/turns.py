"""One turn with a model: the state before it found or read again, the message read, the answer written and kept.

All of it runs in the engine's lane.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from app.backend import Backend
from app.chat import Chat, Metrics, Resumed, Turn
from app.errors import EngineError
from app.follow import Reply
from app.scratch import still_used
from app.settings import Settings
from app.states import State, StateStore


@dataclass(frozen=True)
class Request:
    """A message to be answered after `parent` (None: at the beginning)."""

    parent: Turn | None
    text: str
    images: tuple[str | Path, ...]


class Cancelled(Exception):
    """The cancel flag was set while a conversation was read again."""


class Turns:
    """Turns of all conversations; their states are kept in `states`."""

    def __init__(self, states: StateStore) -> None:
        self.states = states

    def answer(
        self,
        backend: Backend,
        chat: Chat,
        request: Request,
        settings: Settings,
        cancel: threading.Event,
        put: Callable[[Reply], None],
    ) -> None:
        """Answer with a model and commit the turn; runs in the lane. `put` gets a reply for every token and one with
        stage "done".  Raises: what the model raises; `chat` is then as it was."""
        put(Reply(stage="reading"))
        parent = request.parent
        state, resumed = self.state_after(backend, parent, cancel)
        started = time.monotonic()
        path = parent.path if parent else []
        ids, tiles = self._encode(backend, path, request.text, request.images, settings.max_tiles, settings.system)
        num_tiles = tuple(len(t) for t in tiles)
        prepared_ms = 1000 * (time.monotonic() - started)
        reply = Reply(stage="writing")
        for event in backend.stream(ids, tiles, state, settings, cancel):
            metrics = Metrics(
                ttft_ms=None if event.ttft_ms is None else event.ttft_ms + prepared_ms,
                tok_per_sec=event.tok_per_sec,
                num_tokens=event.num_tokens,
                num_tiles=sum(num_tiles),
                text_tokens=state.num_text_tokens,
                image_tokens=state.num_image_tokens,
                state_bytes=state.nbytes,
                recurrent_bytes=state.recurrent_nbytes,
                cache_bytes=state.cache_nbytes,
                image_tiles=num_tiles,
                resumed=resumed,
            )
            reply = Reply(event.reply, "writing", metrics=metrics, finish_reason=event.finish_reason)
            if event.finish_reason is None:
                put(reply)
        if reply.finish_reason is None:
            raise RuntimeError("the model's stream ended without a finish_reason")
        if reply.text or reply.finish_reason != "cancel":
            turn = Turn(
                request.text,
                request.images,
                reply.text,
                reply.finish_reason,
                reply.metrics,
                None if parent else settings.system,
                settings.max_tiles,
                parent,
            )
            before = parent.snapshots.get(backend.key) if parent else None
            turn.snapshots[backend.key] = self.states.keep(state, backend.mover, before)
            chat.commit(turn)
            still_used(image for earlier in turn.path for image in earlier.images)
        put(replace(reply, stage="done"))

    def state_after(self, backend: Backend, turn: Turn | None, cancel: threading.Event) -> tuple[State, Resumed]:
        """A state of the caller's own that has seen the conversation up to `turn`; runs in the lane.

        The nearest snapshot is taken; turns after it that have none for this model are read, and keep one from then on.
        Raises: EngineError if a picture of such a turn is gone; Cancelled.
        """
        started = time.monotonic()
        path = turn.path if turn else []
        store = self.states
        for at in range(len(path), -1, -1):
            kept = path[at - 1].snapshots.get(backend.key) if at else None
            state = store.take(kept) if kept else None
            if state is not None:
                break
        else:
            at, state = 0, backend.new_state()
        for i in range(at, len(path)):
            ids, tiles = self._encode(
                backend, path[:i], path[i].text, path[i].images, path[i].max_tiles, path[0].system
            )
            if not backend.read(ids + backend.encode_reply(path[i].reply), tiles, state, cancel):
                raise Cancelled
            before = path[i - 1].snapshots.get(backend.key) if i else None
            path[i].snapshots[backend.key] = store.keep(state, backend.mover, before)
            state = state.fork()
        return state, Resumed(len(path), 1e3 * (time.monotonic() - started), len(path) - at)

    def _encode(
        self,
        backend: Backend,
        path: Sequence[Turn],
        text: str,
        images: Sequence[str | Path],
        max_tiles: int,
        system: str | None,
    ) -> tuple[list[int], list[Any]]:
        """Ids and tiles of a message that follows the turns of `path`."""
        tiles = [backend.tile(open_image(image, i), max_tiles or None) for i, image in enumerate(images)]
        ids = backend.encode(
            text,
            [len(t) for t in tiles],
            first=not path,
            images_before=sum(len(turn.images) for turn in path),
            system=system if not path else None,
        )
        return ids, tiles


def open_image(image: str | Path, index: int | None = None) -> Any:
    """Decode an image. Raises: EngineError that names the file."""
    from mmmamba.image import ImageError, load_image

    name = Path(image).name
    try:
        return load_image(image)
    except ImageError as error:
        message = str(error).replace(str(image), name)
        raise EngineError(message if name in message else f"{name}: {message}", image=index) from error
