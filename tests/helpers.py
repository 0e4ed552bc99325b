"""Golden fixtures, tiny random models, comparisons that name what differs, and fakes for streaming."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mmmamba.checkpoint import load_model
from mmmamba.config import ModelConfig
from mmmamba.model import MMMamba
from mmmamba.state import DecodeState
from mmmamba.tokenizer import Tokenizer

GOLDEN = Path(__file__).parent / "golden"
FOLDERS = ("post", "pre_ntk")
KINDS = ("hovle", "linear", "hybrid")
FIXTURES = tuple((folder, kind) for folder in FOLDERS for kind in KINDS)
IMAGE_ID = 153  # `img_context_token_id` of the golden fixtures
TILE_TOKENS = 4  # tokens of the language model for one 56 px tile
# RMS error over RMS of the reference that two right computations may differ by.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}


# --- golden fixtures ---


@cache
def golden_model(folder: str, kind: str, dtype: torch.dtype = torch.float32) -> MMMamba:
    """Shared by all tests, so never to be changed."""
    return load_model(GOLDEN / folder / kind, dtype=dtype)


@cache
def golden_cases(folder: str) -> dict[str, dict[str, Tensor]]:
    """case -> `input_ids`, `hd_input_ids`, `KIND.logits` and, with images, `pixel_values`."""
    cases: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(GOLDEN / folder / "cases.safetensors").items():
        case, _, key = name.partition(".")
        cases.setdefault(case, {})[key] = tensor
    return cases


@cache
def golden_expected(folder: str) -> dict[str, dict[str, Any]]:
    return json.loads((GOLDEN / folder / "expected.json").read_text())


def golden_config(folder: str, kind: str) -> dict[str, Any]:
    """A fresh copy of the fixture's `config.json`."""
    return json.loads((GOLDEN / folder / kind / "config.json").read_text())


# --- comparisons ---


def relative_error(actual: Tensor, reference: Tensor) -> float:
    """RMS error over RMS of the reference; NaN anywhere gives NaN, which no tolerance admits."""
    wide, wide_reference = actual.detach().double(), reference.detach().double()
    scale = wide_reference.square().mean().sqrt().clamp(min=1e-30)
    return float((wide - wide_reference).square().mean().sqrt() / scale)


def assert_near(name: str, actual: Tensor, reference: Tensor, tolerance: float) -> None:
    """Fails with the tensor, the place of the largest difference and both values."""
    assert actual.shape == reference.shape, f"{name}: shape {tuple(actual.shape)}, reference {tuple(reference.shape)}"
    if not reference.numel():
        return
    error = relative_error(actual, reference)
    if not error <= tolerance:
        difference = (actual.double() - reference.double()).abs().nan_to_num(nan=float("inf"))
        place = tuple(int(i) for i in torch.unravel_index(difference.argmax(), difference.shape))
        raise AssertionError(
            f"{name}: relative RMS error {error:.2e} above {tolerance:.0e}; largest difference at {place}: "
            f"{float(actual[place])} instead of {float(reference[place])}"
        )


def filled_tensors(state: DecodeState) -> dict[str, Tensor]:
    """The state's tensors, caches cut to what is filled (how much more is allocated means nothing)."""
    filled = {}
    for name, tensor in state.tensors().items():
        if name.endswith("_cache"):
            stack = state.embedding if name.startswith("embedding") else state.language
            tensor = tensor[:, :, : stack.seqlen]
        filled[name] = tensor
    return filled


def counts(state: DecodeState) -> tuple[int, int, int]:
    return state.embedding.seqlen, state.language.seqlen, state.num_image_tokens


def assert_same_state(actual: DecodeState, reference: DecodeState, tolerance: float = 0.0) -> None:
    """Counts and every tensor; bit for bit unless a tolerance is given."""
    assert counts(actual) == counts(reference)
    tensors, references = filled_tensors(actual), filled_tensors(reference)
    assert tensors.keys() == references.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == references[name].dtype, name
        assert_near(f"state {name}", tensor, references[name], tolerance)


# --- tiny random models ---


