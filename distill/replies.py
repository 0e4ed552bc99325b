"""Greedy replies to questions about a picture, as a chat gives them to its first turn, many at a time."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from mmmamba.batch import Batch, Question
from mmmamba.generate import SamplingParams
from mmmamba.model import MMMamba
from mmmamba.tokenizer import Tokenizer

_LONGEST_REPLY = 60  # tokens; the longest held-out answers take some 50


def greedy_replies(
    model: MMMamba,
    tokenizer: Tokenizer,
    asked: Sequence[tuple[Image.Image, str]],
    *,
    batch_size: int = 32,
    max_new_tokens: int = _LONGEST_REPLY,
) -> list[str]:
    """What the model says to each (picture, question), in order: what `Conversation.ask` gives at temperature 0.

    Raises: what reading a picture or a prompt raises; no reply is left out.
    """
    params = SamplingParams(greedy=True, max_new_tokens=max_new_tokens)
    questions = (Question(question, (image,), params=params) for image, question in asked)
    replies = [""] * len(asked)
    for answer in Batch(model, tokenizer, size=batch_size, plain=lambda error: None).run(questions):
        replies[answer.index] = answer.text
    return replies
