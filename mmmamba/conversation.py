"""A chat with one model: the state is carried from turn to turn, so no turn is read twice."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image

from mmmamba.generate import ModelInputs, SamplingParams, StreamEvent, stream
from mmmamba.image import load_image, tile_image
from mmmamba.model import MMMamba
from mmmamba.prompt import encode_user_turn, stop_token_ids
from mmmamba.tokenizer import Tokenizer, load_tokenizer


class Conversation:
    """Turns of one chat in order. Not for use from several threads at once.

    Args:
        model: from `load_model`; also says where the tokenizer lies, unless one is given.
        system: system prompt; None takes the template's own.
        max_tiles: tiles an image may be cut into; None takes the model's own limit.
    """

    def __init__(
        self,
        model: MMMamba,
        tokenizer: Tokenizer | None = None,
        *,
        system: str | None = None,
        max_tiles: int | None = None,
    ) -> None:
        self.model = model
        if tokenizer is None:
            if model.source is None:
                raise ValueError("the model was made in memory and has no tokenizer files; pass tokenizer=")
            tokenizer = load_tokenizer(model.source)
        self.tokenizer = tokenizer
        self.system = system
        self.max_tiles = max_tiles
        self.reset()

    def reset(self) -> None:
        """Forget everything said so far."""
        self.state = self.model.new_state()
        self.num_turns = 0
        self.num_images = 0

    def ask(
        self,
        text: str,
        images: Sequence[str | Path | bytes | Image.Image] = (),
        params: SamplingParams | None = None,
        *,
        cancel: threading.Event | None = None,
    ) -> Iterator[StreamEvent]:
        """Answer one turn, as events while it is generated; ends early when `cancel` is set.

        A turn that fails, is cancelled before its first token, or whose events are not read to the end, leaves the
        conversation as it was before it.
        Raises: ImageError (a ValueError) for an image that cannot be read.
        """
        config = self.model.config
        first = self.num_turns == 0
        tiles = [tile_image(load_image(image), config, max_tiles=self.max_tiles) for image in images]
        ids = encode_user_turn(
            self.tokenizer,
            config,
            text,
            [len(t) for t in tiles],
            first=first,
            system=self.system if first else None,
            images_before=self.num_images,
        )
        state = self.state.clone()
        event = None
        for event in stream(
            self.model,
            self.tokenizer,
            ModelInputs(torch.tensor([ids]), torch.cat(tiles) if tiles else None),
            state,
            params or SamplingParams(),
            stop_token_ids=stop_token_ids(self.tokenizer, config),
            cancel=cancel,
        ):
            yield event
        if event is None or (event.finish_reason == "cancel" and not event.num_tokens):
            return  # stopped while the prompt was read: this state has seen a part of it
        self.state = state
        self.num_turns += 1
        self.num_images += len(tiles)
