"""bitsandbytes' schemes: exact on reload, quiet, and never saved after a processor has repacked them."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from mmmamba import load_model
from mmmamba.generate import decode_one_token
from quantize import bnb, load_quantized, quantize_, save_quantized
from tests.helpers import relative_error
from tests.test_quantize import logits, made, metadata, plain, raw

SCHEMES = ("bnb-int8", "bnb-nf4")


@pytest.fixture
def bitsandbytes() -> ModuleType:
    try:
        return bnb.import_bitsandbytes()
    except ValueError as error:
        pytest.skip(str(error))


@pytest.mark.usefixtures("bitsandbytes")
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_exact_on_reload(scheme: str, dtype: torch.dtype, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = logits(made(raw(), dtype=dtype))
    model = made(raw(), dtype=dtype)
    quantize_(model, scheme)
    about = metadata(save_quantized(model, tmp_path, source="here"))
    assert (about["scheme"], about["source"]) == (scheme, "here")
    assert about["group_size"] == (64 if scheme == "bnb-nf4" else None)
    with caplog.at_level(logging.WARNING):
        ours, again = logits(model), load_quantized(tmp_path, dtype=dtype)
        assert again.scheme == scheme
        assert torch.equal(logits(again), ours)
        token, state, other = torch.tensor([5]), model.new_state(), again.new_state()
        assert torch.equal(decode_one_token(model, token, state), decode_one_token(again, token, other))
    assert not caplog.records
    assert 0 < relative_error(ours, before) < (0.8 if scheme == "bnb-nf4" else 0.15)
    assert isinstance(model.language.output, nn.Linear)
    assert not bnb.is_bnb(model.language.output), "heads are not its business"


@pytest.mark.usefixtures("bitsandbytes")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantizing_while_loading_is_quantizing_after_it(scheme: str, tmp_path: Path) -> None:
    after = load_model(plain(tmp_path))
    quantize_(after, scheme)
    assert torch.equal(logits(load_model(tmp_path, quantize=scheme)), logits(after))


@pytest.mark.usefixtures("bitsandbytes")
def test_what_a_product_has_repacked_is_not_saved(tmp_path: Path) -> None:
    model = made(raw(), dtype=torch.bfloat16)
    quantize_(model, "bnb-nf4")
    layer = model.language.layers[0].mlp.w1
    layer.weight.quant_state.packing_format_for_cpu = True  # as its first product leaves it where it repacks
    with pytest.raises(ValueError, match="save it before its first use"):
        save_quantized(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("bitsandbytes")
def test_parts_that_are_missing() -> None:
    with pytest.raises(ValueError, match="has parts weight; expected weight, SCB"):
        bnb.from_parts({"weight": torch.zeros(1)}, None, "bnb-int8", (1, 1), torch.device("cpu"), torch.float32)


@pytest.mark.usefixtures("bitsandbytes")
def test_it_cannot_fetch_code_while_it_is_imported() -> None:
    with bnb._without_kernel_downloads(), pytest.raises(ImportError):
        __import__("kernels")
    assert "kernels" not in sys.modules or sys.modules["kernels"] is not None


def test_it_is_optional(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    bnb.import_bitsandbytes.cache_clear()
    with pytest.raises(ValueError, match=r"bitsandbytes cannot be imported .* or use the schemes int8 or int4"):
        load_model(plain(tmp_path), quantize="bnb-nf4")
    assert load_model(tmp_path, quantize="int8").scheme == "int8"
    bnb.import_bitsandbytes.cache_clear()
