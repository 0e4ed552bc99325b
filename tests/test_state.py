"""The decoding state as a value: its size, copies, files, and conversations that do not mix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmmamba.config import ModelConfig
from mmmamba.generate import ModelInputs, decode_one_token, prefill
from mmmamba.model import MMMamba
from mmmamba.state import KV_BLOCK, DecodeState, KVState
from tests.helpers import (
    FIXTURES,
    FOLDERS,
    IMAGE_ID,
    KINDS,
    TILE_TOKENS,
    TOLERANCE,
    assert_near,
    assert_same_state,
    filled_tensors,
    golden_cases,
    golden_config,
    golden_model,
    random_model,
    random_tiles,
    tiny_raw,
)

FLOAT64 = TOLERANCE[torch.float64]
fixtures = pytest.mark.parametrize(("folder", "kind"), FIXTURES)


def inputs(folder: str, case: str = "two_images") -> ModelInputs:
    tensors = golden_cases(folder)[case]
    return ModelInputs(tensors["input_ids"], tensors.get("pixel_values"))


def say(model: MMMamba, logits: Tensor, state: DecodeState, steps: int) -> tuple[list[int], Tensor]:
    """Greedy tokens, every one of them read, and the logits after the last."""
    said = []
    for _ in range(steps):
        token = logits[:, :-12].argmax(dim=-1)
        said.append(int(token[0]))
        logits = decode_one_token(model, token, state)
    return said, logits


def expected_nbytes(raw: dict[str, Any], *, batch: int, capacity: int, itemsize: int) -> int:
    """Counted by hand from `config.json`: per mixer one column of its convolution's inputs and a d x d state a head in
    float32 or wider; per attention a key and a value for every allocated position."""
    total = 0
    for name in ("embedding_config", "llm_config"):
        c = raw[name]
        d = c["hidden_size"] // c["num_attention_heads"]
        kv = c["num_key_value_heads"] * d
        for layer_type in c.get("layers_block_type", ["mha"] * c["num_hidden_layers"]):
            if layer_type == "mamba2":
                total += (2 * kv + c["hidden_size"]) * itemsize + c["num_attention_heads"] * d * d * max(itemsize, 4)
            else:
                total += 2 * kv * capacity * itemsize
    return batch * total


# --- size ---


@fixtures
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_nbytes_of_an_empty_state(folder: str, kind: str, dtype: torch.dtype) -> None:
    raw = golden_config(folder, kind)
    for batch in (1, 3):
        state = DecodeState.allocate(ModelConfig.from_dict(raw), batch=batch, dtype=dtype)
        assert state.batch == batch
        assert state.nbytes == expected_nbytes(raw, batch=batch, capacity=0, itemsize=dtype.itemsize)
        assert (state.seqlen, state.num_text_tokens, state.num_image_tokens) == (0, 0, 0)
        if dtype == torch.bfloat16:
            wide = {name for name, t in state.tensors().items() if t.dtype == torch.float32}
            assert wide == {name for name in state.tensors() if name.endswith("ssm_state")}


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_recurrent_state_does_not_grow(folder: str) -> None:
    model = golden_model(folder, "linear")
    state = model.new_state()
    empty = state.nbytes
    prefill(model, inputs(folder, "long_text"), state)
    assert state.seqlen == 201
    assert state.nbytes == empty
    for _ in range(2):
        prefill(model, inputs(folder), state, piece_size=3)
    assert state.nbytes == empty
    assert (state.seqlen, state.num_image_tokens, state.num_text_tokens) == (261, 24, 237)


@pytest.mark.parametrize("kind", ["hovle", "hybrid"])
@pytest.mark.parametrize("folder", FOLDERS)
def test_caches_grow_in_blocks(folder: str, kind: str) -> None:
    raw = golden_config(folder, kind)
    model = golden_model(folder, kind)
    state = model.new_state()
    ids = golden_cases(folder)["long_text"]["input_ids"]
    for step, (length, blocks) in enumerate([(1, 1), (200, 1), (55, 1), (1, 2), (1, 2)]):
        prefill(model, ModelInputs(ids[:, :length]), state)
        capacity = blocks * KV_BLOCK
        assert state.nbytes == expected_nbytes(raw, batch=1, capacity=capacity, itemsize=4), step
    assert state.seqlen == 258
    assert KV_BLOCK == 256


def test_growing_keeps_what_was_there() -> None:
    """A text that crosses the edge of a block, step by step, against one pass (no NTK in `post`)."""
    model = golden_model("post", "hovle", torch.float64)
    ids = torch.cat([golden_cases("post")["long_text"]["input_ids"]] * 2, dim=1)[:, : KV_BLOCK + 3]
    with torch.no_grad():
        whole = model(ids)
    state = model.new_state()
    logits = [prefill(model, ModelInputs(ids[:, : KV_BLOCK - 1]), state)]
    logits += [decode_one_token(model, ids[:, i], state) for i in range(KV_BLOCK - 1, KV_BLOCK + 3)]
    assert_near("logits", torch.stack(logits, dim=1), whole[:, KV_BLOCK - 2 :], FLOAT64)


def test_a_batch_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="batch=0 must be 1 or more"):
        golden_model("post", "linear").new_state(0)


# --- copies ---


@fixtures
def test_a_clone_goes_its_own_way(folder: str, kind: str) -> None:
    model = golden_model(folder, kind)
    state = model.new_state()
    logits = prefill(model, inputs(folder), state)
    before = {name: t.clone() for name, t in state.tensors().items()}
    counted = state.seqlen, state.num_image_tokens

    branch = state.clone()
    assert_same_state(branch, state)
    assert not {t.data_ptr() for t in branch.tensors().values() if t.numel()} & {
        t.data_ptr() for t in state.tensors().values()
    }
    say(model, logits, branch, 5)
    prefill(model, inputs(folder, "image"), branch)
    assert branch.seqlen == state.seqlen + 5 + 21
    assert (state.seqlen, state.num_image_tokens) == counted
    for name, tensor in state.tensors().items():
        assert torch.equal(tensor, before[name]), f"{name} of the original moved with the clone"

    # ... and the other way round: the original goes on, a clone of before stays.
    kept = state.clone()
    frozen = kept.clone()
    say(model, logits, state, 5)
    assert_same_state(kept, frozen)


@torch.no_grad()
def test_a_clone_taken_inside_a_tile_carries_the_rest_of_it() -> None:
    model = golden_model("post", "linear", torch.float64)
    tensors = golden_cases("post")["image"]
    ids, tiles = tensors["input_ids"], tensors["pixel_values"]
    inside = int((ids[0] == IMAGE_ID).nonzero()[1])
    state = model.new_state()
    model(ids[:, :inside], tiles, state)
    branch = state.clone()
    assert branch.pending.shape[1] == TILE_TOKENS - 1
    assert branch.pending.data_ptr() != state.pending.data_ptr()
    first = model(ids[:, inside:], None, state)
    second = model(ids[:, inside:], None, branch)
    assert torch.equal(first, second)
    assert_near("logits", first, model(ids, tiles)[:, inside:], FLOAT64)


@fixtures
def test_two_interleaved_conversations_equal_two_separate_ones(folder: str, kind: str) -> None:
    model = golden_model(folder, kind)
    prompts = inputs(folder, "image"), inputs(folder, "text")
    separate = []
    for prompt in prompts:
        state = model.new_state()
        separate.append((say(model, prefill(model, prompt, state), state, 8), state))
    states = [model.new_state() for _ in prompts]
    logits = [prefill(model, prompt, state) for prompt, state in zip(prompts, states, strict=True)]
    said: list[list[int]] = [[], []]
    for _ in range(8):
        for i, state in enumerate(states):
            tokens, logits[i] = say(model, logits[i], state, 1)
            said[i] += tokens
    for i, ((alone, last), state) in enumerate(separate):
        assert said[i] == alone
        assert torch.equal(logits[i], last)
        assert_same_state(states[i], state)


@fixtures
def test_batch_rows_equal_single_runs(folder: str, kind: str) -> None:
    model = golden_model(folder, kind, torch.float64)
    first = inputs(folder, "tiles")
    assert first.pixel_values is not None
    rows = [first, ModelInputs(first.input_ids.roll(1, dims=1), random_tiles(3))]
    singles, single_logits = [], []
    for row in rows:
        state = model.new_state()
        prefill(model, row, state)
        single_logits.append(decode_one_token(model, row.input_ids[:, 0], state))
        singles.append(state)
    both = ModelInputs(
        torch.cat([row.input_ids for row in rows]),
        torch.cat([row.pixel_values for row in rows if row.pixel_values is not None]),
    )
    state = model.new_state(batch=2)
    prefill(model, both, state)
    logits = decode_one_token(model, both.input_ids[:, 0], state)
    assert_near("logits", logits, torch.cat(single_logits), FLOAT64)
    for name, tensor in filled_tensors(state).items():
        together = torch.cat([filled_tensors(single)[name] for single in singles])
        assert_near(name, tensor, together, FLOAT64)


def test_a_state_works_in_and_out_of_inference_mode() -> None:
    """`prefill` and `decode_one_token` run in inference mode, `model(...)` in the caller's; the state serves both."""
    for folder, kind in FIXTURES:
        model = golden_model(folder, kind)
        ids = golden_cases(folder)["text"]["input_ids"]
        state, want = model.new_state(), model.new_state()
        prefill(model, ModelInputs(ids[:, :8]), state)
        with torch.no_grad():
            model(ids[:, 8:9], None, state)
            model(ids[:, 9:12], None, state)
            model(ids[:, :12], None, want)
        assert_same_state(state, want, 1e-5)


