"""Figures from moments: arithmetic that can be checked by hand."""

from __future__ import annotations

import pytest

from app.metrics import Agreement, Trace, agreement, figures, smooth


def test_figures_follow_the_moments() -> None:
    trace = Trace(10.0, (10.5, 10.6, 10.7, 11.2), 30, 64, 5, 7, 11)
    f = figures(trace)
    assert f.ttft_ms == pytest.approx(500)
    assert f.ms_per_token == pytest.approx(100), "the median, which one slow token does not move"
    assert f.tok_per_sec == pytest.approx(3 / 0.7)
    assert (f.num_tokens, f.context, f.recurrent_bytes, f.cache_bytes, f.peak_bytes) == (4, 94, 5, 7, 11)


def test_too_few_tokens_tell_nothing() -> None:
    assert figures(Trace(1.0)).ttft_ms is None
    one = figures(Trace(1.0, (1.5,)))
    assert (one.ttft_ms, one.ms_per_token, one.tok_per_sec) == (500, None, None)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("Three red circles.", "three red circles", Agreement(1.0, 3)),
        ("There are three circles.", "There are two circles.", Agreement(0.75, 2)),
        ("Yes.", "No.", Agreement(0.0, 0)),
        ("", "", Agreement(1.0, 0)),
        ("A blue square", "", Agreement(0.0, 0)),
    ],
)
def test_agreement_of_two_answers(a: str, b: str, expected: Agreement) -> None:
    assert agreement(a, b) == expected


def test_agreement_in_words() -> None:
    assert str(Agreement(1.0, 3)) == "The answers are equal."
    assert str(Agreement(0.75, 2)) == "75% of the words agree; the first 2 words are equal."
    assert "different from the first word" in str(Agreement(0.0, 0))


def test_smoothing_drops_single_spikes() -> None:
    assert smooth([5, 5, 90, 5, 5]) == [5, 5, 5, 5, 5]
    assert smooth([60, 20, 20, 21, 20, 20, 20])[0] == 20, "the first token after a pause"
    assert smooth([5, 5, 5, 5, 5, 9, 9, 9, 9, 9]) == [5, 5, 5, 5, 5, 9, 9, 9, 9, 9], "what lasts is no spike"
    assert smooth([]) == []
