"""Prompts read in one captured pass: padding leaves no trace, and what cannot be captured is left to the plain path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmmamba.decoder import reading
from mmmamba.decoder.reading import MAX_GRAPHS, MIN_TEXT, PromptReader, Shape
from mmmamba.generate import ModelInputs, prefill
from mmmamba.model import MMMamba
from mmmamba.state import DecodeState
from tests.helpers import assert_near, assert_same_state, random_ids, random_model, random_tiles, tiny_raw

LINEAR: dict[str, Any] = {
    "embedding": {"layers_block_type": ["mamba2"] * 3},
    "language": {"layers_block_type": ["mamba2"] * 2},
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
EXACT = 1e-10  # float64
TILE = 4  # tokens of a tile of 56 pixels


def make(device: str = "cpu", **changes: Any) -> MMMamba:
    return random_model(tiny_raw(**(LINEAR | changes))).to(device)


def prompt(model: MMMamba, layout: list[int], seed: int = 0) -> tuple[Tensor, Tensor | None]:
    """Ids and tiles: `layout` alternates tokens of text and tiles, beginning with text."""
    tiles = sum(layout[1::2])
    ids = random_ids(model.config.to_dict(), [-n * TILE if i % 2 else n for i, n in enumerate(layout)], seed=seed)
    return ids, random_tiles(tiles, seed=seed) if tiles else None


def read(model: MMMamba, reader: PromptReader, ids: Tensor, tiles: Tensor | None, state: DecodeState) -> Tensor:
    with torch.inference_mode():
        shape = reader.shape_of(model, ids, tiles, state)
        assert shape is not None
        logits = reader.read(model, ids, tiles, state, shape)
    assert logits is not None
    return logits


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "changes",
    [{}, {"embedding": LINEAR["embedding"] | {"pixel_shuffle_loc": "pre"}}, {"normalize_encoder_output": True}],
    ids=["post", "pre", "unit"],
)
def test_as_the_plain_path(device: str, changes: dict[str, Any]) -> None:
    model, reader = make(device, **changes), PromptReader()
    state, want_state = model.new_state(), model.new_state()
    # One turn after the other, so that states go in and come out; the third one replays what the first one made.
    for turn, layout in enumerate(([3, 1, 4], [MIN_TEXT], [5, 1, 6], [1, 1, 2, 2, MIN_TEXT], [1])):
        ids, tiles = prompt(model, layout, seed=turn)
        want = model(ids.to(device), None if tiles is None else tiles.to(device), want_state, last_only=True)[:, -1]
        assert_near(f"turn {turn}", read(model, reader, ids, tiles, state), want, EXACT)
        assert_same_state(state, want_state, EXACT)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_of_a_batch(device: str) -> None:
    model, reader = make(device), PromptReader()
    (first, tiles), (second, other) = (prompt(model, [2, 1, 3], seed=seed) for seed in (1, 2))
    assert tiles is not None
    assert other is not None
    ids, pixels = torch.cat([first, second]), torch.cat([tiles, other])
    state = model.new_state(2)
    got = read(model, reader, ids, pixels, state)
    for row, (one, own) in enumerate(((first, tiles), (second, other))):
        alone = model.new_state()
        assert_near(f"row {row}", got[row], read(model, reader, one, own, alone)[0], EXACT)
        for name, tensor in state.tensors().items():
            assert_near(name, tensor[row], alone.tensors()[name][0], EXACT)


def test_what_is_left_to_the_plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    model, reader = make(), PromptReader()

    def shape(ids: Tensor, tiles: Tensor | None, **given: Any) -> Shape | None:
        return reader.shape_of(given.get("model", model), ids, tiles, given.get("state", model.new_state(len(ids))))

    ids, tiles = prompt(model, [2, 1, 3])
    assert tiles is not None
    assert shape(ids, tiles) == Shape(1, 1, 56, MIN_TEXT)
    assert shape(ids, None) is None, "tiles are missing: the plain path says so"
    assert shape(ids, torch.cat([tiles, tiles])) is None, "one tile too many"
    assert shape(ids, tiles[..., :50]) is None, "not square"
    assert shape(ids[:, :5], tiles) is None, "the prompt ends inside a tile"
    hybrid = random_model(tiny_raw())
    assert shape(ids, tiles, model=hybrid, state=hybrid.new_state()) is None, "keys have no fixed place"
    other = make(language=LINEAR["language"] | {"intermediate_size": 48})
    assert shape(ids, tiles, state=other.new_state()) is None, "the state of another model: the plain path says so"
    assert shape(ids, tiles, state=model.new_state().to("cpu", torch.float32)) is None, "in another dtype"
    state = model.new_state()
    with torch.inference_mode():
        model(ids[:, :4], tiles, state)
    assert state.pending.shape[1]
    assert shape(ids[:, 4:], None, state=state) is None, "a tile is half read"
    monkeypatch.setattr(reading, "MAX_TOKENS", 40)
    assert shape(prompt(model, [41])[0], None) is None
    assert shape(prompt(model, [32])[0], None) == Shape(1, 0, 0, 32)


def test_few_graphs_are_kept_and_a_failure_ends_them(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, reader = make(), PromptReader()
    monkeypatch.setattr(reading, "MIN_TEXT", 1)
    for power in range(MAX_GRAPHS + 2):
        read(model, reader, prompt(model, [1 << power])[0], None, model.new_state())
    assert len(reader._graphs) == MAX_GRAPHS

    def fail(*args: object) -> None:
        raise torch.OutOfMemoryError("the card is full")

    monkeypatch.setattr(reading, "_Reading", fail)
    ids, tiles = prompt(model, [2, 1, 3])
    state = model.new_state()
    before = state.clone()
    kind = reader.shape_of(model, ids, tiles, state)
    assert kind is not None
    assert reader.read(model, ids, tiles, state, kind) is None
    assert_same_state(state, before)
    assert "prompts are read without CUDA graphs: OutOfMemoryError: the card is full" in caplog.text
    assert reader.shape_of(model, ids, tiles, state) is None, "it is not tried again"


def test_prefill_hands_whole_prompts_over(monkeypatch: pytest.MonkeyPatch) -> None:
    model, reader = make(), PromptReader()
    asked = []

    class Decoder:
        def read(self, model: MMMamba, ids: Tensor, tiles: Tensor | None, state: DecodeState) -> Tensor | None:
            asked.append(ids.shape[1])
            kind = reader.shape_of(model, ids, tiles, state)
            return None if kind is None else reader.read(model, ids, tiles, state, kind)

    ids, tiles = prompt(model, [2, 1, 30])
    want_state, state = model.new_state(), model.new_state()
    want = prefill(model, ModelInputs(ids, tiles), want_state)
    monkeypatch.setattr("mmmamba.generate.decoder_for", lambda model: Decoder())
    assert_near("logits", prefill(model, ModelInputs(ids, tiles), state), want, EXACT)
    assert_same_state(state, want_state, EXACT)
    prefill(model, ModelInputs(ids, tiles), model.new_state(), piece_size=10)
    assert asked == [36], "a prompt that is to be read in pieces is"
    with pytest.raises(ValueError, match="input_ids hold 4 image tokens, but pixel_values is None"):
        prefill(model, ModelInputs(ids, None), model.new_state())