# --- files ---


@fixtures
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_and_loaded(folder: str, kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = golden_model(folder, kind, dtype)
    state = model.new_state()
    logits = prefill(model, inputs(folder), state)
    state.save(tmp_path / "state.safetensors")
    loaded = DecodeState.load(tmp_path / "state.safetensors", model.config)
    assert_same_state(loaded, state)
    assert say(model, logits, loaded, 8)[0] == say(model, logits, state, 8)[0]
    assert_same_state(loaded, state)
    # Only what is filled is written, so the file of a teacher is not a block larger than it need be.
    with safe_open(tmp_path / "state.safetensors", "pt") as f:
        stored = {name: f.get_slice(name).get_shape() for name in f.keys()}  # noqa: SIM118 (not a dict)
    lengths = {name: shape[2] for name, shape in stored.items() if name.endswith("_cache")}
    stack = {"embedding": golden_cases(folder)["two_images"]["hd_input_ids"].shape[1], "language": 30}
    assert lengths == {name: stack[name.partition(".")[0]] for name in lengths}


@torch.no_grad()
def test_saved_inside_a_tile(tmp_path: Path) -> None:
    model = golden_model("post", "hybrid")
    tensors = golden_cases("post")["image"]
    inside = int((tensors["input_ids"][0] == IMAGE_ID).nonzero()[1])
    state = model.new_state()
    model(tensors["input_ids"][:, :inside], tensors["pixel_values"], state)
    state.save(tmp_path / "state")
    loaded = DecodeState.load(tmp_path / "state", model.config)
    assert torch.equal(
        model(tensors["input_ids"][:, inside:], None, loaded), model(tensors["input_ids"][:, inside:], None, state)
    )


def test_an_empty_state_can_be_saved(tmp_path: Path) -> None:
    for folder, kind in FIXTURES:
        model = golden_model(folder, kind)
        model.new_state().save(tmp_path / "state")
        assert_same_state(DecodeState.load(tmp_path / "state", model.config), model.new_state())


def test_the_state_of_another_model_is_refused(tmp_path: Path) -> None:
    model = golden_model("post", "linear")
    state = model.new_state()
    path = tmp_path / "state"
    state.save(path)
    mine = model.config.fingerprint()
    for folder, kind in FIXTURES[2:]:
        other = golden_model(folder, kind)
        theirs = other.config.fingerprint()
        with pytest.raises(ValueError, match=f"state of another model .fingerprint {mine}, this .* model has {theirs}"):
            DecodeState.load(path, other.config)
        with pytest.raises(ValueError, match=f"belongs to another model .fingerprint {mine}.*model.new_state"):
            other(torch.tensor([[1, 2]]), None, state)
    assert state.seqlen == 0


def test_rows_must_fit_the_state() -> None:
    model = golden_model("post", "linear")
    with pytest.raises(ValueError, match="the state holds 2 rows, input_ids 1; they must be equal"):
        model(torch.tensor([[1, 2]]), None, model.new_state(batch=2))


@pytest.mark.parametrize("content", ["weights", "garbage", "empty", "cut"])
def test_what_is_no_state_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    model = golden_model("post", "linear")
    if content == "weights":
        save_file({"a": torch.zeros(2)}, path)
    elif content == "cut":
        model.new_state().save(path)
        path.write_bytes(path.read_bytes()[:-9])
    else:
        path.write_bytes(b"" if content == "empty" else json.dumps({"seqlen": 3}).encode() * 9)
    with pytest.raises(ValueError, match=r"file is not a decoding state; use a file written by DecodeState.save"):
        DecodeState.load(path, model.config)


@pytest.mark.parametrize("kind", KINDS)
def test_fork_and_share_keep_every_branch_apart(kind: str) -> None:
    """Two forks of one snapshot go on differently; each equals a fresh pass, and the snapshot stays as it was."""
    model = golden_model("post", kind)
    start, left, right = ([5, 6, 7, 8], [9, 10, 11], [20, 21])
    snapshot = model.new_state()
    prefill(model, ModelInputs(torch.tensor([start])), snapshot)
    before = snapshot.fork().clone().tensors()
    for more in (left, right):
        branch = snapshot.fork()
        logits = prefill(model, ModelInputs(torch.tensor([more])), branch)
        fresh = model.new_state()
        expected = prefill(model, ModelInputs(torch.tensor([start + more])), fresh)
        assert_near(f"logits after {more}", logits, expected, 1e-4)
        snapshot.share_(branch)
        again = snapshot.fork().tensors()
        assert all(torch.equal(t, again[name]) for name, t in before.items())
    held = snapshot.storages()
    both = held | branch.storages()
    caches = sum(t.untyped_storage().nbytes() for name, t in branch.tensors().items() if "cache" in name)
    assert sum(both.values()) == sum(held.values()) + sum(branch.storages().values()) - caches, "caches were not shared"


def test_share_with_a_shorter_state_is_refused() -> None:
    model = golden_model("post", "hovle")
    long, short = model.new_state(), model.new_state()
    prefill(model, ModelInputs(torch.tensor([[5, 6, 7]])), long)
    with pytest.raises(ValueError, match="did not go on"):
        long.share_(short)


def test_room_for_a_prompt_is_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read in pieces, a long prompt moves each cache once, and ends in memory of the size that it ends in anyhow."""
    model = random_model(tiny_raw(teacher=True), dtype=torch.float32)
    ids = torch.randint(0, 40, (1, KV_BLOCK + 20), generator=torch.Generator().manual_seed(0))
    whole, pieces = model.new_state(), model.new_state()
    prefill(model, ModelInputs(ids), whole, piece_size=1024)
    moves = []
    move = KVState.move_
    monkeypatch.setattr(KVState, "move_", lambda self, *args: (moves.append(args), move(self, *args)))
    prefill(model, ModelInputs(ids), pieces, piece_size=100)
    assert moves == [(0, KV_BLOCK + 20)] * 5, "one a layer"
    assert pieces.nbytes == whole.nbytes
    assert_same_state(pieces, whole, 1e-5)
