"""How the next token is drawn from logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is drawn. `top_k` 0, `top_p` 1 and `min_p` 0 are off; `greedy` ignores all but the penalty.

    Raises: ValueError naming the value that is out of range.
    """

    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 256
    seed: int | None = None
    greedy: bool = False

    def __post_init__(self) -> None:
        for name, ok, fits in (
            ("temperature", 0 <= self.temperature <= 10, "0 to 10 (0 is greedy)"),
            ("top_p", 0 < self.top_p <= 1, "above 0, up to 1"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("min_p", 0 <= self.min_p < 1, "0 up to, not including, 1"),
            ("repetition_penalty", 0.1 <= self.repetition_penalty <= 10, "0.1 to 10"),
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
        ):
            if not ok:
                raise ValueError(f"{name}={getattr(self, name)} is out of range; use {fits}")

    @property
    def is_greedy(self) -> bool:
        return self.greedy or self.temperature == 0


def sample(
    logits: Tensor,
    params: SamplingParams,
    *,
    generator: torch.Generator | None = None,
    history: Tensor | None = None,
) -> Tensor:
    """Draw one token a row.

    Args:
        logits: (batch, vocab_size), any float dtype; not changed.
        generator: source of randomness, on the device of `logits`; greedy sampling does not touch it.
        history: (batch, n) int64, tokens that `repetition_penalty` applies to (Keskar et al., arXiv:1909.05858).
    Returns: (batch,) int64.
    """
    logits = logits.float()
    if params.repetition_penalty != 1.0 and history is not None and history.numel():
        seen = logits.gather(1, history)
        penalised = torch.where(seen > 0, seen / params.repetition_penalty, seen * params.repetition_penalty)
        logits = logits.scatter(1, history, penalised)
    if params.is_greedy:
        return logits.argmax(dim=-1)
    logits = logits / params.temperature
    if 0 < params.top_k < logits.shape[-1]:
        kth = logits.topk(params.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if params.min_p > 0:
        floor = logits.max(dim=-1, keepdim=True).values + torch.log(torch.tensor(params.min_p))
        logits = logits.masked_fill(logits < floor, float("-inf"))
    if params.top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True)
        probs = ordered.softmax(dim=-1)
        # Drop a token when those before it hold top_p already: the most likely one always stays.
        drop = probs.cumsum(dim=-1) - probs >= params.top_p
        logits = logits.masked_fill(drop.scatter(1, index, drop), float("-inf"))
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(1)
