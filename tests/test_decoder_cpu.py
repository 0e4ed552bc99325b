"""The decoding step in C against the plain path: logits and states, token by token; and products against torch."""

from __future__ import annotations

import copy
import ctypes
import logging
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmmamba import decoder_cpu, load_model
from mmmamba.decoder_cpu import Unsupported, cpu_decoder_for, make_cpu_decoder
from mmmamba.generate import ModelInputs, SamplingParams, decode_one_token, prefill, sample
from mmmamba.kernels import native
from mmmamba.memory import peak_memory_bytes, reset_peak_memory
from mmmamba.model import MMMamba
from mmmamba.packing import PackedSpec, PackedWeight, pack
from quantize import quantize_
from quantize.linear import packed_linear
from tests.helpers import (
    TOLERANCE,
    assert_near,
    counts,
    filled_tensors,
    golden_model,
    random_ids,
    random_model,
    random_tiles,
    relative_error,
    tiny_raw,
)

LIB, REASON = native.load_native()
needs_library = pytest.mark.skipif(LIB is None, reason=f"no library: {REASON}")

# Errors of logits and states against float64, as multiples of those of the plain path: the random models amplify
# roundings a hundredfold, so only the comparison says something. Float weights are as exact as in torch, or within what
# two right computations in float32 may differ by; integer ones, whose activations are rounded to 16 bits, at least ten
# times as exact as the plain path in bfloat16.
AS_EXACT, TEN_TIMES = 2.0, 0.1


