"""Which decoder is taken, where there is no GPU: `test_decoder_cuda.py` does the rest."""

from __future__ import annotations

import logging

import pytest
import torch

from mmmamba import decoder
from mmmamba.decoder import SWITCH, decoder_for, make_decoder
from tests.helpers import ScriptedModel, golden_model


def test_models_on_the_cpu_take_the_plain_path(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger=decoder.__name__):
        for choice in (None, "auto", "plain"):
            assert decoder_for(golden_model("post", "linear"), choice) is None  # type: ignore[arg-type]
    assert not caplog.messages, "nothing was to choose"
    assert decoder_for(ScriptedModel([1])) is None


def test_the_environment_may_ask_for_what_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    model = golden_model("post", "linear")
    monkeypatch.setenv(SWITCH, "fused")
    with pytest.raises(ValueError, match="the fused decoder cannot run: the model is on cpu; set MMMAMBA_DECODER=auto"):
        decoder_for(model)
    monkeypatch.setenv(SWITCH, "fast")
    with pytest.raises(ValueError, match='MMMAMBA_DECODER="fast" is not known; use one of auto, plain, fused'):
        decoder_for(model)


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_decoder(golden_model("post", "linear")) == (None, "the model is on cpu")
    model = golden_model("post", "linear", torch.float64)
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "An old card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert make_decoder(model) == (None, "An old card is no NVIDIA card that multiplies bf16")