def tiny_raw(
    *,
    teacher: bool = False,
    embedding: dict[str, Any] | None = None,
    language: dict[str, Any] | None = None,
    **top: Any,
) -> dict[str, Any]:
    """A `config.json` of three embedding and two language layers, 24 wide, after the golden one; with changes."""
    raw = golden_config("post", "hovle" if teacher else "hybrid")
    shape = {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rope_theta": 10000.0,
    }
    raw["embedding_config"] |= shape | {
        "num_hidden_layers": 3,
        "llm_hidden_size": 24,
        "llm_vocab_size": 48,
        "img_context_token_id": 44,
    }
    raw["llm_config"] |= shape | {"num_hidden_layers": 2, "vocab_size": 48}
    if not teacher:
        raw["embedding_config"]["layers_block_type"] = ["mamba2", "mha", "mamba2"]
        raw["llm_config"]["layers_block_type"] = ["mha", "mamba2"]
    raw["embedding_config"] |= embedding or {}
    raw["llm_config"] |= language or {}
    return raw | top


@torch.no_grad()
def random_model(raw: dict[str, Any], *, seed: int = 0, dtype: torch.dtype = torch.float64) -> MMMamba:
    """A model of `raw` in which every tensor is random and matters: no zero biases, no unit norms, no equal decays."""
    model = MMMamba(ModelConfig.from_dict(copy.deepcopy(raw)))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        draw = torch.randn(parameter.shape, generator=generator)
        if name.endswith("A_log") or "norm" in name:
            draw = 1 + 0.3 * draw
        elif parameter.ndim > 1 and "embedding" not in name.rpartition(".")[0].rpartition(".")[2]:
            draw = draw / parameter[0].numel() ** 0.5
        else:
            draw = 0.5 * draw
        parameter.copy_(draw)
    return model.to(dtype).eval().requires_grad_(False)


def random_ids(raw: dict[str, Any], layout: Sequence[int], *, seed: int = 0) -> Tensor:
    """(1, seqlen) ids: `layout` is runs of text tokens (positive) and of image tokens (negative)."""
    generator = torch.Generator().manual_seed(seed)
    image_id = raw["embedding_config"]["img_context_token_id"]
    runs = [
        torch.randint(0, image_id, (run,), generator=generator) if run > 0 else torch.full((-run,), image_id)
        for run in layout
    ]
    return torch.cat(runs)[None]


def random_tiles(num_tiles: int, side: int = 56, *, seed: int = 0) -> Tensor:
    return torch.randn(num_tiles, 3, side, side, generator=torch.Generator().manual_seed(seed))


def pieces(
    ids: Tensor, tiles: Tensor | None, cuts: Sequence[int], image_id: int
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """`ids` (1, seqlen) cut before the positions `cuts`; a tile goes with the piece that holds its first token."""
    given = seen = 0
    edges = [0, *sorted(set(cuts)), ids.shape[1]]
    for start, end in itertools.pairwise(edges):
        piece = ids[:, start:end]
        seen += int((piece == image_id).sum())
        if tiles is None or (needed := -(-seen // TILE_TOKENS)) == given:
            yield piece, None
        else:
            yield piece, tiles[given:needed]
            given = needed


# --- fakes for streaming ---


class PieceTokenizer(Tokenizer):
    """Every id stands for given bytes; the text of a reply is in the test's hands."""

    def __init__(self, pieces_of: Sequence[bytes]) -> None:
        self.pieces_of = list(pieces_of)
        self.control_tokens = {}
        self.vocab_size = len(self.pieces_of)

    def encode(self, text: str) -> list[int]:
        return [self.pieces_of.index(bytes([byte])) for byte in text.encode()]

    def token_bytes(self, token: int) -> bytes:
        return self.pieces_of[token]


class ScriptedModel:
    """Says the tokens of `script`, one a step, whatever it reads; `read` keeps all ids it was given."""

    device = torch.device("cpu")

    def __init__(self, script: Sequence[int]) -> None:
        self.config = scripted_config()
        self.script = list(script)
        self.read: list[int] = []
        self.said = 0

    def __call__(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.read += input_ids[0].tolist()
        logits = torch.zeros(1, 1, self.config.language.vocab_size)
        logits[0, 0, self.script[min(self.said, len(self.script) - 1)]] = 10.0
        self.said += 1
        return logits

    def new_state(self) -> DecodeState:
        return DecodeState.allocate(self.config)


@cache
def scripted_config() -> ModelConfig:
    return ModelConfig.from_dict(tiny_raw())
