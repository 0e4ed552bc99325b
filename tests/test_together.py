"""Prompts of different lengths read in one pass: each row is what it is alone, whatever stands beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmmamba.batch import take_rows
from mmmamba.generate import ModelInputs, decode_one_token, prefill
from mmmamba.model import MMMamba
from mmmamba.state import DecodeState
from mmmamba.together import joined, prefill_together
from quantize import quantize_
from tests.helpers import (
    TOLERANCE,
    assert_near,
    filled_tensors,
    random_ids,
    random_model,
    random_tiles,
    tiny_raw,
)
from tests.test_decoder_cpu import linear_raw

LINEAR = {"embedding": {"layers_block_type": ["mamba2"] * 3}, "language": {"layers_block_type": ["mamba2"] * 2}}
TILE = 4  # image tokens of a tile of 56 px
# Runs of text (positive) and image tokens: one token, around a chunk of 64, tiles at the beginning, in the middle, at
# the end, several of them.
ROWS = [[1], [63], [64], [65], [140], [3, -TILE, 9], [-TILE], [2, -TILE, 5, -2 * TILE], [-3 * TILE, 70], [7]]


def prompts_of(raw: dict[str, Any], rows: list[list[int]], *, seed: int = 0) -> list[ModelInputs]:
    found = []
    for i, row in enumerate(rows):
        tiles = -sum(run for run in row if run < 0) // TILE
        pixels = random_tiles(tiles, seed=seed + i) if tiles else None
        found.append(ModelInputs(random_ids(raw, row, seed=seed + i), pixels))
    return found


def alone(model: MMMamba, inputs: ModelInputs) -> tuple[Tensor, DecodeState]:
    state = model.new_state()
    return prefill(model, inputs, state), state


@torch.inference_mode()
def check_rows(model: MMMamba, prompts: list[ModelInputs], tolerance: float) -> None:
    """Logits and states after reading, and those of three tokens more."""
    logits, state = prefill_together(model, prompts)
    singles = [alone(model, inputs) for inputs in prompts]
    assert state.batch == len(prompts)
    assert state.seqlen == max(single.seqlen for _, single in singles)
    assert state.embedding.seqlen == max(single.embedding.seqlen for _, single in singles)
    assert state.num_image_tokens == max(single.num_image_tokens for _, single in singles)
    for step in range(4):
        for i, (wanted, single) in enumerate(singles):
            assert_near(f"logits of row {i}, {step} tokens on", logits[i : i + 1], wanted, tolerance)
            row = filled_tensors(take_rows(state, [i]))
            for name, tensor in filled_tensors(single).items():
                assert_near(f"{name} of row {i}, {step} tokens on", row[name], tensor, tolerance)
        token = torch.tensor([1 + (5 * step + i) % 40 for i in range(len(prompts))])
        logits = decode_one_token(model, token, state)
        for i, (_, single) in enumerate(singles):
            singles[i] = decode_one_token(model, token[i : i + 1], single), single


@pytest.mark.parametrize("shuffle", ["pre", "post"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_rows_are_as_if_read_alone(shuffle: str, dtype: torch.dtype) -> None:
    raw = tiny_raw(**LINEAR)
    raw["embedding_config"]["pixel_shuffle_loc"] = shuffle
    check_rows(random_model(raw, dtype=dtype), prompts_of(raw, ROWS), 30 * TOLERANCE[dtype])


def test_normalized_and_quantized() -> None:
    raw = linear_raw(normalize_encoder_output=True)
    check_rows(random_model(raw), prompts_of(raw, ROWS), 30 * TOLERANCE[torch.float64])
    model = random_model(linear_raw(), dtype=torch.float32)
    quantize_(model, "int8")
    prompts = prompts_of(linear_raw(), ROWS[:6])
    logits, _ = prefill_together(model, prompts)
    for i, inputs in enumerate(prompts):
        # One row and many take different products, rounded differently: see quantize.linear.
        assert_near(f"row {i}", logits[i : i + 1], alone(model, inputs)[0], 5e-2)


def test_an_image_token_that_is_the_first_of_the_vocabulary() -> None:
    """What is filled in must not be taken for a picture."""
    raw = tiny_raw(**LINEAR)
    raw["embedding_config"]["img_context_token_id"] = 0
    prompts = []
    for i, row in enumerate([[5], [2, -TILE, 4], [-TILE, 30]]):
        ids = torch.cat([torch.full((abs(run),), 0 if run < 0 else 7 + i) for run in row])
        prompts.append(ModelInputs(ids[None], random_tiles(1, seed=i) if -TILE in row else None))
    check_rows(random_model(raw), prompts, 30 * TOLERANCE[torch.float64])


def test_neighbours_change_nothing() -> None:
    """Rows of the same lengths beside it, with other tokens and pictures."""
    raw = tiny_raw(**LINEAR)
    model = random_model(raw)
    mine, others, yet_others = (prompts_of(raw, ROWS, seed=seed) for seed in (0, 100, 200))
    for i in (0, 4, 7):
        found = []
        for neighbours in (others, yet_others):
            logits, state = prefill_together(model, [*neighbours[:i], mine[i], *neighbours[i + 1 :]])
            found.append((logits[i], filled_tensors(take_rows(state, [i]))))
        (logits, tensors), (logits_2, tensors_2) = found
        assert_near("logits", logits, logits_2, 1e-13)
        for name, tensor in tensors.items():
            assert_near(name, tensor, tensors_2[name], 1e-13)


class TorchOps:
    """The functions of `kernels.pointwise`, in torch."""

    rms_norm = staticmethod(lambda x, weight, eps: F.rms_norm(x, weight.shape, weight, eps))
    swiglu = staticmethod(lambda a, b: F.silu(a) * b)

    @staticmethod
    def mix_inputs(
        u: Tensor, conv_state: Tensor, taps: Tensor, bias: Tensor, dt_bias: Tensor, hidden: int, lengths: Any
    ) -> Any:
        conv, heads = len(bias), len(dt_bias)
        padded = torch.cat([conv_state.mT, u[..., :conv]], dim=1)
        mixed = padded[:, :-1] * taps[:, 0] + padded[:, 1:] * taps[:, 1] + bias
        dt = F.softplus(u[..., -heads:] + dt_bias)
        for row, length in enumerate([u.shape[1]] * len(u) if lengths is None else lengths.tolist()):
            conv_state[row, :, 0] = u[row, length - 1, :conv]
            dt[row, length:] = 0
        return F.silu(mixed), dt

    @staticmethod
    def gated_norm(y: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
        return F.rms_norm(y, weight.shape, weight, eps).flatten(2) * F.silu(gate)


def test_with_fused_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU."""
    raw = tiny_raw(**LINEAR)
    prompts = prompts_of(raw, ROWS)
    model = random_model(raw)
    wanted, state = prefill_together(model, prompts)
    monkeypatch.setattr("mmmamba.mixer.fused_ops", lambda x: TorchOps)
    logits, fused = prefill_together(model, prompts)
    # `_mix_fused` takes decays in float32.
    assert_near("logits", logits, wanted, 1e-4)
    for name, tensor in filled_tensors(fused).items():
        assert_near(name, tensor, filled_tensors(state)[name], 1e-4)


