"""ZeroGPU Spaces: a GPU is lent for one call at a time, to a worker process forked from this one.

So models lie in this process's memory on the CPU, a worker moves its copy to the GPU, and states travel as bytes of CPU
tensors: into the worker with the message, back with the end of the answer. (As tensors they would lie in memory that
both processes share, each with an open file, and would need a worker that outlives them.) Nothing is compiled or
captured: a worker may answer one message only. The package `spaces` is imported when a `ZeroGPU` is made, which has to
be before torch is.
"""

from __future__ import annotations

import importlib
import io
import mmap
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import gradio as gr

from app.backend import Backend, Device, Event, MMMambaBackend, Progress, SweepPlan, SweepRun, load_backend
from app.errors import EngineError
from app.precision import Precision
from app.settings import Settings
from app.states import State

if TYPE_CHECKING:
    from mmmamba.state import DecodeState

SECONDS = 60  # of GPU time that a call may take; what is asked for counts against the visitor's share
WATCH_S = 0.05
NO_SWEEP = (
    "Growing the context needs a GPU of its own for minutes, and ZeroGPU lends one for seconds. Duplicate this Space "
    "with CPU or GPU hardware, or run `python -m benchmarks.sweep`."
)


def on_zero_gpu() -> bool:
    """Whether this is a Space with ZeroGPU hardware."""
    return os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "true", "t")


class SharedFlag:
    """A cancel flag that this process and those forked from it see: one byte of shared memory."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 1)

    def is_set(self) -> bool:
        return self._memory[0] == 1

    def set(self) -> None:
        self._memory[0] = 1

    def clear(self) -> None:
        self._memory[0] = 0


class ZeroGPU:
    """Loads models so that their answers come from GPU workers. One lane gives one call at a time, so one flag does.

    Raises: ImportError if the package `spaces` is missing.
    """

    def __init__(self, seconds: int = SECONDS) -> None:
        spaces = importlib.import_module("spaces")
        self.models: dict[str, MMMambaBackend] = {}
        self.cancelled = SharedFlag()
        # Decorated here, so that the Space finds it when the page is launched.
        self.call: Callable[..., Iterator[Any]] = spaces.GPU(duration=seconds)(self._work)

    def load(
        self, model: str, device: Device, precision: Precision, progress: Progress, others: Sequence[Backend] = ()
    ) -> Backend:
        """As `app.backend.load_backend`, in bfloat16 unless told otherwise; `device` is that of a worker, whatever is
        asked for."""
        inner = [other.inner for other in others if isinstance(other, ZeroBackend)]
        loaded = load_backend(model, "cpu", "bfloat16" if precision == "auto" else precision, progress, inner)
        assert isinstance(loaded, MMMambaBackend)
        self.models[loaded.key] = loaded
        return ZeroBackend(self, loaded)

    def _work(self, key: str, ids: list[int], packed: bytes, settings: Settings | None) -> Iterator[Any]:
        """In the worker: read, or read and answer; yields events, and last the state in bytes."""
        # Kernels that are compiled and captured pay after some answers, and this may be the only one.
        os.environ.setdefault("MMMAMBA_DECODER", "plain")
        import torch

        backend = self.models[key]
        backend.model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        tiles, state = unpack(packed)
        moved = state.to(backend.model.device)
        if settings is None:
            yield backend.read(ids, tiles, moved, self.cancelled)  # type: ignore[arg-type]
        else:
            yield from backend.stream(ids, tiles, moved, settings, self.cancelled)  # type: ignore[arg-type]
        yield pack(moved.to("cpu"))


class ZeroBackend:
    """`Backend` whose states lie on the CPU and whose answers come from workers."""

    def __init__(self, zero: ZeroGPU, inner: MMMambaBackend) -> None:
        self.zero, self.inner = zero, inner
        self.info = replace(inner.info, device="ZeroGPU")
        self.key, self.mover = inner.key, inner.mover
        self.new_state, self.tile = inner.new_state, inner.tile
        self.encode, self.encode_reply = inner.encode, inner.encode_reply

    def read(self, ids: list[int], tiles: Sequence[Any], state: Any, cancel: threading.Event) -> bool:
        whole = True
        for item in self._call(ids, tiles, state, None, cancel):
            whole = item
        return whole

    def stream(
        self, ids: list[int], tiles: Sequence[Any], state: Any, settings: Settings, cancel: threading.Event
    ) -> Iterator[Event]:
        last: Event | None = None
        read = state.seqlen + len(ids)
        images = state.num_image_tokens + ids.count(self.inner.config.embedding.img_context_token_id)
        for event in self._call(ids, tiles, state, settings, cancel):
            if event.finish_reason is not None:
                last = event  # goes out once the state is here
            else:
                # The state is in the worker; what it has seen by now is shown all the same.
                state.language.seqlen, state.num_image_tokens = read + event.num_tokens - 1, images
                yield event
        if last is None:
            raise EngineError("The GPU's worker ended before its answer did. Ask again.", blame="server")
        yield last

    def peak_memory(self) -> Callable[[], int]:
        return lambda: 0  # a worker's memory is not seen from here

    def sweep(self, plan: SweepPlan) -> SweepRun:
        raise EngineError(NO_SWEEP)

    def _call(
        self, ids: list[int], tiles: Sequence[Any], state: Any, settings: Settings | None, cancel: threading.Event
    ) -> Iterator[Any]:
        """Items of the worker but its last one, the state, which `state` becomes."""
        flag, over = self.zero.cancelled, threading.Event()
        flag.clear()

        def watch() -> None:
            while not over.is_set():
                if cancel.wait(WATCH_S):
                    flag.set()
                    return

        watcher = threading.Thread(target=watch, name="zero-cancel", daemon=True)
        watcher.start()
        try:
            for item in self.zero.call(self.key, ids, pack((list(tiles), state.clone())), settings):
                if isinstance(item, bytes):
                    become(state, unpack(item))
                else:
                    yield item
        except gr.Error as error:  # no GPU left, or the worker failed
            raise EngineError(re.sub(r"<[^>]*>", "", str(error.message)), blame="busy") from error
        finally:
            over.set()
            watcher.join()


def pack(value: Any) -> bytes:
    """Tensors on the CPU, and what holds them, as bytes."""
    import torch

    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def unpack(data: bytes) -> Any:
    """What `pack` was given; only for bytes of our own worker, as unpickling can run code."""
    import torch

    return torch.load(io.BytesIO(data), weights_only=False)


def become(state: State | DecodeState, other: DecodeState) -> None:
    """Let `state` hold what `other` does."""
    for part in fields(other):
        setattr(state, part.name, getattr(other, part.name))
