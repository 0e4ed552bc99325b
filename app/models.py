"""The models that are loaded: the one that answers, and those beside it. Equal tensors are held once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from app.backend import Backend, Device, Dtype, Loader, ModelInfo, usable_device
from app.errors import EngineError, plain, without_folders
from app.follow import LoadStatus, Status

log = logging.getLogger(__name__)

Need = Callable[[str, Device, Dtype], "MemoryNeed"]


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that a model's weights take, and what is free for them (None: the system does not tell)."""

    needed_bytes: int
    free_bytes: int | None

    @property
    def fits(self) -> bool:
        return self.free_bytes is None or self.needed_bytes < self.free_bytes

    def __str__(self) -> str:
        free = "" if self.free_bytes is None else f", {self.free_bytes / 2**30:.1f} GiB are free"
        return f"needs {self.needed_bytes / 2**30:.1f} GiB of memory{free}"


def memory_need(model: str, device: Device, dtype: Dtype) -> MemoryNeed:
    """From the model's config alone; equal tensors of other models are not taken off.

    Raises: ValueError or OSError if the model is not to be had.
    """
    import torch

    from mmmamba import cost
    from mmmamba.checkpoint import read_config, resolve_checkpoint
    from mmmamba.memory import free_memory_bytes
    from mmmamba.place import default_dtype

    where = usable_device(device)
    size = (default_dtype(where) if dtype == "auto" else getattr(torch, dtype)).itemsize
    config = read_config(resolve_checkpoint(model, config_only=True))
    return MemoryNeed(cost.count_parameters(config).total * size, free_memory_bytes(where))


# Student -> teacher, of the models that people load by name.
TEACHERS = {
    "nano": "nano-teacher",
    "nano-linear": "nano-teacher",
    "hustvl/mmMamba-linear": "OpenGVLab/HoVLE",
    "hustvl/mmMamba-hybrid": "OpenGVLab/HoVLE",
}


def sides_of(model: str, teacher: str | None) -> tuple[str, ...]:
    """The models that one is compared with, itself first; `teacher` None is the known one, "" leaves it out, several
    have commas between them."""
    if teacher is None:
        teacher = TEACHERS.get(model, "")
    named = (name.strip() for name in teacher.split(","))
    return tuple(dict.fromkeys((model, *filter(None, named))))


class Models(Status):
    """Loads models on the engine's lane. `current` answers; `status` tells of the last load."""

    def __init__(self, model: str, device: Device, dtype: Dtype, loader: Loader, need: Need = memory_need) -> None:
        self.model, self.device, self.dtype = model, device, dtype
        self.status = LoadStatus()
        self._loader, self._need = loader, need
        self._loaded: dict[tuple[str, Dtype], Backend] = {}

    @property
    def current(self) -> Backend | None:
        return self._loaded.get((self.model, self.dtype))

    @property
    def info(self) -> ModelInfo | None:
        return self.current.info if self.current else None

    def get(self, model: str | None = None, dtype: Dtype | None = None) -> Backend:
        """A model, loaded if it is not yet; the one that answers unless another is named.

        Raises: EngineError in plain words; what was loaded before stays. A failed load is tried again by the next call.
        """
        key = model or self.model, dtype or self.dtype
        if key not in self._loaded:
            self._loaded[key] = self._load(*key)
        return self._loaded[key]

    def switch(self, model: str, dtype: Dtype) -> Backend:
        """Load another model and let it answer from now on; the old one stays in charge if that fails."""
        before = (self.model, self.dtype)
        backend = self.get(model, dtype)
        self.model, self.dtype = model, dtype
        self.status = LoadStatus("ready", 1.0, "")
        if before != (model, dtype):
            self.unload(*before)
        return backend

    def unload(self, model: str, dtype: Dtype | None = None) -> None:
        """Free a model; states of it are kept, for when it comes back."""
        self._loaded.pop((model, dtype or self.dtype), None)

    def need(self, model: str, dtype: Dtype) -> MemoryNeed | None:
        """What loading would take; None if that cannot be told before trying."""
        try:
            return self._need(model, self.device, dtype)
        except (ValueError, OSError):
            return None

    def _load(self, model: str, dtype: Dtype) -> Backend:
        need = self.need(model, dtype)
        name = Path(model).name
        note = "starting" if need is None else str(need)
        self.status = LoadStatus("loading", 0.0, note)

        def progress(fraction: float, what: str) -> None:
            self.status = LoadStatus("loading", min(max(fraction, 0.0), 1.0), what)

        try:
            if need is not None and not need.fits:
                raise EngineError(
                    f'"{name}" {need}: it does not fit. Choose a smaller model or precision, or close other programs.',
                    blame="server",
                )
            backend = self._loader(model, self.device, dtype, progress, tuple(self._loaded.values()))
        except EngineError as error:
            self._failed(str(error))
            raise
        except Exception as error:
            if isinstance(error, ValueError | OSError):
                log.warning("the model is not loaded: %s", error)  # such a message says it all
            else:
                log.exception("loading the model failed")
            reason = str(error) if isinstance(error, OSError) else plain(error)
            note = f"could not be loaded: {without_folders(reason)}"
            self._failed(note)
            raise EngineError(f'The model "{name}" {note}', blame="server") from error
        self.status = LoadStatus("ready", 1.0, "")
        return backend

    def _failed(self, note: str) -> None:
        """Say it at the model's place, unless another one is there and goes on answering."""
        self.status = LoadStatus("ready", 1.0, "") if self.current else LoadStatus("failed", 0.0, note)
