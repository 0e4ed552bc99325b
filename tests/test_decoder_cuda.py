"""What of the fused decoder only a GPU shows: graphs, memory, the choice of a decoder, long replies."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator

import pytest
import torch

from mmmamba import decoder
from mmmamba.decoder import SWITCH, decoder_for
from mmmamba.generate import ModelInputs, SamplingParams, decode_one_token, prefill, stream
from mmmamba.model import MMMamba
from tests.helpers import PieceTokenizer, assert_same_state, random_model, tiny_raw

pytestmark = pytest.mark.cuda

GREEDY = SamplingParams(greedy=True, max_new_tokens=12)
SESSIONS = 1000
TOKENS = 4096
CLOSE = 1e-3


@pytest.fixture(autouse=True)
def fresh_choice(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    pytest.importorskip("triton")
    monkeypatch.delenv(SWITCH, raising=False)
    yield
    gc.collect()


def make(seed: int = 0, *, teacher: bool = False) -> MMMamba:
    return random_model(tiny_raw(teacher=teacher), seed=seed, dtype=torch.float32).cuda()


def reply(model: MMMamba, **options: object) -> tuple[list[str], str]:
    """Text of a reply, and why it ended."""
    state = model.new_state()
    pieces = PieceTokenizer([bytes([65 + i]) for i in range(44)])
    events = list(stream(model, pieces, ModelInputs(torch.tensor([[1, 2, 3]])), state, GREEDY, **options))  # type: ignore[arg-type]
    return [e.text for e in events], str(events[-1].finish_reason)


@pytest.mark.parametrize("teacher", [False, True])
def test_a_stream_is_that_of_the_plain_path(teacher: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(teacher=teacher)
    assert decoder_for(model) is not None
    fused = reply(model, stop_token_ids=[])
    monkeypatch.setenv(SWITCH, "plain")
    assert decoder_for(model) is None
    assert reply(model, stop_token_ids=[]) == fused
    stop = ord(fused[0][3]) - 65
    plain = reply(model, stop_token_ids=[stop])
    monkeypatch.delenv(SWITCH)
    assert reply(model, stop_token_ids=[stop]) == plain
    assert plain[1] == "stop"


def test_the_choice_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = make()
    with caplog.at_level(logging.INFO, logger=decoder.__name__):
        for _ in range(3):
            assert decoder_for(model) is decoder_for(model)
    assert [r.message for r in caplog.records] == ["decoder: fused kernels in a CUDA graph"]
    trained = make().requires_grad_(True)
    with caplog.at_level(logging.INFO, logger=decoder.__name__):
        assert decoder_for(trained) is None
    assert caplog.records[-1].message == "decoder: plain (the model trains)"
    with pytest.raises(ValueError, match="the model trains"):
        decoder_for(trained, "fused")


def test_other_weights_get_another_decoder() -> None:
    """Graphs survive that other models come and go, and a model that is moved."""
    first, second = make(0), make(1)
    before = reply(first, stop_token_ids=[])
    reply(second, stop_token_ids=[])
    del second
    gc.collect()
    torch.cuda.empty_cache()
    for seed in range(2, 5):
        reply(make(seed), stop_token_ids=[])
    assert reply(first, stop_token_ids=[]) == before
    held = decoder_for(first)
    first.cpu().cuda()
    assert decoder_for(first) is not held
    assert reply(first, stop_token_ids=[]) == before


def test_memory_does_not_grow_over_sessions() -> None:
    model = make()
    params = [
        SamplingParams(seed=1),
        SamplingParams(greedy=True),
        SamplingParams(top_k=5, repetition_penalty=1.2, seed=2),
    ]
    used = []
    for i in range(SESSIONS):
        state = model.new_state()
        logits = prefill(model, ModelInputs(torch.tensor([[i % 40, 3]], device="cuda")), state)
        fused = decoder_for(model)
        assert fused is not None
        session = fused.open([state], [params[i % 3]])
        session.begin(logits)
        session.advance()
        session.take()
        session.close()
        if i in (20, SESSIONS - 1):
            del state, logits, session
            gc.collect()
            torch.cuda.synchronize()
            used.append(torch.cuda.memory_allocated())
    assert used[0] == used[1]


def test_a_long_reply_stays_near_the_plain_path() -> None:
    """Logits of 4,096 tokens, the same tokens given to both; the plain path reads them in one piece."""
    raw = tiny_raw(embedding={"layers_block_type": ["mamba2"] * 3}, language={"layers_block_type": ["mamba2"] * 2})
    model = random_model(raw, dtype=torch.float32).cuda()
    ids = torch.randint(0, 40, (1, TOKENS), generator=torch.Generator().manual_seed(0)).cuda()
    fused, want = model.new_state(), model.new_state()
    with torch.inference_mode():
        expected = model(ids, None, want)[0]
    logits = torch.stack([decode_one_token(model, ids[:, i], fused)[0] for i in range(TOKENS)])
    assert (logits - expected).norm() / expected.norm() <= CLOSE
    assert_same_state(fused, want, CLOSE)
