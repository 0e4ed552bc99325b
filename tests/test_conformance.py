"""The published computation: stored logits and continuations; one pass = pieces = token by token, state included."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor

from mmmamba.generate import ModelInputs, decode_one_token, prefill
from mmmamba.model import MMMamba, token_layout
from mmmamba.state import DecodeState
from tests import conformance, oracle
from tests.helpers import (
    FIXTURES,
    FOLDERS,
    GOLDEN,
    IMAGE_ID,
    TILE_TOKENS,
    TOLERANCE,
    assert_near,
    assert_same_state,
    golden_cases,
    golden_config,
    golden_expected,
    golden_model,
    pieces,
)

CASES = ("image", "long_text", "text", "tiles", "two_images")
FLOAT64 = TOLERANCE[torch.float64]
fixture_cases = pytest.mark.parametrize(
    ("folder", "kind", "case"), [(*fixture, case) for fixture in FIXTURES for case in CASES]
)


def test_no_stored_case_is_left_out() -> None:
    for folder in FOLDERS:
        assert set(golden_cases(folder)) == set(golden_expected(folder)) == set(CASES)
        stored = {kind for case in golden_expected(folder).values() for kind in case if kind.startswith("greedy_")}
        assert stored == {"greedy_hovle", "greedy_linear", "greedy_hybrid"}


@fixture_cases
def test_logits_equal_the_published_ones(folder: str, kind: str, case: str) -> None:
    for dtype in (torch.float32, torch.float64):
        difference = conformance.largest_difference(folder, kind, case, dtype)
        assert difference <= conformance.LIMIT, f"{dtype}: logits differ by {difference:.2e}"


@pytest.mark.parametrize(("folder", "kind"), FIXTURES)
@pytest.mark.parametrize("case", ["image", "text", "two_images"])
def test_greedy_continuations_equal_the_published_ones(folder: str, kind: str, case: str) -> None:
    wanted = golden_expected(folder)[case][f"greedy_{kind}"]
    assert len(wanted) == 12
    assert conformance.greedy(folder, kind, case, 12) == wanted


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("case", CASES)
def test_the_embedding_stack_sees_the_published_ids(folder: str, case: str) -> None:
    tensors = golden_cases(folder)[case]
    repeat = golden_model(folder, "hovle").config.embedding.stack_tokens_per_image_token
    layout = token_layout(tensors["input_ids"], IMAGE_ID, repeat)
    wanted = tensors["hd_input_ids"]
    assert torch.equal(layout.stack_ids, wanted)
    assert torch.equal(layout.stack_image, (wanted[0] == IMAGE_ID).nonzero().squeeze(1))
    assert torch.equal(layout.image, (tensors["input_ids"][0] == IMAGE_ID).nonzero().squeeze(1))
    assert torch.equal(wanted[0, layout.first], tensors["input_ids"][0])
    assert bool((layout.first.diff() >= 1).all())


@pytest.mark.parametrize(("folder", "kind"), FIXTURES)
def test_the_plain_numpy_network_agrees_with_the_published_logits(folder: str, kind: str) -> None:
    """So `oracle` can be trusted in test_model.py, where no fixtures exist."""
    weights = load_file(GOLDEN / folder / kind / "model.safetensors")
    for case in ("long_text", "two_images"):
        tensors = golden_cases(folder)[case]
        tiles = tensors.get("pixel_values")
        config = golden_config(folder, kind)
        logits = oracle.logits(
            weights, config, tensors["input_ids"][0].tolist(), None if tiles is None else tiles.numpy()
        )
        stored = tensors[f"{kind}.logits"].numpy()
        assert abs(logits - stored).max() <= conformance.LIMIT, case


# One pass = any split = token by token. Beyond `max_position_embeddings` dynamic NTK moves the rotary base with the
# length of the sequence, so there a piece must know the length of the whole (`total_seqlens`; `prefill` does): then the
# equality is exact as well. Token by token it cannot hold there, and should not: each token is read with the base of
# the length so far, as in the published code, and deeper layers keep what they computed from it.


@torch.no_grad()
def one_pass(model: MMMamba, ids: Tensor, tiles: Tensor | None) -> tuple[Tensor, DecodeState]:
    state = model.new_state()
    return model(ids, tiles, state), state


@pytest.mark.parametrize(("folder", "kind"), FIXTURES)
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_one_pass_equals_any_split_into_pieces(folder: str, kind: str, case: str) -> None:
    model = golden_model(folder, kind, torch.float64)
    tensors = golden_cases(folder)[case]
    ids, tiles = tensors["input_ids"], tensors.get("pixel_values")
    without_state = model(ids, tiles)
    whole, whole_state = one_pass(model, ids, tiles)
    assert_near("logits with and without a state", whole, without_state, FLOAT64)

    totals = tensors["hd_input_ids"].shape[1], ids.shape[1]
    inside = int((ids[0] == IMAGE_ID).nonzero()[1]) if tiles is not None else 3  # inside the first tile
    draw = random.Random(f"{folder} {kind} {case}")
    for cuts in ([1], [inside], [inside, inside + 1], *(draw.sample(range(1, ids.shape[1]), 5) for _ in range(2))):
        state = model.new_state()
        parts = [model(i, t, state, total_seqlens=totals) for i, t in pieces(ids, tiles, cuts, IMAGE_ID)]
        assert_near(f"logits with cuts at {sorted(cuts)}", torch.cat(parts, dim=1), whole, FLOAT64)
        assert_same_state(state, whole_state, FLOAT64)


@pytest.mark.parametrize(("folder", "kind"), FIXTURES)
@pytest.mark.parametrize("case", ["two_images", "text"])
@torch.no_grad()
def test_one_pass_equals_token_by_token(folder: str, kind: str, case: str) -> None:
    model = golden_model(folder, kind, torch.float64)
    tensors = golden_cases(folder)[case]
    ids, tiles = tensors["input_ids"], tensors.get("pixel_values")
    whole, whole_state = one_pass(model, ids, tiles)
    state = model.new_state()
    rows = []
    for i, t in pieces(ids, tiles, range(1, ids.shape[1]), IMAGE_ID):
        if t is None and not (i == IMAGE_ID).any():
            rows.append(decode_one_token(model, i[:, 0], state)[:, None])
        else:
            rows.append(model(i, t, state))
    assert len(rows) == ids.shape[1]
    assert_near("logits", torch.cat(rows, dim=1), whole, FLOAT64)
    assert_same_state(state, whole_state, FLOAT64)


@pytest.mark.parametrize(("folder", "kind"), FIXTURES)
@pytest.mark.parametrize(("case", "piece_size"), [("tiles", 1), ("tiles", 5), ("long_text", 64), ("two_images", 1024)])
def test_prefill_pieces_equal_one_pass(folder: str, kind: str, case: str, piece_size: int) -> None:
    model = golden_model(folder, kind, torch.float64)
    tensors = golden_cases(folder)[case]
    ids, tiles = tensors["input_ids"], tensors.get("pixel_values")
    whole, whole_state = one_pass(model, ids, tiles)
    state = model.new_state()
    logits = prefill(model, ModelInputs(ids, tiles), state, piece_size=piece_size)
    assert_near("logits", logits, whole[:, -1], FLOAT64)
    assert_same_state(state, whole_state, FLOAT64)
    assert state.num_image_tokens == (0 if tiles is None else TILE_TOKENS * len(tiles))


@torch.no_grad()
def test_past_the_trained_positions_the_base_moves_with_the_length() -> None:
    """What the text above says of NTK: the pieces of a prompt need its length, and each decoding step uses its own."""
    model = golden_model("pre_ntk", "hovle", torch.float64)
    ids = golden_cases("pre_ntk")["long_text"]["input_ids"]
    whole, _ = one_pass(model, ids, None)
    state = model.new_state()
    ignorant = torch.cat([model(ids[:, :100], None, state), model(ids[:, 100:], None, state)], dim=1)
    assert (ignorant[:, :100] - whole[:, :100]).abs().max() > 1e-3

    # A layer whose inputs do not depend on positions shows the base alone: keys of any age turn by the newest one.
    stack = model.embedding
    layer: Any = stack.layers[0]
    rotary, mixer = stack.rotary, layer.mixer
    x = layer.mixer_norm(stack.text(ids))
    layer_state = model.new_state().embedding.layers[0]
    for t in range(ids.shape[1]):
        step = mixer.mix(x[:, t : t + 1], layer_state, t, stack.rope_tables(x[:, t : t + 1], t))
        if t in (0, 1, 126, 127, 128, 129, 200):
            full = mixer.mix(x[:, : t + 1], None, 0, stack.rope_tables(x[:, : t + 1]))
            assert_near(f"position {t}", step[:, 0], full[:, t], FLOAT64)
    assert rotary.base(128) == rotary.theta
    assert rotary.base(200) == pytest.approx(1e6 * (2 * 200 / 128 - 1) ** (8 / 6))