@pytest.mark.parametrize("teacher", [True, False])
def test_caches_take_rows_of_one_length(teacher: bool) -> None:
    raw = tiny_raw(teacher=teacher)
    model = random_model(raw)
    check_rows(model, prompts_of(raw, [[3, -TILE, 9], [5, -TILE, 7], [-TILE, 12]]), 30 * TOLERANCE[torch.float64])
    for rows in ([[5], [6]], [[8, -TILE], [4, -2 * TILE]]):
        with pytest.raises(ValueError, match="attention layers; read those of one length together"):
            prefill_together(model, prompts_of(raw, rows))


def test_bad_prompts_are_refused() -> None:
    raw = tiny_raw(**LINEAR)
    model = random_model(raw)
    good = prompts_of(raw, [[5], [3, -TILE]])
    with pytest.raises(ValueError, match="no prompt"):
        prefill_together(model, [])
    for shape in ((2, 3), (1, 0), (4,)):
        with pytest.raises(ValueError, match="use \\(1, seqlen\\)"):
            prefill_together(model, [*good, ModelInputs(torch.ones(shape, dtype=torch.int64))])
    with pytest.raises(ValueError, match="pixel_values is None"):
        prefill_together(model, [*good, ModelInputs(good[1].input_ids)])
    with pytest.raises(ValueError, match="which is 1 tiles"):  # though the sum would be right
        prefill_together(model, [ModelInputs(good[1].input_ids, random_tiles(2)), good[0]])


def test_who_is_read_together() -> None:
    assert joined([], 100) == []
    assert joined([500], 100) == [0]
    assert joined([10, 12, 21, 9, 20], 1000) == [0, 1, 3], "none is filled up to more than twice its length"
    assert joined([10, 10, 10, 10], 30) == [0, 1, 2]
    assert joined([10, 20, 10], 40) == [0, 1], "a longer one fills the others up, too"
