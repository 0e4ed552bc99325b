"""A loaded model behind the few calls that the engine makes. Torch and `mmmamba` are imported when a model is loaded:
the page opens without waiting for them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from app.chat import FinishReason
from app.precision import SCHEMES, Precision, default_precision, refusal
from app.settings import Settings
from app.states import Mover, State

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor

    from mmmamba.config import ModelConfig
    from mmmamba.model import MMMamba
    from mmmamba.state import DecodeState

Progress = Callable[[float, str], None]
Device = str


@dataclass(frozen=True)
class ModelInfo:
    """What the page says about the model. `state_bytes` is the memory of an empty conversation; `max_tiles` what the
    model was made for; `kind` is `linear` (memory of constant size), `hybrid` or `teacher` (both grow). `fingerprint`
    names the shapes that a state fits, `weights` the weights that made it. `precision` is what the weights are held in,
    `dtype` what is computed in."""

    name: str
    kind: Literal["linear", "hybrid", "teacher"]
    device: str
    dtype: str
    max_tiles: int
    state_bytes: int
    fingerprint: str = ""
    weights: str = ""
    precision: str = ""


class Event(Protocol):
    """What the engine reads of `mmmamba.generate.StreamEvent`."""

    @property
    def reply(self) -> str: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def ttft_ms(self) -> float | None: ...
    @property
    def tok_per_sec(self) -> float | None: ...
    @property
    def finish_reason(self) -> FinishReason | None: ...


class Backend(Protocol):
    """A model ready to talk. All calls come from the engine's one lane."""

    info: ModelInfo
    key: str  # of the states: those of another model, precision or device are not ours
    mover: Mover

    def new_state(self) -> State: ...

    def tile(self, image: Image.Image, max_tiles: int | None) -> Sized:
        """The tiles of one image, as `stream` takes them; `max_tiles=None` is the model's own limit."""
        ...

    def encode(
        self, text: str, image_tiles: Sequence[int], *, first: bool, images_before: int, system: str | None = None
    ) -> list[int]:
        """Token ids of a new user turn with images of so many tiles each, up to where the answer starts.

        `images_before` counts those of earlier turns; `system` is the system prompt of a first turn.
        """
        ...

    def encode_reply(self, reply: str) -> list[int]:
        """Token ids of an answer that was given, as they follow `encode`."""
        ...

    def read(self, ids: list[int], tiles: Sequence[Any], state: Any, cancel: threading.Event) -> bool:
        """Read without answering; False if `cancel` ended it half-way."""
        ...

    def stream(
        self, ids: list[int], tiles: Sequence[Any], state: Any, settings: Settings, cancel: threading.Event
    ) -> Iterator[Event]:
        """Read the turn and write the answer; `state` ends having seen the turn and the visible answer."""
        ...

    def peak_memory(self) -> Callable[[], int]:
        """Begin to watch memory; what is returned tells the bytes that were taken at most since then."""
        ...

    def sweep(self, plan: SweepPlan) -> SweepRun:
        """Grow the context of a conversation and measure."""
        ...


@dataclass(frozen=True)
class SweepPlan:
    """What a growing context is measured with: see `mmmamba.sweep.Sweep`. `image` is repeated; None is text alone.
    `free_bytes` are those left for a cache, `bandwidth` the bytes a second that the device moves."""

    contexts: tuple[int, ...]
    image: Image.Image | None
    budget_s: float
    states: Path | None
    bandwidth: float
    free_bytes: int | None
    steps: int = 12


class SweepRun(Protocol):
    """What the app needs of `mmmamba.sweep.Sweep`."""

    name: str
    prediction: Any

    def run(self, cancel: threading.Event | None = None) -> Iterator[Any]: ...


Loader = Callable[[str, Device, Precision, Progress, Sequence[Backend]], Backend]


def load_backend(
    model: str,
    device: Device,
    precision: Precision,
    progress: Progress,
    others: Sequence[Backend] = (),
) -> Backend:
    """Load a checkpoint directory, a hub id, or a bundled model by name.

    Args:
        device: a torch device, or "auto" for CUDA where there is one.
        precision: of the weights, packed while they are read; "auto" is `default_precision`.
        progress: called with a fraction (0 to 1) and what is being done.
        others: models loaded already; tensors that equal theirs are held in memory once.
    Raises: ValueError or OSError with a message for people, as `mmmamba.load_model` does.
    """
    progress(0.0, "starting PyTorch")
    import torch

    from mmmamba import load_model
    from mmmamba.memory import return_freed_memory
    from mmmamba.place import default_dtype

    where = usable_device(device)
    if where.type == "cpu":
        _leave_a_core()
    if reason := refusal(precision, where.type):
        raise ValueError(reason)
    chosen = default_precision((model,), where) if precision == "auto" else precision
    packed = chosen in SCHEMES
    dtype = default_dtype(where) if packed else getattr(torch, chosen)
    share = [other.model for other in others if isinstance(other, MMMambaBackend)]
    loaded = load_model(
        model, device=where, dtype=dtype, quantize=chosen if packed else None, progress=progress, share=share
    )
    return_freed_memory()  # of weights that were rounded or unpacked
    return MMMambaBackend(loaded, model)


