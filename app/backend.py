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

from app.chat import FinishReason, State
from app.settings import Settings

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from mmmamba.model import MMMamba

Progress = Callable[[float, str], None]
Device = str
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
DTYPES: tuple[Dtype, ...] = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ModelInfo:
    """What the page says about the model. `state_bytes` is the memory of an empty conversation; `max_tiles` what the
    model was made for; `kind` is `linear` (memory of constant size), `hybrid` or `teacher` (both grow)."""

    name: str
    kind: Literal["linear", "hybrid", "teacher"]
    device: str
    dtype: str
    max_tiles: int
    state_bytes: int


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

    def new_state(self) -> State: ...

    def tile(self, image: Image.Image, max_tiles: int | None) -> Sized:
        """The tiles of one image, as `stream` takes them; `max_tiles=None` is the model's own limit."""
        ...

    def encode(self, text: str, image_tiles: Sequence[int], *, first: bool, images_before: int) -> list[int]:
        """Token ids of a new user turn with images of so many tiles each, up to where the answer starts.

        `images_before` counts those of earlier turns.
        """
        ...

    def stream(
        self, ids: list[int], tiles: Sequence[Any], state: Any, settings: Settings, cancel: threading.Event
    ) -> Iterator[Event]:
        """Read the turn and write the answer; `state` ends having seen the turn and the visible answer."""
        ...


Loader = Callable[[str, Device, Dtype, Progress], Backend]


def load_backend(model: str, device: Device, dtype: Dtype, progress: Progress) -> Backend:
    """Load a checkpoint directory, a hub id, or a bundled model by name.

    Args:
        device: a torch device, or "auto" for CUDA where there is one.
        dtype: "auto" is bfloat16 where the hardware multiplies it, else float32.
        progress: called with a fraction (0 to 1) and what is being done.
    Raises: ValueError or OSError with a message for people, as `mmmamba.load_model` does.
    """
    progress(0.0, "starting PyTorch")
    import torch

    from mmmamba import load_model
    from mmmamba.place import default_device, default_dtype

    where = default_device() if device == "auto" else torch.device(device)
    if where.type == "cpu":
        _leave_a_core()
    how = default_dtype(where) if dtype == "auto" else getattr(torch, dtype)
    loaded = load_model(model, device=where, dtype=how, progress=progress)
    return MMMambaBackend(loaded, model)


@cache
def _leave_a_core() -> None:
    """Let torch use one core less: with all of them taken, its threads wait for each other whenever the page's server
    or a browser on the same machine needs one, and both become slow. OMP_NUM_THREADS overrides it."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() - 1))


class MMMambaBackend:
    """`Backend` over `mmmamba`."""

    def __init__(self, model: MMMamba, name: str) -> None:
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
        )

    def new_state(self) -> State:
        return self.model.new_state()

    def tile(self, image: Image.Image, max_tiles: int | None) -> Tensor:
        from mmmamba.image import tile_image

        return tile_image(image, self.config, max_tiles=max_tiles)

    def encode(self, text: str, image_tiles: Sequence[int], *, first: bool, images_before: int) -> list[int]:
        from mmmamba.prompt import encode_user_turn

        return encode_user_turn(
            self.tokenizer, self.config, text, image_tiles, first=first, images_before=images_before
        )

    def stream(
        self, ids: list[int], tiles: Sequence[Any], state: Any, settings: Settings, cancel: threading.Event
    ) -> Iterator[Event]:
        import torch

        from mmmamba.generate import ModelInputs, SamplingParams, stream

        params = SamplingParams(
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_new_tokens=settings.max_new_tokens,
            seed=settings.seed,
            greedy=settings.greedy,
        )
        inputs = ModelInputs(torch.tensor([ids]), torch.cat(list(tiles)) if tiles else None)
        return stream(self.model, self.tokenizer, inputs, state, params, stop_token_ids=self.stop_ids, cancel=cancel)
