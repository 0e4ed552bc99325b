"""The models that are loaded: the one that answers, and those beside it. Equal tensors are held once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from app.backend import Backend, Device, Loader, ModelInfo, usable_device
from app.errors import EngineError, plain, without_folders
from app.follow import LoadStatus, Status
from app.precision import SCHEMES, Precision, default_precision, refusal

log = logging.getLogger(__name__)

Need = Callable[[str, Device, Precision], "MemoryNeed"]


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that loading a model takes, and what is free for them (None: the system does not tell)."""

    needed_bytes: int
    free_bytes: int | None
    precision: str = ""

    @property
    def fits(self) -> bool:
        return self.free_bytes is None or self.needed_bytes < self.free_bytes

    def __str__(self) -> str:
        free = "" if self.free_bytes is None else f", {_size(self.free_bytes)} are free"
        held = f" for weights in {self.precision}" if self.precision else ""
        return f"needs {_size(self.needed_bytes)} of memory{held}{free}"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{-(-num_bytes >> 20):,} MiB"


def memory_need(model: str, device: Device, precision: Precision) -> MemoryNeed:
    """From the model's config, and from the scheme of its files if they are here. On a CPU the largest weight in full
    is counted too, which is there while it is packed; equal tensors of other models are not taken off.

    Raises: ValueError or OSError if the model is not to be had.
    """
    import torch

    from mmmamba.checkpoint import build_meta, named_tensors, read_config, resolve_checkpoint
    from mmmamba.kernels.native import load_native
    from mmmamba.memory import free_memory_bytes
    from mmmamba.place import default_dtype
    from quantize.ahead import loaded_bytes, stored_scheme

    where = usable_device(device)
    directory = resolve_checkpoint(model, config_only=True)
    chosen = default_precision((model,), where) if precision == "auto" else precision
    scheme = stored_scheme(directory) or (chosen if chosen in SCHEMES else None)
    dtype = default_dtype(where) if chosen in SCHEMES else getattr(torch, chosen)
    config = read_config(directory)
    in_c = scheme is None or where.type != "cpu" or load_native()[0] is not None
    needed = loaded_bytes(config, scheme, dtype, in_c=in_c)
    if where.type == "cpu":
        needed += 4 * max(tensor.numel() for _, tensor in named_tensors(build_meta(config)))
    return MemoryNeed(needed, free_memory_bytes(where), scheme or chosen)


class Models(Status):
    """Loads models on the engine's lane. `current` answers; `status` tells of the last load.

    Those in `together` are compared, so `auto` means one precision for all of them.
    """

    def __init__(
        self, model: str, device: Device, precision: Precision, loader: Loader, need: Need = memory_need
    ) -> None:
        self.model, self.device, self.precision = model, device, precision
        self.status = LoadStatus()
        self.together: tuple[str, ...] = ()
        self._loader, self._need = loader, need
        self._loaded: dict[tuple[str, Precision], Backend] = {}
        self._automatic: dict[str, Precision] = {}

    @property
    def current(self) -> Backend | None:
        return self._loaded.get(self._key(self.model, self.precision))

    @property
    def info(self) -> ModelInfo | None:
        return self.current.info if self.current else None

    def note(self, model: str) -> str:
        """What loading a model will take; nothing if it is loaded, or if that cannot be told.

        Raises: EngineError if this device cannot run the precision.
        """
        if self._key(model, self.precision) in self._loaded:
            return ""
        need = self.need(model, self.precision)
        return "" if need is None else str(need)

    def get(self, model: str | None = None, precision: Precision | None = None) -> Backend:
        """A model, loaded if it is not yet; the one that answers unless another is named.

        Raises: EngineError in plain words; what was loaded before stays. A failed load is tried again by the next call.
        """
        model, precision = model or self.model, precision or self.precision
        return self._loaded.get(self._key(model, precision)) or self._load(model, precision)

    def switch(self, model: str, precision: Precision) -> Backend:
        """Load another model and let it answer from now on; the old one stays in charge if that fails. Those that are
        compared are loaded in the new precision when they are asked for."""
        before = self._key(self.model, self.precision)
        backend = self.get(model, precision)
        self.model, self.precision = model, precision
        self.status = LoadStatus("ready", 1.0, "")
        now = self._key(model, precision)
        for key in list(self._loaded):
            if key != now and (key == before or key[1] != now[1]):
                self.unload(*key)
        return backend

    def unload(self, model: str, precision: Precision | None = None) -> None:
        """Free a model; states of it are kept, for when it comes back."""
        self._loaded.pop(self._key(model, precision or self.precision), None)

    def need(self, model: str, precision: Precision) -> MemoryNeed | None:
        """What loading would take; None if that cannot be told before trying.

        Raises: EngineError if this device cannot run the precision.
        """
        if reason := refusal(precision, self.device):
            raise EngineError(reason, blame="server")
        try:
            return self._need(model, self.device, self._worked_out(model, precision))
        except (ValueError, OSError):
            return None

    def _key(self, model: str, precision: Precision) -> tuple[str, Precision]:
        return model, self._automatic.get(model, precision) if precision == "auto" else precision

    def _worked_out(self, model: str, precision: Precision) -> Precision:
        """What `auto` means for a model; it stays that."""
        if precision == "auto" and model not in self._automatic:
            group = self.together if model in self.together else (model,)
            try:
                self._automatic[model] = default_precision(group, usable_device(self.device))
            except (ValueError, OSError):
                return "auto"  # the loader says what is wrong
        return self._key(model, precision)[1]

    def _load(self, model: str, precision: Precision) -> Backend:
        name = Path(model).name
        self.status = LoadStatus("loading", 0.0, "starting")

        def progress(fraction: float, what: str) -> None:
            self.status = LoadStatus("loading", min(max(fraction, 0.0), 1.0), what)

        try:
            need = self.need(model, precision)
            if need is not None and not need.fits:
                raise EngineError(
                    f'"{name}" {need}: it does not fit. Choose a smaller model or precision, or close other programs.',
                    blame="server",
                )
            if need is not None:
                progress(0.0, str(need))
            key = model, self._worked_out(model, precision)
            if key not in self._loaded:
                self._loaded[key] = self._loader(model, self.device, key[1], progress, tuple(self._loaded.values()))
            backend = self._loaded[key]
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