def usable_device(device: Device) -> torch.device:
    """The device that is meant.  Raises: ValueError if it is not here."""
    import torch

    from mmmamba.place import default_device

    if device == "auto":
        return default_device()
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f'the device "{device}" is not known: start with --device cpu, cuda or cuda:1') from error
    if where.type == "cuda" and (where.index or 0) >= torch.cuda.device_count():
        seen = f"torch sees {torch.cuda.device_count()} CUDA devices here"
        raise ValueError(f'the device is "{device}", and {seen}: start with --device cpu')
    return where


@cache
def _leave_a_core() -> None:
    """Let torch use one core less: with all of them taken, its threads wait for each other whenever the page's server
    or a browser on the same machine needs one, and both become slow. OMP_NUM_THREADS overrides it."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() - 1))


class StateMover:
    """`Mover` for the states of a model, without the model: an unloaded one's states stay movable."""

    def __init__(self, config: ModelConfig, device: str, dtype: str) -> None:
        self.config, self.device, self.dtype = config, device, dtype

    def to_memory(self, state: DecodeState) -> DecodeState:
        return state.to("cpu")

    def to_device(self, state: DecodeState) -> DecodeState:
        return state.to(self.device)

    def load_state(self, path: Path) -> DecodeState:
        import torch

        from mmmamba.state import DecodeState

        return DecodeState.load(path, self.config, device=self.device).to(self.device, getattr(torch, self.dtype))


class MMMambaBackend:
    """`Backend` over `mmmamba`."""

    def __init__(self, model: MMMamba, name: str) -> None:
        from mmmamba.checkpoint import weights_digest
        from mmmamba.prompt import stop_token_ids
        from mmmamba.tokenizer import load_tokenizer

        assert model.source is not None, "a loaded model knows its directory"
        self.model, self.config = model, model.config
        self.tokenizer = load_tokenizer(model.source)
        self.stop_ids = stop_token_ids(self.tokenizer, self.config)
        self.info = ModelInfo(
            name=Path(name).name,
            kind=self.config.kind,
            device=str(model.device),
            dtype=str(model.dtype).removeprefix("torch."),
            max_tiles=self.config.max_dynamic_patch,
            state_bytes=self.new_state().nbytes,
            fingerprint=self.config.fingerprint(),
            weights=weights_digest(model),
            precision=model.scheme or str(model.dtype).removeprefix("torch."),
        )
        self.key = "|".join((self.info.weights, self.info.device, self.info.dtype, self.info.precision))
        self.mover: Mover = StateMover(self.config, self.info.device, self.info.dtype)

    def new_state(self) -> State:
        return self.model.new_state()

    def tile(self, image: Image.Image, max_tiles: int | None) -> Tensor:
        from mmmamba.image import tile_image

        return tile_image(image, self.config, max_tiles=max_tiles)

    def encode(
        self, text: str, image_tiles: Sequence[int], *, first: bool, images_before: int, system: str | None = None
    ) -> list[int]:
        from mmmamba.prompt import encode_user_turn

        return encode_user_turn(
            self.tokenizer,
            self.config,
            text,
            image_tiles,
            first=first,
            system=system if first else None,
            images_before=images_before,
        )

    def encode_reply(self, reply: str) -> list[int]:
        from mmmamba.prompt import encode_reply

        return encode_reply(self.tokenizer, reply)

    def read(self, ids: list[int], tiles: Sequence[Any], state: Any, cancel: threading.Event) -> bool:
        import torch

        from mmmamba.generate import ModelInputs, PrefillCancelled, piece_size, prefill

        inputs = ModelInputs(torch.tensor([ids]), torch.cat(list(tiles)) if tiles else None)
        try:
            prefill(self.model, inputs, state, piece_size=piece_size(self.model.device), cancel=cancel)
        except PrefillCancelled:
            return False
        return True

    def stream(
        self, ids: list[int], tiles: Sequence[Any], state: Any, settings: Settings, cancel: threading.Event
    ) -> Iterator[Event]:
        import torch

        from mmmamba.generate import ModelInputs, SamplingParams, stream

        params = SamplingParams(
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            min_p=settings.min_p,
            repetition_penalty=settings.repetition_penalty,
            max_new_tokens=settings.max_new_tokens,
            seed=settings.seed,
            greedy=settings.greedy,
        )
        inputs = ModelInputs(torch.tensor([ids]), torch.cat(list(tiles)) if tiles else None)
        return stream(
            self.model,
            self.tokenizer,
            inputs,
            state,
            params,
            stop_token_ids=self.stop_ids,
            stop_strings=settings.stop,
            cancel=cancel,
        )

    def peak_memory(self) -> Callable[[], int]:
        from mmmamba.memory import current_memory_bytes, peak_memory_bytes, reset_peak_memory

        device = self.model.device
        reset_peak_memory(device)
        before = current_memory_bytes(device)
        return lambda: max(0, peak_memory_bytes(device) - before)

    def sweep(self, plan: SweepPlan) -> SweepRun:
        from mmmamba.sweep import Sweep, predict

        return Sweep(
            self.model,
            self.tokenizer,
            self.info.name,
            predict(self.model, plan.bandwidth, plan.free_bytes),
            contexts=plan.contexts,
            pixel_values=None if plan.image is None else self.tile(plan.image, None),
            steps=plan.steps,
            budget_s=plan.budget_s,
            states=plan.states,
            weights=self.info.weights,
        )
