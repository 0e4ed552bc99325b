"""Muon: orthogonal steps of AdamW's size."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distill.optim import Muon, orthogonalize


@pytest.mark.parametrize("shape", [(3, 16, 48), (2, 48, 16), (1, 20, 20)])
def test_orthogonalize_evens_singular_values_and_keeps_directions(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    y = orthogonalize(x)
    assert y.shape == x.shape
    values = torch.linalg.svdvals(y)
    assert values.min() > 0.6
    assert values.max() < 1.3
    for before, after in zip(x, y, strict=True):
        u, _, v = torch.linalg.svd(before, full_matrices=False)
        turned = u.mT @ after @ v.mT  # diagonal if the singular vectors are the same
        off = turned - torch.diag(turned.diagonal())
        assert off.abs().max() < 1e-3


def test_a_step_is_as_large_as_adamws_and_follows_momentum() -> None:
    g = torch.Generator().manual_seed(1)
    weights = [nn.Parameter(torch.zeros(32, 64)), nn.Parameter(torch.zeros(32, 64)), nn.Parameter(torch.zeros(64, 8))]
    optimizer = Muon(weights, lr=0.1)
    gradients = [torch.randn(w.shape, generator=g) for w in weights]
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient.clone()
    optimizer.step()
    for weight, gradient in zip(weights, gradients, strict=True):
        rms = float(weight.detach().square().mean().sqrt())
        assert 0.6 * 0.2 * 0.1 < rms < 1.3 * 0.2 * 0.1
        assert float((weight.detach() * gradient).sum()) < 0, "the step goes uphill"
        assert torch.equal(weight.grad, gradient), "gradients were changed"
    before = [w.detach().clone() for w in weights]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert all((w - b).abs().max() > 1e-3 for w, b in zip(weights, before, strict=True)), "no momentum"


def test_weight_decay_is_decoupled() -> None:
    weight = nn.Parameter(torch.full((4, 4), 2.0))
    weight.grad = torch.zeros(4, 4)
    Muon([weight], lr=0.1, weight_decay=0.5).step()
    assert weight.detach().flatten().tolist() == pytest.approx([2.0 * (1 - 0.05)] * 16)


def test_only_matrices() -> None:
    with pytest.raises(ValueError, match=r"takes matrices, not a tensor of shape \(4,\); use AdamW"):
        Muon([nn.Parameter(torch.zeros(4))])
