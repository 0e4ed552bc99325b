"""Greedy replies to questions about a picture, as a chat gives them to its first turn, many at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from mmmamba.generate import ModelInputs, decode_one_token, piece_size, prefill
from mmmamba.image import tile_image
from mmmamba.model import MMMamba
from mmmamba.prompt import encode_user_turn, stop_token_ids
from mmmamba.tokenizer import Tokenizer

_LONGEST_REPLY = 60  # tokens; the longest held-out answers take some 50


@torch.inference_mode()
def greedy_replies(
    model: MMMamba,
    tokenizer: Tokenizer,
    asked: Sequence[tuple[Image.Image, str]],
    *,
    batch_size: int = 32,
    max_new_tokens: int = _LONGEST_REPLY,
) -> list[str]:
    """What the model says to each (picture, question), in order.

    Prompts of equal length go through the model together; a reply is what `Conversation.ask` gives at temperature 0.
    """
    config = model.config
    alike: dict[tuple[int, int], list[int]] = defaultdict(list)  # length, tiles -> places in `asked`
    prompts, tiles = [], []
    for place, (image, question) in enumerate(asked):
        tiles.append(tile_image(image, config))
        prompts.append(encode_user_turn(tokenizer, config, question, [len(tiles[-1])], first=True))
        alike[len(prompts[-1]), len(tiles[-1])].append(place)
    replies = [""] * len(asked)
    for places in alike.values():
        for start in range(0, len(places), batch_size):
            part = places[start : start + batch_size]
            ids = torch.tensor([prompts[place] for place in part], device=model.device)
            pixel_values = torch.cat([tiles[place] for place in part]).to(model.device, model.dtype)
            for place, reply in zip(part, _decode(model, tokenizer, ids, pixel_values, max_new_tokens), strict=True):
                replies[place] = reply
    return replies


def _decode(model: MMMamba, tokenizer: Tokenizer, ids: Tensor, pixel_values: Tensor, max_new_tokens: int) -> list[str]:
    """Replies to prompts (batch, seqlen)."""
    stops = torch.tensor(stop_token_ids(tokenizer, model.config), device=model.device)
    state = model.new_state(len(ids))
    logits = prefill(model, ModelInputs(ids, pixel_values), state, piece_size=piece_size(model.device))
    said: list[Tensor] = []
    stopped = torch.zeros(len(ids), dtype=torch.bool, device=model.device)
    while True:
        logits[:, tokenizer.vocab_size :] = float("-inf")  # rows of the head that stand for no token
        logits[:, model.config.embedding.img_context_token_id] = float("-inf")  # stands for pixels that nobody has
        token = logits.argmax(dim=-1)
        stopped = stopped | torch.isin(token, stops)
        said.append(token.masked_fill(stopped, -1))
        if len(said) == max_new_tokens or bool(stopped.all()):
            break
        logits = decode_one_token(model, token, state)
    return [tokenizer.decode([t for t in row if t >= 0]) for row in torch.stack(said, dim=1).tolist()]
