"""The network against a plain numpy one, also where the fixtures have a feature off; its layers; its errors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor

from mmmamba.checkpoint import save_model
from mmmamba.config import ModelConfig
from mmmamba.layers import RMSNorm, Rotary, pixel_shuffle, rotate
from mmmamba.model import MMMamba, token_layout
from tests import oracle
from tests.helpers import (
    FIXTURES,
    IMAGE_ID,
    TOLERANCE,
    assert_near,
    assert_same_state,
    golden_cases,
    golden_model,
    pieces,
    random_ids,
    random_model,
    random_tiles,
    tiny_raw,
)

FLOAT64 = TOLERANCE[torch.float64]
# What `tiny_raw` changes for each feature; everything is tried in both layouts.
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "teacher": {"teacher": True},
    "normalized": {"normalize_encoder_output": True},
    "special tokens": {
        "embedding": {"special_token_maps": {"<a>": 48, "<b>": 49, "<c>": 50}},
        "language": {"vocab_size": 51},
    },
    "linear rope": {"embedding": {"rope_scaling": {"type": "linear", "factor": 2.5}}},
    "linear rope in both": {
        "embedding": {"rope_scaling": {"type": "linear", "factor": 4.0}},
        "language": {"rope_scaling": {"type": "linear", "factor": 1.5}},
    },
    "dynamic rope": {
        "teacher": True,
        "embedding": {"rope_scaling": {"type": "dynamic", "factor": 3.0}, "max_position_embeddings": 20},
        "language": {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 9},
    },
    "one kv head": {"embedding": {"num_key_value_heads": 1}, "language": {"num_key_value_heads": 1}},
    "as many kv heads": {"embedding": {"num_key_value_heads": 4}, "language": {"num_key_value_heads": 4}},
    "three heads a kv head": {
        "embedding": {"num_attention_heads": 6, "num_key_value_heads": 2},
        "language": {"num_attention_heads": 6, "num_key_value_heads": 2},
    },
    "stacks of other shapes": {
        "embedding": {"num_attention_heads": 3, "num_key_value_heads": 3, "intermediate_size": 20},
        "language": {"num_attention_heads": 6, "num_key_value_heads": 1, "rms_norm_eps": 1e-2, "rope_theta": 500.0},
    },
    "tied": {"language": {"tie_word_embeddings": True}},
    "tied teacher": {"teacher": True, "language": {"tie_word_embeddings": True}},
    "wider tiles": {"embedding": {"image_size": 112}, "force_image_size": 112},
}


def stored(model: MMMamba, path: Path) -> dict[str, np.ndarray]:
    """The model's tensors under their published names."""
    save_model(model, path)
    return load_file(path / "model.safetensors")


def check_against_oracle(raw: dict[str, Any], ids: Tensor, tiles: Tensor | None, path: Path) -> None:
    model = random_model(raw)
    wanted = oracle.logits(stored(model, path), raw, ids[0].tolist(), None if tiles is None else tiles.numpy())
    with torch.no_grad():
        logits = model(ids, tiles)
    assert_near("logits", logits[0], torch.from_numpy(wanted), FLOAT64)


