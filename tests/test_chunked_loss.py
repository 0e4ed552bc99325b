"""The chunked loss against the plain formula: values and gradients, whatever the chunks, in any dtype."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.chunked_loss import chunked_loss
from distill.losses import Objective, token_kl
from tests.helpers import TOLERANCE, assert_near

TOKENS, VOCAB = 11, 37


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def problem() -> dict[str, Tensor]:
    """The teacher is wider than the student, and some tokens have no weight."""
    kl_weights, ce_weights = draw(TOKENS, seed=5).abs(), draw(TOKENS, seed=6).abs()
    kl_weights[3] = ce_weights[4] = 0
    return {
        "hidden": draw(TOKENS, 6),
        "head": draw(VOCAB, 6),
        "teacher_hidden": draw(TOKENS, 8),
        "teacher_head": draw(VOCAB, 8),
        "kl_weights": kl_weights,
        "targets": torch.arange(TOKENS) * 3,
        "ce_weights": ce_weights,
    }


def plain(p: dict[str, Tensor], temperature: float, ce_factor: float, losses: str) -> Tensor:
    logits = p["hidden"] @ p["head"].T
    total = logits.new_zeros(())
    if "kl" in losses:
        teacher = p["teacher_hidden"] @ p["teacher_head"].T
        log_p, log_q = ((t / temperature).log_softmax(-1) for t in (teacher, logits))
        total = total + (p["kl_weights"] * temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1)).sum()
    if "ce" in losses:
        entropies = F.cross_entropy(logits, p["targets"], reduction="none")
        total = total + ce_factor * (p["ce_weights"] * entropies).sum()
    return total


def arguments(p: dict[str, Tensor], losses: str) -> dict[str, Any]:
    names = ["teacher_hidden", "teacher_head", "kl_weights"] if "kl" in losses else []
    names += ["targets", "ce_weights"] if "ce" in losses else []
    return {name: p[name] for name in names}


@pytest.mark.parametrize("losses", ["kl", "ce", "kl+ce"])
@pytest.mark.parametrize("chunk_tokens", [1, 4, 11, 100, None])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("head_trains", [False, True])
def test_equals_the_plain_formula(losses: str, chunk_tokens: int | None, temperature: float, head_trains: bool) -> None:
    found = []
    for chunked in (True, False):
        p = problem()
        hidden, head = p["hidden"].requires_grad_(), p["head"].requires_grad_(head_trains)
        if chunked:
            options: dict[str, Any] = {"temperature": temperature, "ce_factor": 0.3, "chunk_tokens": chunk_tokens}
            total = chunked_loss(hidden, head, **arguments(p, losses), **options).total
        else:
            total = plain(p, temperature, 0.3, losses)
        (3 * total).backward()
        found.append((total, hidden.grad, head.grad))
    (total, of_hidden, of_head), (want, want_hidden, want_head) = found
    assert_near("loss", total, want, 1e-12)
    assert of_hidden is not None
    assert want_hidden is not None
    assert_near("gradient of hidden states", of_hidden, want_hidden, 1e-12)
    assert (of_head is None) == (not head_trains)
    if of_head is not None and want_head is not None:
        assert_near("gradient of the head", of_head, want_head, 1e-12)


def test_parts_are_plain_and_carry_no_gradient() -> None:
    p = problem()
    loss = chunked_loss(
        p["hidden"].requires_grad_(), p["head"], **arguments(p, "kl+ce"), temperature=2.0, ce_factor=0.3
    )
    logits = p["hidden"] @ p["head"].T
    entropies = F.cross_entropy(logits.detach(), p["targets"], reduction="none")
    assert float(loss.ce) == pytest.approx(float((p["ce_weights"] * entropies).sum()), rel=1e-12)
    assert float(loss.total.detach()) == pytest.approx(4 * float(loss.kl) + 0.3 * float(loss.ce), rel=1e-12)
    assert loss.total.requires_grad
    assert not loss.kl.requires_grad
    assert not loss.ce.requires_grad


def test_gradcheck() -> None:
    p = problem()

    def total(hidden: Tensor, head: Tensor) -> Tensor:
        return chunked_loss(hidden, head, **arguments(p, "kl+ce"), temperature=1.7, ce_factor=0.5, chunk_tokens=4).total

    assert torch.autograd.gradcheck(total, (p["hidden"].requires_grad_(), p["head"].requires_grad_()))


@torch.no_grad()
def test_the_temperature_of_the_reference_formula() -> None:
    """`token_kl` and the chunks agree; at a high temperature temperature² KL is half the variance of the difference."""
    student, teacher = draw(5, VOCAB).float(), draw(5, VOCAB, seed=1).float()
    identity = torch.eye(VOCAB)
    for temperature in (0.5, 1.0, 3.0):
        weights = torch.ones(5)
        loss = chunked_loss(
            student,
            identity,
            teacher_hidden=teacher,
            teacher_head=identity,
            kl_weights=weights,
            temperature=temperature,
        )
        assert float(loss.total.detach()) == pytest.approx(
            float(token_kl(student, teacher, temperature).sum()), rel=1e-5
        )
    hot = token_kl(student.double(), teacher.double(), 100.0)
    assert torch.allclose(hot, (student - teacher).double().var(dim=-1, correction=0) / 2, rtol=0.05)


def test_bf16_and_autocast() -> None:
    """Logits are products in bf16 as the plain path's; softmax, sums and the head's gradient in float32."""
    p = {name: t if t.dtype == torch.int64 else t.float() for name, t in problem().items()}
    results = []
    for autocast in (False, True):
        hidden, head = (p[name].clone().requires_grad_() for name in ("hidden", "head"))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = chunked_loss(hidden, head, **arguments(p, "kl+ce"), chunk_tokens=4)
        loss.total.backward()
        assert loss.total.dtype == torch.float32
        assert hidden.grad is not None
        assert head.grad is not None
        results.append((loss.total.detach(), hidden.grad, head.grad))
    for name, narrow, exact in zip(("loss", "hidden", "head"), results[1], results[0], strict=True):
        assert narrow.dtype == torch.float32
        assert_near(name, narrow, exact, 2 * TOLERANCE[torch.bfloat16])
    wide_logits = torch.full((2, 4), 30.0, dtype=torch.bfloat16)
    loss = chunked_loss(
        wide_logits, torch.eye(4, dtype=torch.bfloat16), targets=torch.tensor([0, 1]), ce_weights=torch.ones(2)
    )
    assert float(loss.total.detach()) == pytest.approx(2 * math.log(4), rel=1e-6)


def test_no_matrix_of_all_tokens_is_made() -> None:
    """The largest tensor alive in the pass is a chunk's; the plain formula's would be 8 times that."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else [out]:
                if isinstance(t, Tensor):
                    largest = max(largest, t.numel())
            return out

    tokens, vocab = 64, 500
    hidden = draw(tokens, 4).requires_grad_()
    with Watch():
        chunked_loss(
            hidden,
            draw(vocab, 4),
            teacher_hidden=draw(tokens, 4, seed=1),
            teacher_head=draw(vocab, 4, seed=1),
            kl_weights=torch.ones(tokens),
            chunk_tokens=8,
        ).total.backward()
    assert largest == 8 * 512, "500, filled up to a multiple of 64"


def test_what_is_refused() -> None:
    p = problem()
    with pytest.raises(ValueError, match="a part of them makes no loss"):
        chunked_loss(p["hidden"], p["head"])
    with pytest.raises(ValueError, match="pass teacher_hidden, teacher_head and kl_weights"):
        chunked_loss(p["hidden"], p["head"], teacher_hidden=p["teacher_hidden"], **arguments(p, "ce"))
    with pytest.raises(ValueError, match="chunk_tokens=0 must be 1 or more"):
        chunked_loss(p["hidden"], p["head"], **arguments(p, "ce"), chunk_tokens=0)


def test_objectives() -> None:
    assert Objective.reference() == Objective(all_tokens=True, reduction="sum")
    for wrong, message in (
        ({"reduction": "max"}, 'reduction "max" is not known; use "mean" or "sum"'),
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"ce_weight": -1.0}, "ce_weight=-1.0 is below 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Objective(**wrong)  # type: ignore[arg-type]
