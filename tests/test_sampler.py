"""Drawing from the base model: the same tokens as transformers' `generate`, whichever row is where."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from distill import sample_text
from distill.sampler import Drawn, Sampler, Sampling, Script, draw_tokens
from mmmamba.tokenizer import load_tokenizer

END, START = 2, 1
SCRIPT = Script(
    prompts=[[START, 7, 8], [START, 7, 8, 11], [START, 7, 8, 12, 13, 14, 15], [START, 7, 8, 16, 17]],
    reply=[9, START, 10, 9],
    end=END,
    max_question_tokens=24,
    max_answer_tokens=20,
)
GREEDY = Sampling(top_p=1e-9)


def tiny_llama(vocab_size: int = 48, seed: int = 0) -> Any:
    """Grouped heads as in the base, and weights so large that its text wanders and sometimes ends."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=36,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        initializer_range=0.4,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


def sampler_of(script: Script, rows: int, *, seed: int = 0, sampling: Sampling | None = None) -> Sampler:
    return Sampler(tiny_llama(), script, rows, torch.Generator().manual_seed(seed), sampling=sampling)


def finished(sampler: Sampler, steps: int) -> list[Drawn]:
    return [drawn for batch in itertools.islice(sampler.stream(chunk=10), steps // 10) for drawn in batch]


def generated(base: Any, tokens: list[int], max_new_tokens: int) -> list[int]:
    return base.generate(
        input_ids=torch.tensor([tokens]), attention_mask=torch.ones(1, len(tokens), dtype=torch.int64),
        max_new_tokens=max_new_tokens, do_sample=False, repetition_penalty=1.05, pad_token_id=END, eos_token_id=END,
    )[0].tolist()  # fmt: skip


def test_greedy_rows_are_what_generate_writes() -> None:
    base, prompts = tiny_llama(), [list(p) for p in SCRIPT.prompts]
    expected = []
    for prompt in prompts:
        tokens = generated(base, prompt, SCRIPT.max_question_tokens)
        if tokens[-1] == END:
            tokens = generated(base, [*tokens, *SCRIPT.reply], SCRIPT.max_answer_tokens)
        expected.append(tokens)
    ended = [tokens.count(END) for tokens in expected]
    assert {0, 1, 2} == set(ended), f"the random model ends too much alike to test all cases: {ended}"

    drawn = [d.tokens for d in finished(sampler_of(SCRIPT, 3, sampling=GREEDY), 600)]
    assert all(drawn.count(tokens) >= 3 for tokens in expected), "each in several rows, after different others"
    assert all(tokens in expected for tokens in drawn)


def test_a_drawn_conversation_keeps_to_its_script() -> None:
    sampler = sampler_of(SCRIPT, 16)
    drawn = finished(sampler, 400)
    prompts = [list(p) for p in SCRIPT.prompts]
    seen = set()
    for conversation in drawn:
        tokens = conversation.tokens
        # The longest prompt that fits: one may begin another.
        prompt = max((p for p in prompts if tokens[: len(p)] == p), key=len)
        if END not in tokens:
            assert len(tokens) - len(prompts[0]) >= SCRIPT.max_question_tokens
            seen.add("given up")
            continue
        ended = tokens.index(END)
        assert ended - len(prompt) < SCRIPT.max_question_tokens
        assert tokens[ended + 1 :][: len(SCRIPT.reply)] == SCRIPT.reply
        answer = tokens[ended + 1 + len(SCRIPT.reply) :]
        assert END not in answer[:-1], "a row ends with its first end token"
        assert len(answer) == SCRIPT.max_answer_tokens or answer[-1] == END
        seen.add("ended" if answer[-1] == END else "cut")
    assert seen == {"given up", "ended", "cut"}
    # No step of a row is lost between conversations: all but the unfinished ones lie in the steps that were read.
    total = sum(len(d.tokens) - 1 for d in drawn)
    assert 16 * sampler.steps - 16 * SCRIPT.max_tokens < total <= 16 * sampler.steps
    assert sampler.oldest > sampler.steps - SCRIPT.max_tokens


def test_prompts_come_equally_often() -> None:
    script = Script([[START, 7], [START, 8], [START, 9]], [9], END, max_question_tokens=2, max_answer_tokens=1)
    first = torch.tensor([d.tokens[1] for d in finished(sampler_of(script, 64), 300)])
    assert len(first) > 4000
    shares = first.bincount(minlength=10)[7:10] / len(first)
    torch.testing.assert_close(shares, torch.full((3,), 1 / 3), atol=0.03, rtol=0)


@pytest.mark.parametrize("top_k", [5, 256])
def test_tokens_are_drawn_as_transformers_does(top_k: int) -> None:
    """Exactly: every token for the share of [0, 1) that the processors of `generate` give it."""
    sampling = Sampling(temperature=0.8, top_p=0.9, top_k=top_k, repetition_penalty=1.3)
    logits = 3 * torch.randn(1, 60, generator=torch.Generator().manual_seed(0))
    history = logits.topk(4).indices[:, [0, 2, 3, 2]]  # what was likely, one of it twice
    scores = RepetitionPenaltyLogitsProcessor(1.3)(history, logits)
    for process in (TemperatureLogitsWarper(0.8), TopKLogitsWarper(top_k), TopPLogitsWarper(0.9)):
        scores = process(history, scores)
    expected = scores.softmax(-1)[0]
    assert 2 <= (expected > 0).sum() <= min(top_k, 40), "cut by top_k, or by top_p"

    before, steps = logits.clone(), 20_000
    uniform = (torch.arange(steps) + 0.5) / steps
    drawn = draw_tokens(logits.expand(steps, -1), history.expand(steps, -1), uniform, sampling)
    assert torch.equal(logits, before)
    torch.testing.assert_close(drawn.bincount(minlength=60) / steps, expected, atol=2 / steps, rtol=0)


def test_uniform_numbers_at_the_borders_draw_the_first_and_the_last_kept_token() -> None:
    logits = torch.tensor([[0.0, 1.0, 3.0, 2.0]]).expand(2, -1)
    uniform = torch.tensor([0.0, 1 - 2**-24])
    kept = Sampling(temperature=1.0, top_p=0.8, repetition_penalty=1.0)  # 0.64 + 0.24 reach it
    assert draw_tokens(logits, torch.zeros(2, 1, dtype=torch.int64), uniform, kept).tolist() == [2, 3]


def test_a_capture_that_fails_is_told_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def refusing(graph: object) -> Iterator[None]:
        yield
        raise RuntimeError("operation not permitted when stream is capturing")

    for name in ("CUDAGraph", "Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "graph", refusing)
    expected = {tuple(d.tokens) for d in finished(sampler_of(SCRIPT, 3, sampling=GREEDY), 300)}
    sampler = sampler_of(SCRIPT, 3, sampling=GREEDY)
    with torch.inference_mode():
        with pytest.warns(UserWarning, match="without a CUDA graph.*not permitted"):
            assert sampler._capture() is None
        sampler._begin()
    assert {tuple(d.tokens) for d in finished(sampler, 300)} == expected


@pytest.mark.cuda
def test_a_captured_step_draws_what_launched_ones_do() -> None:
    base, found = tiny_llama().cuda(), []
    for graph in (True, False):
        sampler = Sampler(base, SCRIPT, 8, torch.Generator("cuda").manual_seed(0), sampling=GREEDY, graph=graph)
        assert (sampler._graph is not None) == graph
        found.append({tuple(d.tokens) for d in finished(sampler, 300)})
    assert found[0] == found[1]
    assert found[0] == {tuple(d.tokens) for d in finished(sampler_of(SCRIPT, 3, sampling=GREEDY), 600)}, "as on the CPU"


def test_what_cannot_be_drawn_from_is_refused() -> None:
    with pytest.raises(ValueError, match="same token"):
        sampler_of(Script([[1, 3], [4, 5]], [9], END), 2)
    base = tiny_llama()
    base.config.attention_bias = True
    with pytest.raises(ValueError, match="without biases"):
        Sampler(base, SCRIPT, 2, torch.Generator())


@pytest.fixture
def drawing(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """`python -m distill.sample_text` with a tiny base; returns what the file then holds."""
    monkeypatch.setattr(sample_text, "load_base", lambda source, dtype: tiny_llama(vocab_size=160).to(dtype))
    path = tmp_path / "drawn.jsonl"

    def run(count: int, *more: str) -> list[str]:
        words = f"{path} --count {count} --batch 16 --device cpu --max-answer-tokens 10 --tokenizer {tiny_dir}"
        sample_text.main([*words.split(), *more])
        return path.read_text(encoding="utf-8").splitlines()

    return run


def questions_of(lines: list[str]) -> list[str]:
    return [json.loads(line)["messages"][0]["content"] for line in lines]


def test_a_run_that_goes_on_repeats_nothing(drawing: Any, tmp_path: Path) -> None:
    first = drawing(10)
    assert len(first) >= 10
    for line in first:
        user, assistant = json.loads(line)["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert user["content"]
        assert assistant["content"]
    assert drawing(10) == first, "it was complete"
    with (tmp_path / "drawn.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"messages": [{"role": "us')  # stopped within a line
    more = drawing(2 * len(first))
    assert more[: len(first)] == first
    assert len(more) >= 2 * len(first)
    assert len(set(questions_of(more))) == len(more)


def test_a_run_that_goes_on_draws_from_other_numbers() -> None:
    cpu = torch.device("cpu")
    numbers = [
        tuple(torch.rand(4, generator=sample_text.generator_for(seed, written, cpu)).tolist())
        for seed, written in ((0, 0), (0, 10), (1, 0), (1, 10))
    ]
    assert len(set(numbers)) == 4
    again = torch.rand(4, generator=sample_text.generator_for(1, 10, cpu))
    assert tuple(again.tolist()) == numbers[-1]


def test_messages_are_cut_out_of_the_tokens(tiny_dir: Path) -> None:
    tokenizer = load_tokenizer(tiny_dir)
    script = sample_text.script_of(tokenizer, 20)
    prompt = sample_text.encode_prompt(tokenizer, "What is")

    def messages(question: str, answer: str, *end: int) -> Any:
        tokens = [*prompt, *tokenizer.encode(question), script.end, *script.reply, *tokenizer.encode(answer), *end]
        return sample_text.to_messages(tokenizer, script, tokens)

    expected = [{"role": "user", "content": "What is blue?"}, {"role": "assistant", "content": "The sky."}]
    assert messages(" blue?", "The sky.", script.end) == expected
    assert messages(" blue?", "The sky.") == expected, "an answer cut short stays"
    assert messages(" blue?", " ", script.end) is None
    assert sample_text.to_messages(tokenizer, script, [*prompt, *tokenizer.encode(" blue?")]) is None