@pytest.mark.parametrize("layout", ["pre", "post"])
@pytest.mark.parametrize("feature", FEATURES)
def test_features_that_the_fixtures_leave_off(feature: str, layout: str, tmp_path: Path) -> None:
    changes = FEATURES[feature]
    raw = tiny_raw(**changes | {"embedding": {"pixel_shuffle_loc": layout} | changes.get("embedding", {})})
    side = raw["embedding_config"]["image_size"]
    ids = random_ids(raw, [3, -2 * (side // 28) ** 2, 5, -((side // 28) ** 2), 4])
    if feature == "special tokens":
        ids[0, [0, 2, -1]] = torch.tensor([50, 48, 49])
    check_against_oracle(raw, ids, random_tiles(3, side), tmp_path)
    if feature == "dynamic rope":
        short = random_ids(raw, [6])
        check_against_oracle(raw, short, None, tmp_path)  # within the trained positions


@pytest.mark.parametrize("layout", ["pre", "post"])
@pytest.mark.parametrize("side", [28, 84, 112, 140])
def test_tiles_of_another_size_get_a_bicubic_grid_of_positions(side: int, layout: str, tmp_path: Path) -> None:
    raw = tiny_raw(embedding={"pixel_shuffle_loc": layout})  # trained at 56
    ids = random_ids(raw, [2, -2 * (side // 28) ** 2, 3])
    check_against_oracle(raw, ids, random_tiles(2, side), tmp_path)


@torch.no_grad()
def test_a_feature_that_were_ignored_would_show() -> None:
    """Every switch above moves the logits by far more than the tolerance, so the comparisons mean something."""
    plain = tiny_raw()
    ids, tiles = random_ids(plain, [3, -4, 5]), random_tiles(1)
    reference = random_model(plain)(ids, tiles)
    for changes in (
        {"normalize_encoder_output": True},
        {"embedding": {"rope_scaling": {"type": "linear", "factor": 2.5}}},
        {"embedding": {"rope_scaling": {"type": "dynamic", "factor": 3.0}, "max_position_embeddings": 8}},
        {"embedding": {"rms_norm_eps": 1e-2}},
        {"embedding": {"rope_theta": 500.0}},
    ):
        raw = tiny_raw(**changes)
        logits = random_model(raw)(ids, tiles)
        assert (logits - reference).abs().max() > 1e-3, changes


@torch.no_grad()
def test_a_batch_equals_its_rows() -> None:
    for folder in ("post", "pre_ntk"):
        for kind in ("hovle", "linear", "hybrid"):
            model = golden_model(folder, kind, torch.float64)
            first = golden_cases(folder)["tiles"]
            # Other text and the images at other places; as many image tokens.
            other = first["input_ids"].roll(3, dims=1)
            tiles = torch.cat([first["pixel_values"], random_tiles(3)])
            both = model(torch.cat([first["input_ids"], other]), tiles)
            assert_near("row 0", both[:1], model(first["input_ids"], tiles[:3]), FLOAT64)
            assert_near("row 1", both[1:], model(other, tiles[3:]), FLOAT64)


@torch.no_grad()
def test_the_future_does_not_leak() -> None:
    for folder in ("post", "pre_ntk"):
        model = golden_model(folder, "hybrid", torch.float64)
        tensors = golden_cases(folder)["two_images"]
        ids, tiles = tensors["input_ids"], tensors["pixel_values"]
        changed = ids.clone()
        changed[0, -1] = (changed[0, -1] + 1) % 100
        assert torch.equal(model(ids, tiles)[:, :-1], model(changed, tiles)[:, :-1])
        assert not torch.equal(model(ids, tiles)[:, -1], model(changed, tiles)[:, -1])


def test_last_only_and_hidden_states() -> None:
    model = golden_model("post", "linear", torch.float64)
    tensors = golden_cases("post")["image"]
    logits = model(tensors["input_ids"], tensors["pixel_values"])
    assert logits.shape == (1, 21, 160)
    last = model(tensors["input_ids"], tensors["pixel_values"], last_only=True)
    assert_near("last position", last, logits[:, -1:], FLOAT64)
    hidden = model.hidden_states(tensors["input_ids"], tensors["pixel_values"])
    assert_near("head", model.language.output(hidden), logits, FLOAT64)


def test_bfloat16_follows_float64() -> None:
    """Norms, decays and sums stay wide: what is left is the rounding of weights and activations."""
    for folder, kind in FIXTURES:
        exact, narrow = golden_model(folder, kind, torch.float64), golden_model(folder, kind, torch.bfloat16)
        tensors = golden_cases(folder)["two_images"]
        state = narrow.new_state()
        logits = narrow(tensors["input_ids"], tensors["pixel_values"], state)
        assert logits.dtype == torch.bfloat16
        wanted = exact(tensors["input_ids"], tensors["pixel_values"])
        assert_near(f"{folder}/{kind}", logits, wanted, 0.06)
        wide = {name.rpartition(".")[2] for name, t in state.tensors().items() if t.dtype == torch.float32}
        assert wide == (set() if kind == "hovle" else {"ssm_state"})
        wide = {name.rpartition(".")[2] for name, p in narrow.named_parameters() if p.dtype == torch.float32}
        assert wide == (set() if kind == "hovle" else {"A_log", "dt_bias"})


# --- layers ---


def test_rms_norm_is_done_in_float32() -> None:
    norm = RMSNorm(64, 1e-5)
    weight = torch.linspace(-1, 2, 64)
    norm.weight.data = weight
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 300
    wanted = oracle.rms_norm(x.numpy(), weight.double().numpy(), 1e-5)
    assert_near("float32", norm(x.float()), torch.from_numpy(wanted), 1e-6)
    norm.weight.data = weight.bfloat16()
    narrow = norm(x.bfloat16())
    assert narrow.dtype == torch.bfloat16
    # Squares of 300 are far above what bf16 adds up with 3 digits; in float32 only the rounding of x and y is left.
    assert_near("bfloat16", narrow, torch.from_numpy(wanted), 6e-3)
    # In training weights are float32 and activations bf16: nothing is rounded on the way out.
    norm.weight.data = weight
    wanted = oracle.rms_norm(x.bfloat16().double().numpy(), weight.double().numpy(), 1e-5)
    assert_near("mixed", norm(x.bfloat16()), torch.from_numpy(wanted), 1e-6)


def test_pixel_shuffle_order() -> None:
    x = torch.arange(2 * 16 * 3).view(2, 16, 3)
    y = pixel_shuffle(x)
    assert y.shape == (2, 4, 12)
    for tile in range(2):
        for q in range(2):
            for p in range(2):
                inputs = [8 * q + 2 * p, 8 * q + 2 * p + 1, 8 * q + 4 + 2 * p, 8 * q + 5 + 2 * p]
                assert torch.equal(y[tile, 2 * q + p], torch.cat([x[tile, i] for i in inputs]))


def test_rotary_turns_by_relative_positions() -> None:
    config = ModelConfig.from_dict(tiny_raw()).embedding
    rotary = Rotary(config)
    tables = rotary.tables(0, 50, total_seqlen=50, device=torch.device("cpu"), dtype=torch.float64)
    later = rotary.tables(7, 4, total_seqlen=11, device=torch.device("cpu"), dtype=torch.float64)
    assert_near("offset", later.q_cos, tables.q_cos[7:11], FLOAT64)
    assert_near("offset", later.k_sin, tables.k_sin[7:11], FLOAT64)
    q, k = torch.randn(2, 1, config.head_dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def score(i: int, j: int) -> Tensor:
        a = rotate(q, tables.q_cos[i : i + 1], tables.q_sin[i : i + 1])
        b = rotate(k, tables.k_cos[j : j + 1], tables.k_sin[j : j + 1])
        return (a * b).sum()

    assert_near("score", score(40, 33), score(12, 5), FLOAT64)
    assert abs(score(40, 33) - score(40, 32)) > 1e-4


def test_rotary_tables_of_narrow_models_are_computed_wide() -> None:
    """bf16 counts exactly up to 256 only; a position of 5,001 would be 5,008."""
    rotary = Rotary(ModelConfig.from_dict(tiny_raw()).embedding)
    options: dict[str, Any] = {"total_seqlen": 5002, "device": torch.device("cpu")}
    exact = rotary.tables(5001, 1, dtype=torch.float64, **options)
    narrow = rotary.tables(5001, 1, dtype=torch.bfloat16, **options)
    assert narrow.q_cos.dtype == torch.bfloat16
    assert (narrow.q_cos.double() - exact.q_cos).abs().max() < 2**-8
    assert (narrow.k_sin.double() - exact.k_sin).abs().max() < 2**-8


def test_dynamic_base() -> None:
    raw = tiny_raw(embedding={"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 100})
    rotary = Rotary(ModelConfig.from_dict(raw).embedding)
    assert rotary.keys_unrotated
    assert rotary.base(1) == rotary.base(99) == rotary.base(100) == 10000.0
    assert rotary.base(250) == pytest.approx(10000 * (2 * 250 / 100 - 1) ** (6 / 4))
    linear = tiny_raw(embedding={"rope_scaling": {"type": "linear", "factor": 2.0}, "max_position_embeddings": 100})
    rotary = Rotary(ModelConfig.from_dict(linear).embedding)
    assert not rotary.keys_unrotated
    assert rotary.base(250) == 10000.0
    tables = rotary.tables(3, 1, total_seqlen=4, device=torch.device("cpu"), dtype=torch.float64)
    assert float(tables.q_cos[0, 0]) == pytest.approx(math.cos(1.5))


def test_token_layout() -> None:
    ids = torch.tensor([[7, 9, 9, 8], [9, 7, 8, 9]])
    layout = token_layout(ids, 9, 3)
    assert layout.stack_ids.tolist() == [[7, 9, 9, 9, 9, 9, 9, 8], [9, 9, 9, 7, 8, 9, 9, 9]]
    assert layout.stack_image.tolist() == [1, 2, 3, 4, 5, 6, 8, 9, 10, 13, 14, 15]
    assert layout.first.tolist() == [0, 1, 4, 7, 8, 11, 12, 13]
    assert layout.image.tolist() == [1, 2, 4, 7]
    with pytest.raises(ValueError, match=r"different numbers of image tokens \(\[2, 1\]\); run them one at a time"):
        token_layout(torch.tensor([[9, 9, 1], [9, 1, 1]]), 9, 4)


# --- errors ---

TEXT = torch.arange(5)[None]


def image_ids(num_image_tokens: int, after: int = 2) -> Tensor:
    return torch.tensor([[1, 2, *[IMAGE_ID] * num_image_tokens, *range(3, 3 + after)]])


@pytest.mark.parametrize(
    ("ids", "tiles", "message"),
    [
        (image_ids(4), None, "hold 4 image tokens, but pixel_values is None; pass the tiles"),
        (image_ids(4), random_tiles(0), "hold 4 image tokens, but pixel_values is None; pass the tiles"),
        (image_ids(4), random_tiles(2), r"1 x 4 image tokens, which is 1 tiles of 4; pixel_values holds 2"),
        (image_ids(8), random_tiles(1), r"1 x 8 image tokens, which is 2 tiles of 4; pixel_values holds 1"),
        (image_ids(3), random_tiles(1), "3 image tokens a row, not a multiple of 4 a tile"),
        (TEXT, random_tiles(1), "1 x 0 image tokens, which is 0 tiles of 4; pixel_values holds 1"),
        (image_ids(4), torch.zeros(1, 3, 56, 28), r"shape \(1, 3, 56, 28\); use \(num_tiles, 3, side, side\)"),
        (image_ids(4), torch.zeros(1, 3, 42, 42), r"\(1, 3, 42, 42\).* a multiple of 28"),
        (image_ids(4), torch.zeros(3, 56, 56), r"pixel_values has shape \(3, 56, 56\)"),
        (image_ids(4), torch.zeros(1, 1, 56, 56), r"pixel_values has shape \(1, 1, 56, 56\)"),
        (TEXT[0], None, r"input_ids has shape \(5,\); use \(batch, seqlen\)"),
        (TEXT[:, :0], None, "with at least one token"),
        (torch.cat([image_ids(4), image_ids(3, 3)]), random_tiles(2), "different numbers of image tokens"),
        (torch.cat([TEXT.expand(1, 5), TEXT.where(TEXT != 3, IMAGE_ID)]), random_tiles(1), "different numbers"),
    ],
)
def test_inputs_that_do_not_fit(ids: Tensor, tiles: Tensor | None, message: str) -> None:
    for folder in ("post", "pre_ntk"):
        with pytest.raises(ValueError, match=message):
            golden_model(folder, "linear")(ids, tiles)


@torch.no_grad()
def test_a_refused_call_leaves_the_state_as_it_was() -> None:
    for folder in ("post", "pre_ntk"):
        for kind in ("linear", "hybrid"):
            model = golden_model(folder, kind)
            state = model.new_state()
            model(TEXT, None, state)
            before = state.clone()
            for ids, tiles in ((image_ids(4), None), (image_ids(8), random_tiles(1)), (image_ids(3), random_tiles(1))):
                with pytest.raises(ValueError, match="image tokens"):
                    model(ids, tiles, state)
            assert_same_state(state, before)


@torch.no_grad()
def test_a_tile_that_is_only_begun_must_be_ended_first() -> None:
    model = golden_model("post", "linear")
    state = model.new_state()
    model(image_ids(3, after=0), random_tiles(1), state)  # ends one token before the end of the tile
    assert (state.pending.shape[1], state.num_image_tokens) == (1, 3)
    before = state.clone()
    with pytest.raises(ValueError, match="1 image tokens of a tile are still to come, but the next input holds other"):
        model(TEXT, None, state)
    with pytest.raises(ValueError, match="1 tiles were passed for image tokens that have their embeddings already"):
        model(torch.tensor([[IMAGE_ID]]), random_tiles(1), state)
    assert_same_state(state, before)
    model(torch.tensor([[IMAGE_ID]]), None, state)
    assert (state.pending.shape[1], state.num_image_tokens) == (0, 4)


@torch.no_grad()
def test_features_hold_in_pieces_too() -> None:
    """Cuts inside tiles with every feature on; the fixtures' splits are in test_conformance.py."""
    for feature, changes in FEATURES.items():
        raw = tiny_raw(**changes)
        if raw["embedding_config"]["image_size"] != 56:
            continue
        model = random_model(raw)
        ids, tiles = random_ids(raw, [3, -8, 5, -4, 4]), random_tiles(3)
        whole_state, state = model.new_state(), model.new_state()
        whole = model(ids, tiles, whole_state)
        totals = whole_state.embedding.seqlen, whole_state.language.seqlen
        parts = [model(i, t, state, total_seqlens=totals) for i, t in pieces(ids, tiles, [1, 4, 9, 10, 18, 22], 44)]
        assert_near(feature, torch.cat(parts, dim=1), whole, FLOAT64)
        assert_same_state(state, whole_state, FLOAT64)