def linear_raw(hidden: int = 64, **top: Any) -> dict[str, Any]:
    """A linear model, `hidden` wide with heads of 16; rows divide into units of 64 as packed products need."""
    shape = {"hidden_size": hidden, "intermediate_size": 192, "num_attention_heads": hidden // 16}
    shape["num_key_value_heads"] = hidden // 32
    embedding = shape | {"llm_hidden_size": hidden, "layers_block_type": ["mamba2"] * 3}
    return tiny_raw(embedding=embedding, language=shape | {"layers_block_type": ["mamba2"] * 2}, **top)


def small(raw: dict[str, Any], scheme: str | None, dtype: torch.dtype = torch.float32) -> MMMamba:
    model = random_model(raw, dtype=dtype)
    if scheme:
        quantize_(model, scheme)
    return model


@torch.inference_mode()
def compare(model: MMMamba, steps: int, *, yardstick: torch.dtype | None = None, tiles: int = 0) -> None:
    """Feed the same tokens to the library, to the plain path in float64, and to the plain path in the dtype whose
    errors are the yardstick (the model's own)."""
    models = model, copy.deepcopy(model).double(), copy.deepcopy(model).to(yardstick or model.dtype)
    factor = TEN_TIMES if yardstick else AS_EXACT
    inputs = ModelInputs(torch.tensor([[1, *[44] * 4 * tiles, 7, 9]]), random_tiles(tiles) if tiles else None)
    states = [m.new_state() for m in models]
    for m, state in zip(models, states, strict=True):
        prefill(m, inputs, state)
    decoder = make_cpu_decoder(model)
    errors, plain_errors = [], []
    for token in random_ids(tiny_raw(), [steps], seed=3)[0]:
        wanted, plain = (m(token.view(1, 1), None, s)[:, -1] for m, s in zip(models[1:], states[1:], strict=True))
        assert decoder.fits(token.view(1), states[0])
        errors.append(relative_error(decoder.decode_one_token(token.view(1), states[0]), wanted))
        plain_errors.append(relative_error(plain, wanted))
    floor = TOLERANCE[torch.float32]
    assert sum(errors) <= factor * sum(plain_errors) + steps * floor, f"{errors} against {plain_errors}"
    assert counts(states[0]) == counts(states[1])
    ours, wanted_state, theirs = (filled_tensors(state) for state in states)
    for name, tensor in wanted_state.items():
        assert_near(name, ours[name], tensor, factor * relative_error(theirs[name], tensor) + floor)


@needs_library
@pytest.mark.parametrize("scheme", [None, "int8", "int4"])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_many_tokens(scheme: str | None, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = small(linear_raw(), scheme)
        compare(model, 512 if threads == 1 else 60, yardstick=torch.bfloat16 if scheme else None, tiles=1)
    finally:
        torch.set_num_threads(before)


@needs_library
@pytest.mark.slow
@pytest.mark.parametrize("scheme", [None, "int4"])
def test_4096_tokens(scheme: str | None) -> None:
    """Of a model with one layer a stack: errors could only grow in the states."""
    raw = linear_raw()
    for name in ("embedding_config", "llm_config"):
        raw[name] |= {"num_hidden_layers": 1, "layers_block_type": ["mamba2"]}
    compare(small(raw, scheme), 4096, yardstick=torch.bfloat16 if scheme else None)


@needs_library
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux lets a process reset its peak")
def test_a_thousand_conversations_leave_nothing() -> None:
    model = small(linear_raw(), "int4")
    ids = random_ids(tiny_raw(), [8], seed=1)

    def talk(conversations: int) -> int:
        """Bytes that the process holds afterwards."""
        for _ in range(conversations):
            state = model.new_state()
            prefill(model, ModelInputs(ids), state)
            for token in (3, 5):
                decode_one_token(model, torch.tensor([token]), state)
        reset_peak_memory(model.device)
        return peak_memory_bytes(model.device)

    before = talk(100)
    grown = talk(1000) - before
    assert grown < 100 * model.new_state().nbytes, "more than each tenth state was kept"


@needs_library
@pytest.mark.parametrize("scheme", [None, "int8", "int4"])
@pytest.mark.parametrize("hidden", [64, 128, 192])
def test_shapes_and_groups(scheme: str | None, hidden: int) -> None:
    compare(small(linear_raw(hidden), scheme), 12, yardstick=torch.bfloat16 if scheme else None)


@needs_library
@pytest.mark.parametrize("scheme", [None, "int4"])
def test_bfloat16(scheme: str | None) -> None:
    compare(small(linear_raw(), scheme, torch.bfloat16), 40)


@needs_library
def test_normalized_encoder_output() -> None:
    compare(small(linear_raw(normalize_encoder_output=True), None), 40)


@needs_library
@pytest.mark.parametrize("folder", ["post", "pre_ntk"])
def test_golden_models(folder: str) -> None:
    """Special embeddings, untied heads and odd sizes."""
    compare(golden_model(folder, "linear"), 40)


@needs_library
def test_nano_says_the_same() -> None:
    model = load_model("nano-linear", quantize="int4")
    ids = torch.tensor([[1, 4093, 198, 504, 3575, 282, 4649, 314]])
    with torch.inference_mode():
        fast, slow = model.new_state(), model.new_state()
        logits, plain = prefill(model, ModelInputs(ids), fast), prefill(model, ModelInputs(ids), slow)
        for _ in range(24):
            token = sample(plain, SamplingParams(greedy=True))
            assert torch.equal(token, sample(logits, SamplingParams(greedy=True)))
            logits = decode_one_token(model, token, fast)
            plain = model(token[:, None], None, slow)[:, -1]
            assert_near("logits", logits, plain, 1e-3)
    assert cpu_decoder_for(model) is not None


@needs_library
def test_two_conversations_in_two_threads() -> None:
    """The library holds no state of its own, and calls from several threads take turns."""
    model = small(linear_raw(), "int4")
    alone: dict[int, Tensor] = {}
    together: dict[int, Tensor] = {}

    def talk(seed: int, into: dict[int, Tensor]) -> None:
        state = model.new_state()
        for token in random_ids(tiny_raw(), [60], seed=seed)[0]:
            into[seed] = decode_one_token(model, token.view(1), state)

    for seed in (1, 2):
        talk(seed, alone)
    threads = [threading.Thread(target=talk, args=(seed, together)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(torch.equal(alone[seed], together[seed]) for seed in (1, 2))


# --- what it is chosen for ---


def test_what_the_plain_path_takes(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(Unsupported, match="attention layers"):
        make_cpu_decoder(golden_model("post", "hybrid"))
    with pytest.raises(Unsupported, match="float64"):
        make_cpu_decoder(golden_model("post", "linear", torch.float64))
    model = small(linear_raw(), None)
    model.train()
    assert cpu_decoder_for(model) is None
    model.eval().requires_grad_(True)
    assert cpu_decoder_for(model) is None
    assert model not in decoder_cpu._choices, "nothing is kept for it"
    with caplog.at_level(logging.INFO, logger="mmmamba"):
        hybrid = copy.deepcopy(golden_model("post", "hybrid")).requires_grad_(False)  # other tests may have asked of it
        assert cpu_decoder_for(hybrid) is None
        assert cpu_decoder_for(hybrid) is None
    assert [r.message for r in caplog.records] == ["decoder: plain (a hybrid model has attention layers)"]


@needs_library
def test_other_rows_other_states_and_image_tokens_go_the_plain_way() -> None:
    model = small(linear_raw(), None)
    decoder = make_cpu_decoder(model)
    assert not decoder.fits(torch.tensor([1, 2]), model.new_state(2))
    assert not decoder.fits(torch.tensor([44]), model.new_state())
    assert not decoder.fits(torch.tensor([1]), golden_model("post", "linear").new_state())
    with pytest.raises(ValueError, match="another model"):
        decode_one_token(model, torch.tensor([1]), golden_model("post", "linear").new_state())


@needs_library
def test_new_weights_are_seen() -> None:
    model = small(linear_raw(), None)
    token = torch.tensor([5])
    before = decode_one_token(model, token, model.new_state())
    with torch.no_grad():
        model.language.norm.weight.mul_(2)
    assert_near("scaled", decode_one_token(model, token, model.new_state()), 2 * before, 1e-5)
    model.bfloat16()
    decode_one_token(model, token, model.new_state())
    with torch.no_grad():
        model.embedding.layers[0].mixer.conv.weight.mul_(-2)  # read as a copy in float32
    assert_near("written", decode_one_token(model, token, model.new_state()), model(token.view(1, 1))[:, -1], 2e-2)
    model.float()
    before = decode_one_token(model, token, model.new_state())
    quantize_(model, "int8")
    after = decode_one_token(model, token, model.new_state())
    assert not torch.equal(after, before)
    assert_near("quantized", after, model(token.view(1, 1))[:, -1], 2e-2)


# --- products ---


def packed(rows: int, cols: int, bits: int, group: int) -> PackedWeight:
    w = torch.randn(rows, cols, generator=torch.Generator().manual_seed(cols)) / cols**0.5
    w[:, ::50] *= 8
    spec = PackedSpec(bits, group, (rows, cols))
    return PackedWeight(*pack(w, spec), spec)


CASES = [(1, 64, 4, 64), (33, 128, 4, 32), (50, 192, 4, 96), (1545, 576, 4, 64), (48, 1536, 4, 96), (17, 256, 4, 256)]
CASES += [(33, 64, 8, 64), (50, 192, 8, 192), (100, 576, 8, 64), (31, 576, 8, 96), (64, 640, 8, 640)]


@needs_library
@pytest.mark.parametrize(
    "flags", [(), ("-DMMMAMBA_NO_AVX512",), ("-DMMMAMBA_PORTABLE",)], ids=["vectors", "short-vectors", "portable"]
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_products_with_packed_weights(case: tuple[int, int, int, int], flags: tuple[str, ...]) -> None:
    """All forms of the source, against float64; the exact product of what they round activations to is not far."""
    lib = ctypes.CDLL(str(native.build(*flags)))
    lib.mmmamba_product.argtypes = LIB.mmmamba_product.argtypes
    lib.mmmamba_unpack.argtypes = LIB.mmmamba_unpack.argtypes
    weight = packed(*case)
    x = torch.randn(3, case[1], generator=torch.Generator().manual_seed(1))
    wanted = x.double() @ weight.unpack(torch.float64).T
    assert_near("product", native.product(lib, weight, x), wanted, 2e-4)
    assert_near("unpacked", native.unpack(lib, weight), weight.unpack(torch.float32), 1e-7)
    assert torch.equal(native.product(lib, weight, torch.zeros_like(x)), torch.zeros(3, case[0]))


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (packed(4, 96, 4, 32), "rows hold 96"),
        (packed(4, 64, 4, 16), "groups hold 16"),
        (packed(4, 64, 6, 64), "6 bits"),
        (torch.zeros(4, 64, dtype=torch.float16), "float16"),
        (torch.zeros(64, 4).T, "in rows"),
    ],
    ids=["width", "group", "bits", "dtype", "strides"],
)
def test_refused_weights(weight: Tensor | PackedWeight, reason: str) -> None:
    assert reason in native.refusal_of(weight)
    if isinstance(weight, PackedWeight) and weight.spec.bits == 4:
        layer = packed_linear(weight)  # torch's path takes them
        x = torch.randn(2, weight.spec.shape[1])
        assert_near("torch's", layer(x), nn.functional.linear(x, weight.unpack(torch.float32)), 2e-2)


# --- building ---


def test_no_compiler_no_library(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(native, "_compiler", lambda: None)
    with caplog.at_level(logging.INFO, logger="mmmamba"):
        lib, reason = native.load_native.__wrapped__()
    assert lib is None
    assert "no C compiler" in reason
    assert "no C compiler" in caplog.text


def test_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMMAMBA_NATIVE", "0")
    assert native.load_native.__wrapped__()[1] == "MMMAMBA_NATIVE=0 says so"
    monkeypatch.setattr(decoder_cpu, "load_native", lambda: (None, "so it is"))
    with pytest.raises(Unsupported, match="so it is"):
        make_cpu_decoder(golden_model("post", "linear"))


@needs_library
def test_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = tmp_path / "cc"
    fake.write_text("#!/bin/sh\necho no such option >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("CC", str(fake))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    lib, reason = native.load_native.__wrapped__()
    assert lib is None
    assert "no such option" in reason
    assert not [f for f in (tmp_path / "cache").rglob("*") if f.is_file()]


def test_every_header_counts_for_the_key_of_a_build() -> None:
    assert {path.name for path in native.SOURCE.parent.glob("*.h")} == {path.name for path in native.INCLUDED}


@needs_library
def test_another_users_library_is_not_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.build()
    owner = os.getuid()
    monkeypatch.setattr(native.os, "getuid", lambda: owner + 1)
    lib, reason = native.load_native.__wrapped__()
    assert lib is None
    assert "belongs to another user" in reason


@needs_library
def test_built_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library = native.build()
    stamp = os.stat(library).st_mtime_ns
    monkeypatch.setattr(native.subprocess, "run", lambda *a, **k: pytest.fail("built again"))
    assert native.build() == library
    assert os.stat(library).st_mtime_ns == stamp
    assert [f.name for f in (tmp_path / "mmmamba").iterdir()] == [library.name]
