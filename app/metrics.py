"""Figures of an answer from the moments at which its tokens were there. Pure: no clock, no model."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from statistics import median


@dataclass(frozen=True)
class Trace:
    """What was observed of one answer. `token_s` are the moments (seconds on one clock) at which each token was there;
    `started_s` that at which work on the message began. Bytes are those of the state at the end."""

    started_s: float
    token_s: tuple[float, ...] = ()
    text_tokens: int = 0
    image_tokens: int = 0
    recurrent_bytes: int = 0
    cache_bytes: int = 0
    peak_bytes: int = 0


@dataclass(frozen=True)
class Figures:
    """What a person compares. None where there are too few tokens to tell.

    `ms_per_token` is the median gap between two tokens, `tok_per_sec` their number over their time; both leave the
    first one out, which `ttft_ms` has. `peak_bytes` is the memory that answering took at most, above what was there.
    """

    ttft_ms: float | None
    ms_per_token: float | None
    tok_per_sec: float | None
    num_tokens: int
    text_tokens: int
    image_tokens: int
    recurrent_bytes: int
    cache_bytes: int
    peak_bytes: int

    @property
    def context(self) -> int:
        return self.text_tokens + self.image_tokens


def figures(trace: Trace) -> Figures:
    times = trace.token_s
    gaps = [b - a for a, b in itertools.pairwise(times)]
    lasted = times[-1] - times[0] if len(times) > 1 else 0.0
    return Figures(
        ttft_ms=1e3 * (times[0] - trace.started_s) if times else None,
        ms_per_token=1e3 * median(gaps) if gaps else None,
        tok_per_sec=len(gaps) / lasted if lasted > 0 else None,
        num_tokens=len(times),
        text_tokens=trace.text_tokens,
        image_tokens=trace.image_tokens,
        recurrent_bytes=trace.recurrent_bytes,
        cache_bytes=trace.cache_bytes,
        peak_bytes=trace.peak_bytes,
    )


@dataclass(frozen=True)
class Agreement:
    """How far two answers say the same. `share` of their words is common in order; `same_words` are equal from the
    start on."""

    share: float
    same_words: int

    def __str__(self) -> str:
        if self.share == 1:
            return "The answers are equal."
        start = {0: "different from the first word", 1: "the first word is equal"}
        begin = start.get(self.same_words, f"the first {self.same_words} words are equal")
        return f"{self.share:.0%} of the words agree; {begin}."


def agreement(first: str, second: str) -> Agreement:
    """Of two texts, by words without regard to case or punctuation at their ends."""
    a, b = _words(first), _words(second)
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    if not a and not b:
        return Agreement(1.0, 0)
    matched = sum(block.size for block in SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks())
    return Agreement(2 * matched / (len(a) + len(b)), same)


def _words(text: str) -> list[str]:
    return [word for raw in text.lower().split() if (word := raw.strip(".,;:!?\"'()*`"))]


def smooth(values: Sequence[float], width: int = 5) -> list[float]:
    """Running median over `width` neighbours, at the ends too: single slow moments of the machine, such as that of the
    first token after a pause, do not make spikes."""
    last = max(0, len(values) - width)
    starts = (min(max(0, i - width // 2), last) for i in range(len(values)))
    return [median(values[start : start + width]) for start in starts]
