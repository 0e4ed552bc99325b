"""Quantized models and their checkpoints: exact on reload, told apart, loaded without the full-precision model."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmmamba import load_model
from mmmamba.checkpoint import save_model, weights_digest
from mmmamba.cost import weight_bytes
from mmmamba.generate import ModelInputs, prefill
from mmmamba.model import MMMamba
from mmmamba.packing import PackedSpec, PackedWeight, pack
from mmmamba.stored import INDEX, QUANTIZED_METADATA, CheckpointError
from quantize import Quantizer, load_quantized, quantize_, save_quantized
from quantize.linear import FEW_ROWS_TORCH, Int4Linear, Int8Linear, PackedEmbedding, PackedLinear, packed_linear
from quantize.pack import nearest
from tests.helpers import assert_near, random_model, random_tiles, relative_error, tiny_raw

ROOT = Path(__file__).parent.parent
PACKED = ("int8", "int4")
# RMS error of logits over their RMS, for a random model whose layers amplify roundings.
LOST = {"int8": 0.1, "int4": 1.0}


def raw(*, tied: bool = False, hidden: int = 64, **top: Any) -> dict[str, Any]:
    shape = {"hidden_size": hidden, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= {"num_hidden_layers": 2}
    embedding = shape | {"llm_hidden_size": hidden, "layers_block_type": ["mamba2"] * 2}
    language = shape | {"layers_block_type": ["mamba2"] * 2, "tie_word_embeddings": tied}
    return tiny_raw(embedding=embedding, language=language, **top)


def made(raw: dict[str, Any], dtype: torch.dtype = torch.float32) -> MMMamba:
    return random_model(raw, dtype=dtype)


def plain(directory: Path, **options: Any) -> Path:
    """A checkpoint of a random model."""
    save_model(made(raw(**options)), directory)
    return directory


def tensors_of(model: MMMamba) -> dict[str, Tensor]:
    return {name: t for name, t in [*model.named_parameters(), *model.named_buffers()] if t.numel()}


def assert_same(a: MMMamba, b: MMMamba) -> None:
    ours, theirs = tensors_of(a), tensors_of(b)
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]


def metadata(weights: Path) -> dict[str, Any]:
    with safe_open(weights, "pt") as f:
        return json.loads(f.metadata()[QUANTIZED_METADATA])


@torch.inference_mode()
def logits(model: MMMamba) -> Tensor:
    ids = torch.tensor([[1, *[44] * 4, 7, 9, 11]])
    return prefill(model, ModelInputs(ids, random_tiles(1).to(model.dtype)), model.new_state())


# --- models ---


@pytest.mark.parametrize("scheme", PACKED)
@pytest.mark.parametrize("tied", [False, True])
def test_what_is_packed_and_what_is_lost(scheme: str, tied: bool) -> None:
    model = made(raw(tied=tied))
    before = logits(model)
    done = quantize_(model, scheme)
    kinds = {type(block.get_submodule(name)) for block in model.language.layers for name in ("mixer.in_proj", "mlp.w2")}
    assert kinds == {Int4Linear if scheme == "int4" else Int8Linear}
    assert isinstance(model.language.output, Int8Linear)
    assert isinstance(model.embedding.text, PackedEmbedding)
    assert (model.embedding.text.table is model.language.output) == tied
    assert model.scheme == scheme
    assert max(done.errors.values()) < (0.12 if scheme == "int4" else 0.02)
    assert relative_error(logits(model), before) < LOST[scheme]
    layers = [m for m in model.modules() if isinstance(m, PackedLinear)]
    assert all(m.qweight.nbytes == m.out_features * m.in_features * m.bits // 8 for m in layers)
    assert weight_bytes(model).total == sum(t.nbytes for t in tensors_of(model).values()), "a tied table once"
    kept = {name.rpartition(".")[0].rpartition(".")[2] for name, p in model.named_parameters() if p.ndim > 1}
    assert kept == {"conv", "patch_embedding", "stem"}


def test_int4_is_worth_its_search(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = logits(made(raw()))
    searched, rounded = made(raw()), made(raw())
    quantize_(searched, "int4")
    monkeypatch.setattr("quantize.api.search", nearest)
    quantize_(rounded, "int4")
    assert relative_error(logits(searched), exact) < relative_error(logits(rounded), exact)


def test_a_quantized_model_is_not_quantized_again() -> None:
    model = made(raw())
    quantize_(model, "int8")
    with pytest.raises(ValueError, match="is int8 already"):
        quantize_(model, "int4")


@pytest.mark.parametrize(
    ("scheme", "group_size", "text"),
    [
        ("int3", None, 'scheme "int3" is not known; use one of int8, int4, bnb-int8, bnb-nf4'),
        ("int8", 64, "group_size=64 does not apply to int8"),
        ("bnb-nf4", 32, "group_size=32 does not apply to bnb-nf4"),
        ("int4", 30, "group_size=30 must be a multiple of 4"),
        ("int4", 0, "group_size=0 must be a multiple of 4"),
    ],
)
def test_schemes_that_there_are_not(scheme: str, group_size: int | None, text: str) -> None:
    model = made(raw())
    with pytest.raises(ValueError, match=text.replace("(", r"\(")):
        quantize_(model, scheme, group_size=group_size)
    assert model.scheme is None


def test_rows_that_do_not_divide_stay_as_they_are(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """Layers of 64 columns take no groups of 96; those of 192 do. The checkpoint comes back as it was written."""
    model = made(raw())
    with caplog.at_level(logging.WARNING, logger="quantize"):
        quantize_(model, "int4", group_size=96)
    assert isinstance(model.language.layers[0].mlp.w1, torch.nn.Linear)
    assert isinstance(model.language.layers[0].mlp.w2, Int4Linear)
    assert "group_size=96 does not divide rows of 64 in language.layers.0.mixer.in_proj.weight" in caplog.text
    before = logits(model)
    assert metadata(save_quantized(model, tmp_path))["group_size"] == 96
    again = load_quantized(tmp_path)
    assert_same(again, model)
    assert torch.equal(logits(again), before)


# --- checkpoints ---


@pytest.mark.parametrize("scheme", PACKED)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_exact_on_reload(scheme: str, tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    model = made(raw(tied=tied), dtype=dtype)
    quantize_(model, scheme)
    weights = save_quantized(model, tmp_path, source="someone/a-model")
    assert metadata(weights) == {
        "scheme": scheme,
        "group_size": 64 if scheme == "int4" else None,
        "source": "someone/a-model",
        "foreign": {},
    }
    for load in (load_model, load_quantized):
        again = load(tmp_path, dtype=dtype)
        assert again.scheme == scheme
        assert_same(again, model)
        assert torch.equal(logits(again), logits(model))
    assert load_model(tmp_path, dtype=dtype, quantize=scheme).scheme == scheme


@pytest.mark.parametrize("scheme", PACKED)
def test_quantizing_while_loading_is_quantizing_after_it(scheme: str, tmp_path: Path) -> None:
    plain(tmp_path)
    after = load_model(tmp_path)
    quantize_(after, scheme)
    assert_same(load_model(tmp_path, quantize=scheme), after)


def test_groups_of_another_size_come_back(tmp_path: Path) -> None:
    source = plain(tmp_path / "plain")
    model = load_model(source, quantize=Quantizer("int4", 32))
    save_quantized(model, tmp_path / "packed")
    again = load_model(tmp_path / "packed")
    assert again.language.layers[0].mlp.w1.spec.group_size == 32
    assert_same(again, model)


def test_a_checkpoint_is_replaced_whole(tmp_path: Path) -> None:
    plain(tmp_path)
    (tmp_path / INDEX).write_text("{}")
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"old")
    model = made(raw())
    quantize_(model, "int4")
    save_quantized(model, tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    assert_same(load_model(tmp_path), model)


def test_what_cannot_be_written(tmp_path: Path) -> None:
    plain(tmp_path)
    model = load_model(tmp_path)
    with pytest.raises(ValueError, match="not quantized"):
        save_quantized(model, tmp_path / "other")
    quantize_(model, "int8")
    with pytest.raises(ValueError, match="holds the model itself"):
        save_quantized(model, tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        save_quantized(model, tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"write it with quantize\.save_quantized"):
        save_model(model, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    assert load_model(tmp_path).scheme is None


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    source = plain(tmp_path / "plain")
    with pytest.raises(CheckpointError, match="is not quantized"):
        load_quantized(source)
    with pytest.raises(ValueError, match='scheme "int2" is not known'):
        load_model(source, quantize="int2")
    model = made(raw())
    quantize_(model, "int4")
    weights = save_quantized(model, tmp_path / "packed")
    with pytest.raises(CheckpointError, match="holds int4 weights already, int8 would round them again"):
        load_model(weights.parent, quantize="int8")


def test_the_file_of_another_model(tmp_path: Path) -> None:
    """Wider, or of softmax layers: told by names and shapes before anything is read."""
    model = made(raw())
    quantize_(model, "int4")
    save_quantized(model, tmp_path / "a")
    for other in (raw(hidden=128), tiny_raw(teacher=True)):
        (tmp_path / "a" / "config.json").write_text(json.dumps(other))
        with pytest.raises(CheckpointError, match=r"does not fit its config\.json"):
            load_model(tmp_path / "a")


def test_a_file_whose_metadata_is_not_its_own(tmp_path: Path) -> None:
    model = made(raw())
    quantize_(model, "int4")
    weights = save_quantized(model, tmp_path)
    tensors = load_file(weights)
    with safe_open(weights, "pt") as f:
        kept = f.metadata()
    about = json.loads(kept[QUANTIZED_METADATA])
    save_file(tensors, weights, metadata=kept | {QUANTIZED_METADATA: json.dumps(about | {"scheme": "int5"})})
    with pytest.raises(CheckpointError, match='quantized by the scheme "int5", which is not known here'):
        load_model(tmp_path)
    save_file(tensors, weights, metadata=kept | {QUANTIZED_METADATA: "no json"})
    with pytest.raises(CheckpointError, match="metadata"):
        load_model(tmp_path)
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"does not fit its config\.json"):
        load_model(tmp_path)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_long_head_is_unpacked_in_parts(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, x = torch.randn(23, 64, generator=torch.Generator().manual_seed(0)), torch.randn(40, 2, 64)
    spec = PackedSpec(bits, 32, (23, 64))
    layer = packed_linear(PackedWeight(*pack(dense, spec), spec), torch.randn(23))
    assert len(x) * 2 > FEW_ROWS_TORCH, "so many that they are multiplied by unpacking"
    whole = layer(x)
    unpacked: list[int] = []
    monkeypatch.setattr("quantize.linear.UNPACKED_ROWS", 10)
    real = PackedWeight.unpack
    monkeypatch.setattr("quantize.linear.load_native", lambda: (None, "for the test"))
    monkeypatch.setattr(PackedWeight, "unpack", lambda w, dtype: unpacked.append(w.spec.shape[0]) or real(w, dtype))
    assert_near("in parts", layer(x), whole, 1e-5)
    assert unpacked == [10, 10, 3]


def test_packed_weights_are_held_once(tmp_path: Path) -> None:
    """Two models on one device that share what is frozen: quantized too."""
    source = plain(tmp_path)
    first = load_model(source, quantize="int8")
    second = load_model(source, quantize="int8", share=[first])
    assert_same(first, second)
    assert {t.data_ptr() for t in tensors_of(first).values()} == {t.data_ptr() for t in tensors_of(second).values()}
    alone = load_model(source, quantize="int4", share=[first])
    mine, theirs = tensors_of(alone), {t.data_ptr() for t in tensors_of(first).values()}
    assert mine["language.norm.weight"].data_ptr() in theirs
    assert mine["language.layers.0.mlp.w1.qweight"].data_ptr() not in theirs


# --- nano ---


@pytest.fixture(scope="module")
def nano() -> MMMamba:
    return load_model("nano-linear")


@pytest.mark.parametrize(("scheme", "kl_limit"), [("int8", 1e-2), ("int4", 1e-6)])
def test_nano_answers_as_before(nano: MMMamba, scheme: str, kl_limit: float) -> None:
    """It was trained on the grids that int4 keeps, so nothing is lost there."""
    model = load_model("nano-linear", quantize=scheme)
    ids = torch.tensor([[1, 4093, 198, 504, 3575, 282, 4649, 314, 2, 198, 1, 520, 9531, 198]])
    with torch.inference_mode():
        before, after = (m(ids).double().log_softmax(-1) for m in (nano, model))
    kl = float((before.exp() * (before - after)).sum(-1).mean())
    assert kl < kl_limit
    assert weights_digest(model) == weights_digest(nano), "rounded is not trained"
    if scheme == "int4":
        for name, module in model.named_modules():
            if isinstance(module, PackedLinear) and name != "embedding.text.table":
                wanted = nano.get_submodule(name).weight
                assert_near(name, module.weight_as(torch.float32), wanted, 1e-7)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux lets a process reset its peak")
@pytest.mark.parametrize("scheme", [None, *PACKED])
def test_loading_never_holds_the_full_model(scheme: str | None, tmp_path: Path) -> None:
    """In a process of its own: what it grows by is a quantized checkpoint's size and a little, also when all of it has
    been read (weights may stay in the mapped file, which is not read at once)."""
    script = (
        "import sys, torch\n"
        "from mmmamba import load_model\n"
        "from mmmamba.memory import peak_memory_bytes, reset_peak_memory\n"
        "cpu = torch.device('cpu')\n"
        "def load_and_touch(name):\n"
        "    model = load_model(name)\n"
        "    for t in (*model.parameters(), *model.buffers()):\n"
        "        t.detach().flatten()[::512].float().sum()\n"  # an element of every page
        "    return model\n"
        "small = load_and_touch(sys.argv[1])\n"  # modules and code that loading needs
        "reset_peak_memory(cpu)\n"
        "before = peak_memory_bytes(cpu)\n"
        "model = load_and_touch(sys.argv[2])\n"
        "print(peak_memory_bytes(cpu) - before)\n"
    )
    small = tmp_path / "small"
    save_quantized(load_model(plain(tmp_path / "plain"), quantize=scheme or "int8"), small)
    name, limit = "nano-linear", 0
    if scheme is not None:
        weights = save_quantized(load_model("nano-linear", quantize=scheme), tmp_path / "nano")
        name, limit = str(weights.parent), weights.stat().st_size
    command = [sys.executable, "-c", script, str(small), name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    if scheme is None:
        assert int(done.stdout) > 5e8, "what this test would see if the model were held in full"
    else:
        assert int(done.stdout) < 1.15 * limit < 2.2e8
