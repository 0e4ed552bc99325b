"""The benchmarks of the published size, as far as they run without a GPU: models, bills, baselines' arithmetic."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from benchmarks import decode, full_size, gpu_check, prefill, published
from benchmarks.full_size import SIZES, config_of, layer_types, random_model
from mmmamba import cost
from mmmamba.kernels import SWITCH
from mmmamba.state import DecodeState
from tests.helpers import relative_error

CPU = torch.device("cpu")
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "embedding_layers": 2,
    "language_layers": 4,
    "image_size": 56,
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "nano", SMALL)
    monkeypatch.setitem(prefill.MATMUL_SIZE, "cpu", 64)


def test_the_published_size() -> None:
    """2.6 billion parameters (the model cards say so), a quarter of a hybrid's layers softmax."""
    config = config_of("linear")
    assert config.kind == "linear"
    assert 2.5e9 < cost.count_parameters(config).total < 3.1e9
    assert config.tokens_per_tile == 256
    hybrid = [config_of("hybrid").embedding, config_of("hybrid").language]
    assert [(len(s.layer_types), s.layer_types.count("mha")) for s in hybrid] == [(8, 2), (24, 6)]
    assert set(layer_types("teacher", 3)) == {"mha"}


@pytest.mark.usefixtures("small")
def test_packed_models_compute_nearly_the_same_from_fewer_bytes() -> None:
    ids = torch.arange(3, 20)[None]
    models = {s: random_model(config_of("hybrid", "nano"), CPU, s) for s in full_size.SCHEMES}
    logits = {s: model(ids).float() for s, model in models.items()}
    assert 1e-4 < relative_error(logits["int8"], logits["bf16"]) < 0.1
    assert relative_error(logits["int8"], logits["bf16"]) < relative_error(logits["int4"], logits["bf16"]) < 0.6
    size = {s: cost.weight_bytes(model).per_token for s, model in models.items()}
    assert size["int4"] < size["int8"] < size["bf16"]
    again = random_model(config_of("hybrid", "nano"), CPU)
    assert torch.equal(again(ids).float(), logits["bf16"])


@pytest.mark.usefixtures("small")
@torch.inference_mode()
def test_baselines_compute_what_the_model_does() -> None:
    """The published way and the Hugging Face way give our tokens on our weights: the comparison is of speed alone."""
    for kind in ("linear", "teacher"):
        model = random_model(config_of(kind, "nano"), CPU).float()
        state, want = model.new_state(), model.new_state()
        for s in (state, want):
            model(torch.arange(3, 9)[None], None, s)
        token = torch.tensor([5])
        expected = model(token[:, None], None, want)[:, -1].argmax(-1)
        if kind == "linear":
            way = published.PublishedStudent.__new__(published.PublishedStudent)  # without its CUDA graph
            way.model, way.state, way.token, way.upstream = model, state, token.clone(), None
            way._step()
            assert_close(state, want)
        else:
            teacher = published.HuggingFaceTeacher(model, state)
            teacher.token.copy_(token)
            teacher.step()
            way = teacher  # type: ignore[assignment]
        assert torch.equal(way.token, expected), kind


def assert_close(state: DecodeState, want: DecodeState) -> None:
    for name, tensor in want.tensors().items():
        assert not tensor.numel() or relative_error(state.tensors()[name], tensor) < 1e-5, name


@pytest.mark.usefixtures("small")
def test_prefill_end_to_end(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "prefill.json"
    argv = ["--device", "cpu", "--size", "nano", "--kind", "linear", "teacher", "--lengths", "30", "--repeats", "2"]
    assert prefill.main([*argv, "--piece-size", "7", "--out", str(out)]) == 0
    records = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["records"] == records
    assert [r["what"] for r in records] == [
        f"{kind}, torch, {what}"
        for kind in ("linear", "teacher")
        for what in ("1 tile, 40 tokens", "1 tile, 40 tokens", "30 tokens")
    ]
    assert [(r["batch"], r["context"]) for r in records[:3]] == [(1, 44), (8, 44), (1, 30)]
    assert all(0 < r["p20_ms"] <= r["ms"] <= r["p80_ms"] and r["floor_ms"] > 0 for r in records)
    linear = [r["cache_bytes"] for r in records[:3]]
    assert linear[0] == linear[2] == linear[1] / 8


@pytest.mark.usefixtures("small")
def test_floor_of_reading_counts_image_positions_of_both_stacks() -> None:
    model = random_model(config_of("linear", "nano"), CPU)
    stacks = [sum(p.numel() for p in stack.layers.parameters()) for stack in (model.embedding, model.language)]
    # One 56 px tile: 16 positions in the embedding stack, 4 in the language model.
    want = 2 * (8 * ((3 + 16) * stacks[0] + (3 + 4) * stacks[1]))
    assert prefill.floor_s(model, prefill.Prompt(3, tiles=1, batch=8), rate=1.0, bandwidth=1e18) == want


def test_plain_reading_is_switched_off_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "nano", SMALL)
    model = random_model(config_of("linear", "nano"), CPU)
    mixer = model.language.layers[0].mixer
    for before in (None, "auto"):
        if before:
            monkeypatch.setenv(SWITCH, before)
        with prefill.plain(model):
            assert (os.environ[SWITCH], mixer.impl) == ("plain", "chunked")
        assert (os.environ.get(SWITCH), mixer.impl) == (before, "auto")


@pytest.mark.parametrize(
    ("main", "argv", "message"),
    [
        (prefill.main, ["--repeats", "1"], "--repeats 1 must be 2 or more"),
        (prefill.main, ["--lengths", "0"], "--lengths 0 must be 1 or more"),
        (decode.main, ["--full-size"], "--full-size is timed on a GPU"),
    ],
)
def test_bad_arguments(main: object, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(argv)  # type: ignore[operator]
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_what_needs_a_gpu_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for main, argv in ((gpu_check.main, ["--out", str(tmp_path)]), (prefill.main, ["--device", "cuda"])):
        with pytest.raises(SystemExit):
            main(argv)
        assert "torch sees no CUDA device here" in capsys.readouterr().err
