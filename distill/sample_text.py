"""Conversations drawn from the base model itself, to keep its ability to chat: `python -m distill.sample_text OUT`.

The model is given the opening of a user's turn and writes both sides (the idea of Magpie, arXiv:2406.08464), or then
answers. One JSON object a line: {"messages": [{"role", "content"}, ...]}. Appends, so a stopped run can go on.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch

from distill.base import HUB_ID, load_base
from mmmamba.tokenizer import Tokenizer, load_tokenizer

USER, ASSISTANT, END = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>"
# Beginnings that steer the drawn questions over what people ask a small assistant.
OPENERS = (
    "", "", "What is", "Who was", "Why do", "How can I", "Can you", "Tell me about", "Explain", "Write a short",
    "Give me", "What are the", "Hello", "Hi,", "Where is", "When did", "Is it", "Please", "I want to", "List three",
    "Translate", "Summarize", "What's your", "How does", "Which", "Do you", "Write a poem about", "Describe", "Help me",
)  # fmt: skip


def encode_prompt(tokenizer: Tokenizer, opener: str) -> list[int]:
    """The beginning of a user's turn, left open for the model to finish."""
    return [tokenizer.token_id("<|im_start|>"), *tokenizer.encode("user\n" + opener)]


@torch.inference_mode()
def draw(base: Any, ids: torch.Tensor, mask: torch.Tensor, end: int, max_new_tokens: int, seed: int) -> torch.Tensor:
    """Sample continuations of left-padded prompts (batch, n)."""
    torch.manual_seed(seed)
    return base.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=True, temperature=0.8, top_p=0.9,
        repetition_penalty=1.05, pad_token_id=end, eos_token_id=end,
    )[:, ids.shape[1] :]  # fmt: skip


def pad_left(rows: list[list[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(r)) + r for r in rows], device=device)
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=device)
    return ids, mask


def until_end(tokenizer: Tokenizer, row: list[int], end: int) -> str:
    """Text up to the end token, or all of it: an answer cut short serves to match distributions as well."""
    return tokenizer.decode(row[: row.index(end)] if end in row else row).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--base", default=HUB_ID, help="hub id, directory or .gguf file")
    parser.add_argument("--tokenizer", type=Path, required=True, help="directory with nano's tokenizer.json")
    parser.add_argument("--count", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--max-answer-tokens", type=int, default=160)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    base = load_base(args.base, torch.bfloat16).to(args.device).eval()
    tokenizer = load_tokenizer(args.tokenizer)
    end = tokenizer.token_id(END)
    rng = random.Random(args.seed)
    opening = [tokenizer.token_id("<|im_start|>"), *tokenizer.encode("assistant\n")]
    newline = tokenizer.encode("\n")
    written = 0
    while written < args.count:
        openers = [rng.choice(OPENERS) for _ in range(args.batch)]
        prompts = [encode_prompt(tokenizer, o) for o in openers]
        ids, mask = pad_left(prompts, end, torch.device(args.device))
        drawn = draw(base, ids, mask, end, 64, rng.randrange(2**31)).tolist()
        rows = [
            (prompt + row[: row.index(end) + 1] + newline, (o + tokenizer.decode(row[: row.index(end)])).strip())
            for prompt, row, o in zip(prompts, drawn, openers, strict=True)
            if end in row
        ]
        ids, mask = pad_left([row + opening for row, _ in rows], end, torch.device(args.device))
        drawn = draw(base, ids, mask, end, args.max_answer_tokens, rng.randrange(2**31)).tolist()
        with args.out.open("a", encoding="utf-8") as out:
            for (_, question), row in zip(rows, drawn, strict=True):
                answer = until_end(tokenizer, row, end)
                if question and answer:
                    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                    out.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
                    written += 1
        print(f"{written} of {args.count}", flush=True)


if __name__ == "__main__":
    main()
