"""The check of the fused decoder before it is used: it sees every layer, and a kernel that is wrong for one of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.helpers import random_model, tiny_raw
from tests.interpreter import require_triton

DEVICE = require_triton()

from mmmamba.decoder import AGREEMENT, check  # noqa: E402
from mmmamba.decoder import workspace as workspaces  # noqa: E402
from mmmamba.kernels.gemv import project  # noqa: E402
from mmmamba.model import MMMamba  # noqa: E402

HYBRID = {
    "embedding": {"num_hidden_layers": 3, "layers_block_type": ["mamba2", "mamba2", "mha"]},
    "language": {"num_hidden_layers": 5, "layers_block_type": ["mamba2", "mha", "mamba2", "mamba2", "mamba2"]},
}


def make() -> MMMamba:
    return random_model(tiny_raw(**HYBRID), dtype=torch.float32).to(DEVICE)


def test_windows_hold_every_layer_and_share_weights() -> None:
    model = make()
    found = list(check.windows(model))
    assert [len(w.language.layers) for w in found] == [2, 2, 1]
    assert [len(w.embedding.layers) for w in found] == [2, 1, 2], "the shorter stack begins again"
    for name in ("embedding", "language"):
        seen = {id(layer) for window in found for layer in getattr(window, name).layers}
        assert seen == {id(layer) for layer in getattr(model, name).layers}
    assert found[0].language.output.weight is model.language.output.weight
    assert [w.embedding.needs_rope for w in found] == [False, True, False]
    assert len(model.language.layers) == 5
    assert found[0].config.fingerprint() != model.config.fingerprint()


def test_the_kernels_agree() -> None:
    assert check.disagreement(make(), overlap=False) < 1e-3


@pytest.mark.parametrize("few", [4, 2])
@torch.inference_mode()
def test_rows_of_a_check_are_tokens_of_their_own(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspaces, "FEW_ROWS", few)
    window = next(check.windows(make()))
    errors = list(check._errors(window, check.FusedDecoder(window, overlap=False), 4))
    assert len(errors) == check.CHECKED_TOKENS
    assert max(errors) < 1e-3


@pytest.mark.parametrize("layer", [0, 4])
def test_a_kernel_that_is_wrong_for_one_layer_is_seen(layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    address = model.language.layers[layer].get_submodule("mlp.w2").weight.data_ptr()  # type: ignore[union-attr, operator]

    def wrong(x: Tensor, weight, out: Tensor, **given) -> None:
        project(x, weight, out, **given)
        if weight.data.data_ptr() == address:
            out[:, ::2] *= 1.5  # all of it would be lost in the norm that follows

    monkeypatch.setattr(workspaces, "project", wrong)
    assert check.disagreement(model, overlap=False) > AGREEMENT[torch.float32]
