"""Sampling against brute force: every cut of the distribution, penalties, seeds, and values out of range."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmmamba.generate import SamplingParams, sample

DRAWS = 40_000
LOGITS = torch.tensor([[2.0, 1.5, 1.5, 0.5, 0.0, -0.5, -1.0, -3.0]])
PLAIN = SamplingParams(temperature=1.0, top_p=1.0)


def brute_force(logits: list[float], params: SamplingParams, history: list[int] | None = None) -> list[float]:
    """The distribution written out: penalty, temperature, the k largest, min_p, the smallest set that holds top_p."""
    values = list(logits)
    for i in set(history or []):
        values[i] = values[i] / params.repetition_penalty if values[i] > 0 else values[i] * params.repetition_penalty
    weights = [math.exp(v / params.temperature) for v in values]
    if params.top_k:
        kth = sorted(weights, reverse=True)[min(params.top_k, len(weights)) - 1]
        weights = [w if w >= kth else 0.0 for w in weights]
    weights = [w if w >= params.min_p * max(weights) else 0.0 for w in weights]
    kept, total = 0.0, sum(weights)
    for i in sorted(range(len(weights)), key=lambda i: -weights[i]):
        if kept >= params.top_p * total:
            weights[i] = 0.0
        kept += weights[i]
    return [w / sum(weights) for w in weights]


def frequencies(params: SamplingParams, history: list[int] | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    rows = LOGITS.expand(DRAWS, -1)
    seen = None if history is None else torch.tensor([history]).expand(DRAWS, -1)
    tokens = sample(rows, params, generator=generator, history=seen)
    assert tokens.shape == (DRAWS,)
    assert tokens.dtype == torch.int64
    return torch.bincount(tokens, minlength=LOGITS.shape[1]) / DRAWS


@pytest.mark.parametrize(
    ("params", "history"),
    [
        (PLAIN, None),
        (replace(PLAIN, temperature=0.3), None),
        (replace(PLAIN, temperature=3.0), None),
        (replace(PLAIN, top_k=1), None),
        (replace(PLAIN, top_k=4), None),
        (replace(PLAIN, top_k=100), None),
        (replace(PLAIN, top_k=2), None),  # the second and the third are equal: both stay
        (replace(PLAIN, top_p=0.5), None),
        (replace(PLAIN, top_p=0.9), None),
        (replace(PLAIN, top_p=1e-6), None),  # the most likely one always stays
        (replace(PLAIN, min_p=0.2), None),
        (replace(PLAIN, min_p=0.999), None),
        (replace(PLAIN, repetition_penalty=1.7), [0, 7, 0]),
        (replace(PLAIN, repetition_penalty=0.5), [3, 6]),
        (replace(PLAIN, repetition_penalty=1.7), []),
        (SamplingParams(temperature=0.8, top_k=5, min_p=0.1, top_p=0.85, repetition_penalty=1.3), [0, 1]),
        (SamplingParams(), None),
    ],
)
def test_distributions_equal_brute_force(params: SamplingParams, history: list[int] | None) -> None:
    wanted = brute_force(LOGITS[0].tolist(), params, history)
    found = frequencies(params, history).tolist()
    for token, (p, frequency) in enumerate(zip(wanted, found, strict=True)):
        if p == 0 or p * DRAWS > 30:
            assert (frequency > 0) == (p > 0), f"token {token} drawn with {frequency}, its probability is {p}"
        assert abs(frequency - p) <= 5 * math.sqrt(p * (1 - p) / DRAWS), f"token {token}: {frequency} for {p}"


def test_sampling_leaves_the_logits_alone() -> None:
    before = LOGITS.clone()
    sample(LOGITS, SamplingParams(top_k=3, min_p=0.1, repetition_penalty=2.0), history=torch.tensor([[0, 1]]))
    assert torch.equal(LOGITS, before)


@pytest.mark.parametrize("params", [SamplingParams(greedy=True, temperature=5.0), SamplingParams(temperature=0.0)])
def test_greedy_ignores_seed_and_generator(params: SamplingParams) -> None:
    assert params.is_greedy
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    tokens = sample(logits, params, generator=generator)
    assert torch.equal(tokens, logits.argmax(dim=-1))
    assert torch.equal(generator.get_state(), before)
    # What cuts a distribution cannot change its largest value; the penalty can.
    cut = replace(params, top_k=1, top_p=0.1, min_p=0.9)
    assert torch.equal(sample(logits, cut), tokens)
    penalised = sample(logits.abs(), replace(params, repetition_penalty=10.0), history=logits.abs().argmax(-1)[:, None])
    assert not (penalised == logits.abs().argmax(dim=-1)).any()


def test_rows_are_drawn_apart_and_a_seed_repeats() -> None:
    rows = LOGITS.expand(200, -1)
    one, two = (sample(rows, PLAIN, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(one, two)
    assert len(set(one.tolist())) > 4
    assert not torch.equal(one, sample(rows, PLAIN, generator=torch.Generator().manual_seed(8)))


def test_narrow_logits_are_sampled_in_float32() -> None:
    """A sum of 50,000 equal probabilities in bf16 would be far from 1, and top_p would keep the wrong tokens."""
    logits = torch.zeros(1, 50_000, dtype=torch.bfloat16)
    logits[0, 123] = 13.0
    drawn = {int(sample(logits, SamplingParams(temperature=1.0, top_p=0.5))) for _ in range(20)}
    assert drawn == {123}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"temperature": -0.1}, r"temperature=-0.1 is out of range; use 0 to 10 \(0 is greedy\)"),
        ({"temperature": float("nan")}, "temperature=nan is out of range"),
        ({"temperature": 11}, "temperature=11 is out of range"),
        ({"top_p": 0.0}, "top_p=0.0 is out of range; use above 0, up to 1"),
        ({"top_p": 1.1}, "top_p=1.1 is out of range"),
        ({"top_k": -1}, r"top_k=-1 is out of range; use 0 \(off\) or more"),
        ({"min_p": 1.0}, "min_p=1.0 is out of range"),
        ({"min_p": -0.5}, "min_p=-0.5 is out of range"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 is out of range; use 0.1 to 10"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 is out of range; use 1 or more"),
    ],
)
def test_bad_parameters(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**bad)
