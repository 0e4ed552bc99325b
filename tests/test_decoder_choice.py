"""Which decoder is taken, where there is no GPU: `test_decoder_cuda.py` does the rest."""

from __future__ import annotations

import logging
from typing import Any

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


CARD = (9, 0)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """One launch measured for 2 and 4 rows; whether a kernel compiles and by how much it is off can be set."""
    pytest.importorskip("triton")
    from mmmamba.decoder import check, fused

    found: dict[str, Any] = {"reserve": None, "differences": {2: 0.01, 4: 0.01}}

    def reserve(self: fused.FusedDecoder, rows: int) -> None:
        assert self.one_launch == (rows,)
        if found["reserve"]:
            raise found["reserve"]

    def disagreement(model: object, *, overlap: bool, one_launch: int) -> float:
        return float(found["differences"][one_launch])

    monkeypatch.setattr(fused.FusedDecoder, "reserve", reserve)
    monkeypatch.setattr(check, "disagreement", disagreement)
    monkeypatch.setattr(decoder, "ONE_LAUNCH_ROWS", {(CARD, 64, "dense"): (2, 4)})
    return found


def rows_in_one_launch(capability: tuple[int, int] = CARD, *, hidden: int = 64) -> tuple[int, ...]:
    from mmmamba.decoder.fused import FusedDecoder
    from tests.one_launch import model_of

    model = model_of(hidden, 64, heads=2, kv_heads=1, unit=False)
    return decoder._rows_in_one_launch(model, FusedDecoder(model), capability)


def test_one_launch_where_it_was_measured(measured: dict[str, Any]) -> None:
    assert rows_in_one_launch() == (2, 4)
    assert rows_in_one_launch((10, 0)) == ()
    assert rows_in_one_launch(hidden=128) == ()
    measured["differences"] = {2: 0.5, 4: 0.01}
    assert rows_in_one_launch() == (4,)


@pytest.mark.parametrize(
    ("error", "level"),
    [(ImportError("No module named 'cuda'"), "INFO"), (RuntimeError("NVRTC: no such architecture"), "WARNING")],
)
def test_many_launches_where_one_fails(
    error: Exception, level: str, measured: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    measured["reserve"] = error
    with caplog.at_level(logging.INFO, logger=decoder.__name__):
        assert rows_in_one_launch() == ()
    assert [record.levelname for record in caplog.records] == [level] * 2
    assert caplog.messages[0].startswith("batches of 2 are decoded in many launches (")
    assert str(error) in caplog.messages[0]


def test_a_kernel_that_is_not_a_number_is_not_taken(measured: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    measured["differences"] = {2: float("nan"), 4: 0.3}
    assert rows_in_one_launch() == ()
    assert [message.split("(")[1] for message in caplog.messages] == [
        "one differs from the plain path by nan)",
        "one differs from the plain path by 0.3)",
    ]


def test_workspaces_of_the_rows_that_were_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from mmmamba.decoder import fused
    from tests.one_launch import model_of

    made: list[tuple[int, bool]] = []
    monkeypatch.setattr(
        fused, "Workspace", lambda layers, rows, device, *, overlap, one_launch: made.append((rows, one_launch))
    )
    chosen = fused.FusedDecoder(model_of(64, 64, heads=2, kv_heads=1, unit=False))
    chosen.one_launch = (4,)
    for rows in (1, 2, 3, 4, 5):
        chosen._take(rows)
    assert made == [(1, False), (2, False), (4, True), (4, True), (8, False)]
    described = decoder._described(chosen)
    assert described == "fused kernels in a CUDA graph, one launch a token in batches of 4"
