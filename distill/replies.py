"""Greedy replies to one question about one picture, token by token, as a chat gives them."""

from __future__ import annotations

from PIL import Image

from mmmamba.conversation import Conversation
from mmmamba.generate import SamplingParams
from mmmamba.model import MMMamba
from mmmamba.tokenizer import Tokenizer

_LONGEST_REPLY = 60  # tokens; the longest held-out answers take some 50


def greedy_reply(model: MMMamba, tokenizer: Tokenizer, image: Image.Image, question: str) -> str:
    """What the model says to the first question of a conversation."""
    params = SamplingParams(temperature=0, max_new_tokens=_LONGEST_REPLY)
    return "".join(event.text for event in Conversation(model, tokenizer).ask(question, [image], params))
