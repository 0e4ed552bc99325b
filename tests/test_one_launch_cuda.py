"""On a GPU: a token in one launch beside the plain path."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch

from benchmarks import full_size
from benchmarks.full_size import config_of
from mmmamba.decoder import AGREEMENT
from mmmamba.model import MMMamba

pytestmark = pytest.mark.cuda

SIZES: dict[str, tuple[int, int]] = {"nano": (2, 2), "2.6b": (1, 1)}  # layers


@pytest.fixture(autouse=True)
def able() -> None:
    pytest.importorskip("triton")
    pytest.importorskip("cuda.bindings.nvrtc")
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("a card from Hopper on is needed")


def differences(model: MMMamba, rows: int) -> torch.Tensor:
    """Relative RMS difference of the logits, of tokens launched one by one and then replayed."""
    from mmmamba.decoder.fused import FusedDecoder

    decoder = FusedDecoder(model, one_launch=(1, 2, 4))
    mine, plain = model.new_state(rows), model.new_state(rows)
    found = []
    with torch.inference_mode():
        for i in range(10):
            ids = torch.tensor([3 + 7 * i + 11 * row for row in range(rows)], device="cuda")
            want = model(ids[:, None], None, plain)[:, -1].float()
            got = decoder.decode_one_token(ids, mine, graph=i > 5).float()
            found.append(((got - want).square().mean() / want.square().mean()).sqrt())
    torch.cuda.synchronize()
    spaces = [space for free in decoder._free.values() for space in free]
    assert [space.one is not None and space.one.fault for space in spaces] == [""]
    return torch.stack(found[2:])


@pytest.mark.parametrize("rows", [1, 3, 4])
@pytest.mark.parametrize(
    ("size", "scheme"), [("nano", "bf16"), ("nano", "int8"), ("2.6b", "bf16"), ("2.6b", "int8"), ("2.6b", "int4")]
)
def test_logits_are_those_of_the_plain_path(size: str, scheme: Literal["bf16", "int8", "int4"], rows: int) -> None:
    model = full_size.random_model(config_of("linear", size, layers=SIZES[size]), torch.device("cuda"), scheme)
    found = differences(model, rows)
    assert found.isfinite().all()
    assert found.median() <= AGREEMENT[torch.bfloat16]


@pytest.mark.parametrize("rows", [1, 4])
def test_a_small_model_in_which_every_tensor_matters(rows: int) -> None:
    from tests.one_launch import model_of

    sizes: dict[str, Any] = {"hidden": 256, "inner": 320, "heads": 2, "kv_heads": 1}
    found = differences(model_of(**sizes, unit=True).cuda(), rows)
    assert found.median() <= AGREEMENT[torch.bfloat16]


def test_the_check_that_is_taken_before_use() -> None:
    from mmmamba.decoder.check import disagreement

    model = full_size.random_model(config_of("linear", "2.6b", layers=(2, 2)), torch.device("cuda"), "bf16")
    assert disagreement(model, overlap=True, one_launch=4) <= AGREEMENT[torch.bfloat16]


def test_rows_that_fill_no_piece_are_refused() -> None:
    from mmmamba.decoder.layers import Unsupported

    model = full_size.random_model(config_of("linear", "nano", layers=(1, 1)), torch.device("cuda"), "int4")
    with pytest.raises(Unsupported, match="no whole number of pieces"):
        differences(model, 1)
