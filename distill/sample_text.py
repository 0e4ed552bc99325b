"""Conversations drawn from the base model itself, to keep its ability to chat: `python -m distill.sample_text OUT`.

The model is given the opening of a user's turn and writes both sides (the idea of Magpie, arXiv:2406.08464). One JSON
object a line: {"messages": [{"role", "content"}, ...]}, no two with the same first message. Appends: a stopped run goes
on where it was, and draws what it has not drawn before. On several GPUs, each run has a file and a seed of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from distill.base import HUB_ID, load_base
from distill.sampler import Sampler, Script
from mmmamba.tokenizer import Tokenizer, load_tokenizer

END = "<|im_end|>"
# Beginnings that steer the drawn questions over what people ask a small assistant.
OPENERS = (
    "", "", "What is", "Who was", "Why do", "How can I", "Can you", "Tell me about", "Explain", "Write a short",
    "Give me", "What are the", "Hello", "Hi,", "Where is", "When did", "Is it", "Please", "I want to", "List three",
    "Translate", "Summarize", "What's your", "How does", "Which", "Do you", "Write a poem about", "Describe", "Help me",
)  # fmt: skip


def encode_prompt(tokenizer: Tokenizer, opener: str) -> list[int]:
    """The beginning of a user's turn, left open for the model to finish."""
    return [tokenizer.token_id("<|im_start|>"), *tokenizer.encode("user\n" + opener)]


def script_of(tokenizer: Tokenizer, max_answer_tokens: int) -> Script:
    """The script of a conversation: every opener in a user's turn, then the template up to the answer."""
    reply = [*tokenizer.encode("\n"), tokenizer.token_id("<|im_start|>"), *tokenizer.encode("assistant\n")]
    prompts = [encode_prompt(tokenizer, opener) for opener in OPENERS]
    return Script(prompts, reply, tokenizer.token_id(END), max_answer_tokens=max_answer_tokens)


def to_messages(tokenizer: Tokenizer, script: Script, tokens: Sequence[int]) -> list[dict[str, str]] | None:
    """Question and answer of a drawn conversation; None where the question did not end, or one of the two is empty.

    An answer cut short stays: it serves to match distributions as well.
    """
    if script.end not in tokens:
        return None
    ended = tokens.index(script.end)
    question = tokenizer.decode(tokens[:ended]).removeprefix("user\n").strip()
    answer = tokenizer.decode(tokens[ended + 1 + len(script.reply) :]).strip()  # an end token gives no text
    if not question or not answer:
        return None
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def read_questions(path: Path) -> list[str]:
    """First messages of the conversations in a file, if there is one; cuts off a line that was not written whole."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return [json.loads(line)["messages"][0]["content"] for line in whole.splitlines()]


def generator_for(seed: int, written: int, device: torch.device) -> torch.Generator:
    """A generator that a run which goes on does not share with what was drawn before."""
    digest = hashlib.sha256(f"{seed} {written}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))


def draw(sampler: Sampler, tokenizer: Tokenizer, out: Path, asked: set[str], count: int) -> None:
    """Append conversations to `out` until there are `count`, and then those that were begun before.

    To leave out the last would prefer the short ones.

    Args:
        asked: first messages that are there already, and are not to come again; what is written is added.
    """
    before, started = len(asked), time.monotonic()
    closing: int | None = None  # the step from which on what is begun does not count
    with out.open("a", encoding="utf-8") as file:
        for finished in sampler.stream():
            for drawn in finished:
                messages = to_messages(tokenizer, sampler.script, drawn.tokens)
                late = closing is not None and drawn.begun >= closing
                if messages is None or late or messages[0]["content"] in asked:
                    continue
                asked.add(messages[0]["content"])
                file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
            file.flush()
            rate = (len(asked) - before) / (time.monotonic() - started)
            print(f"{len(asked)} of {count}, {rate:.0f} a second", flush=True)
            if closing is None and len(asked) >= count:
                closing = sampler.steps
            if closing is not None and sampler.oldest >= closing:
                return


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--base", default=HUB_ID, help="hub id, directory or .gguf file")
    parser.add_argument("--tokenizer", type=Path, required=True, help="directory with nano's tokenizer.json")
    parser.add_argument("--count", type=int, default=4000, help="what OUT is to hold, with what it holds already")
    parser.add_argument("--batch", type=int, help="rows drawn at once (2048 on a GPU: 11 GB of caches; else 16)")
    parser.add_argument("--max-answer-tokens", type=int, default=160)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-graph", action="store_true", help="launch every step's kernels one by one")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    questions = read_questions(args.out)
    if len(questions) >= args.count:
        print(f"{args.out} holds {len(questions)} of {args.count}")
        return
    device = torch.device(args.device)
    if device.index is not None:
        torch.cuda.set_device(device)  # streams and graphs are those of the current device
    base = load_base(args.base, torch.bfloat16 if device.type == "cuda" else torch.float32).to(device).eval()
    tokenizer = load_tokenizer(args.tokenizer)
    sampler = Sampler(
        base,
        script_of(tokenizer, args.max_answer_tokens),
        args.batch or (2048 if device.type == "cuda" else 16),
        generator_for(args.seed, len(questions), device),
        graph=not args.no_graph,
    )
    draw(sampler, tokenizer, args.out, set(questions), args.count)


if __name__ == "__main__":
    main()
