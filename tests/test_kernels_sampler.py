"""The sampler's kernels against `sampling.sample`; see test_kernels_decode.py for how to run them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmmamba.sampling import SamplingParams, sample
from tests.interpreter import INTERPRETED, require_triton

DEVICE = require_triton()

from mmmamba.kernels.launch import overlaps_launches  # noqa: E402
from mmmamba.kernels.sampler import DrawKind, Draws, draw_tokens  # noqa: E402

PDL = (False, True) if overlaps_launches(DEVICE) else (False,)

VOCAB = 2500  # more than two blocks, the last one not full


def logits_of(rows: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return (3 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))).to(dtype)


def fresh(rows: int, params: SamplingParams, *, seeds: int = 0, banned: tuple[int, ...] = ()) -> Draws:
    draws = Draws.allocate(rows, VOCAB, DEVICE)
    temperature = 0.0 if params.is_greedy else params.temperature
    numbers = torch.tensor([temperature, params.top_p, params.min_p, params.repetition_penalty])
    draws.numbers.copy_(numbers.expand(rows, 4))
    draws.top_k.fill_(params.top_k)
    draws.seed.copy_(torch.arange(seeds, seeds + rows))
    draws.alive.fill_(1)
    draws.banned[list(banned)] = 1
    for t in (draws.best, draws.best_drawn, draws.sums, draws.mass):
        t.fill_(float("nan"))
    return draws


def kind_of(params: SamplingParams) -> DrawKind:
    return DrawKind(params.is_greedy, params.repetition_penalty != 1, params.top_k > 0, params.top_p < 1)


@pytest.mark.parametrize("pdl", PDL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("penalty", [1.0, 1.7, 0.5])
def test_greedy(dtype: torch.dtype, penalty: float, pdl: bool) -> None:
    rows = 3
    params = SamplingParams(greedy=True, repetition_penalty=penalty)
    logits = logits_of(rows, dtype)
    history = logits.float().topk(4).indices
    banned = (int(history[0, 1]), VOCAB - 1)
    draws = fresh(rows, params, banned=banned)
    draws.seen.scatter_(1, history.to(DEVICE), 1)
    draw_tokens(logits.to(DEVICE), draws, kind_of(params), pdl=pdl)
    allowed = logits.float().clone()
    allowed[:, list(banned)] = float("-inf")
    assert torch.equal(draws.token.cpu(), sample(allowed, params, history=history))


def kept(logits: Tensor, params: SamplingParams) -> Tensor:
    """Tokens that `sample` may draw: those that have a probability left after its filters."""
    seen: list[Tensor] = []
    original = torch.multinomial
    torch.multinomial = lambda p, *a, **k: (seen.append(p), original(p, *a, **k))[1]  # type: ignore[assignment]
    try:
        sample(logits, params)
    finally:
        torch.multinomial = original  # type: ignore[assignment]
    return seen[0]


FILTERS: tuple[dict[str, Any], ...] = (
    {"top_p": 1.0},
    {"top_p": 0.8},
    {"top_k": 7, "top_p": 1.0},
    {"top_k": 40, "top_p": 0.7},
    {"min_p": 0.1, "top_p": 1.0},
    {"min_p": 0.02, "top_p": 0.9, "top_k": 100},
    {"top_k": 1, "top_p": 0.5},
    {"top_p": 0.001},
    {"top_k": 5000, "top_p": 1.0},
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_draws_follow_the_filtered_softmax(dtype: torch.dtype, filters: dict[str, Any]) -> None:
    """Nothing outside the filters is drawn, and what is drawn has the right frequencies."""
    params = SamplingParams(temperature=1.3, **filters)
    rows = 24 if INTERPRETED else 1024
    # Distinct logits: at equal ones a sort keeps an arbitrary part of those at the edge.
    ranks = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(1))
    logits = (3.0 - ranks.float() / 16).to(torch.bfloat16).to(dtype)
    logits[ranks > 150] = -30.0
    probabilities = kept(logits[None].float(), params)[0].double()
    draws = fresh(rows, params)
    counts = torch.zeros(VOCAB, dtype=torch.float64)
    for _ in range(3):
        draw_tokens(logits.expand(rows, VOCAB).contiguous().to(DEVICE), draws, kind_of(params))
        counts += torch.bincount(draws.token.cpu(), minlength=VOCAB)
    allowed = probabilities > 1e-12
    assert counts[~allowed].sum() == 0, "a token that the filters drop was drawn"
    drawn = counts.sum()
    order = probabilities.argsort(descending=True)
    # Kolmogorov's distance; 1.95 / sqrt(n) is passed by chance once in a thousand.
    distance = (counts[order].cumsum(0) / drawn - probabilities[order].cumsum(0)).abs().max()
    assert distance <= 1.95 / drawn**0.5, f"distance {distance:.3f} after {int(drawn)} draws"


def test_a_draw_depends_on_seed_count_and_row_alone() -> None:
    params = SamplingParams(temperature=1.0, top_p=0.95)
    logits = logits_of(4, torch.bfloat16).to(DEVICE)
    together = fresh(4, params)
    said = []
    for _ in range(3):
        draw_tokens(logits, together, kind_of(params))
        said.append(together.token.clone())
    assert len({tuple(t.tolist()) for t in said}) > 1, "the count moves the draw"
    for row in range(4):
        alone = fresh(1, params, seeds=row)
        for t in said:
            draw_tokens(logits[row : row + 1], alone, kind_of(params))
            assert alone.token[0] == t[row]


def test_stop_tokens_end_a_row_and_counters_move() -> None:
    params = SamplingParams(greedy=True)
    logits = logits_of(3, torch.bfloat16).to(DEVICE)
    best = logits.float().argmax(dim=1)
    draws = fresh(3, params)
    draws.stops[5] = best[1]
    draws.alive[2] = 0
    draws.seqlens.copy_(torch.tensor([[5, 6, 7], [8, 9, 10]]))
    draw_tokens(logits, draws, kind_of(params))
    assert draws.alive.tolist() == [1, 0, 0]
    assert draws.token.tolist() == [int(best[0]), int(best[1]), 0], "a dead row keeps what it had"
    assert draws.count.tolist() == [1, 1, 0]
    assert draws.seqlens.tolist() == [[6, 7, 7], [9, 10, 10]]
    assert [row.nonzero().flatten().tolist() for row in draws.seen] == [[int(best[0])], [int(best[1])], []]
    draw_tokens(logits, draws, kind_of(params), fed=False)
    assert draws.seqlens.tolist() == [[6, 7, 7], [9, 10, 10]]
    assert draws.count.tolist() == [2, 1, 0]


def test_logits_of_nan_give_an_id_inside_the_vocabulary() -> None:
    draws = fresh(1, SamplingParams())
    draw_tokens(torch.full((1, VOCAB), float("nan"), device=DEVICE), draws, DrawKind(False, False, False, True))
    assert 0 <= int(draws.token) < VOCAB
