"""Prompts of different lengths read together into one state, no row of which depends on its neighbours.

Rows are filled up at their ends. A recurrent layer takes a step of length zero there and keeps its state; a cache would
keep what was filled in, so models with attention layers read rows of one length together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmmamba.generate import ModelInputs, prefill
from mmmamba.model import MMMamba, TokenLayout, token_layout
from mmmamba.segments import Padding
from mmmamba.state import DecodeState


def reads_any_length(model: MMMamba) -> bool:
    """Whether rows of different lengths can share a state."""
    return not (model.embedding.needs_rope or model.language.needs_rope)


@torch.inference_mode()
def prefill_together(model: MMMamba, prompts: Sequence[ModelInputs]) -> tuple[Tensor, DecodeState]:
    """Read prompts of one row each, in one pass: memory is that of all of them, filled up to the longest.

    Returns: logits of each prompt's last position (n, vocab_size), and a state of n rows: row i of both is what
        `prefill` gives for prompt i alone, up to rounding. The state counts the positions of its longest row.
    Raises: ValueError if there is no prompt or one of more rows, if image tokens and tiles do not match, or if lengths
        differ and the model has attention layers.
    """
    if not prompts:
        raise ValueError("there is no prompt to read; pass one or more")
    for inputs in prompts:
        if inputs.input_ids.ndim != 2 or len(inputs.input_ids) != 1 or not inputs.input_ids.shape[1]:
            raise ValueError(
                f"a prompt has shape {tuple(inputs.input_ids.shape)}; use (1, seqlen) with a token or more"
            )
    image_id = model.config.embedding.img_context_token_id
    ids = [inputs.input_ids[0].cpu() for inputs in prompts]
    shapes = {(len(row), int((row == image_id).sum())) for row in ids}
    state = model.new_state(len(prompts))
    tiles = [inputs.pixel_values for inputs in prompts]
    for row, mine in zip(ids, tiles, strict=True):
        model.embedding.missing_tail((row == image_id)[None], mine, 1, may_cut=False)
    shown = [mine for mine in tiles if mine is not None and len(mine)]
    pixel_values = torch.cat(shown) if shown else None
    if len(shapes) == 1:
        whole = ModelInputs(torch.stack(ids), pixel_values)
        return prefill(model, whole, state, piece_size=len(ids[0])), state
    if not reads_any_length(model):
        lengths = sorted({len(row) for row in ids})
        raise ValueError(
            f"prompts of {lengths} tokens, or with different numbers of image tokens, cannot be rows of one state of a "
            f"{model.config.kind} model, which has attention layers; read those of one length together"
        )
    logits = _read(model, ids, pixel_values, state)
    state.num_image_tokens = max(num_image for _, num_image in shapes)
    return logits, state


def _read(model: MMMamba, ids: Sequence[Tensor], pixel_values: Tensor | None, state: DecodeState) -> Tensor:
    """One pass over rows of different lengths; logits of their last positions."""
    config, device = model.config.embedding, model.device
    rows = [token_layout(row[None], config.img_context_token_id, config.stack_tokens_per_image_token) for row in ids]
    layout = TokenLayout(*(t.to(device) for t in _side_by_side(rows, ids, config.img_context_token_id)))
    of_embedding, of_language = (
        Padding.of(lengths, device) for lengths in ([r.stack_ids.shape[1] for r in rows], [len(row) for row in ids])
    )
    pixels = None if pixel_values is None else pixel_values.to(device)
    shape = (len(ids), max(len(row) for row in ids))
    x = model.embedding.embed_layout(layout, shape, pixels, state, padding=of_embedding)
    hidden = model.language(x, state, padding=of_language)
    ends = (of_language.lengths - 1)[:, None, None].expand(-1, 1, hidden.shape[-1])
    logits: Tensor = model.language.output(hidden.gather(1, ends))
    return logits[:, -1]


def _side_by_side(rows: Sequence[TokenLayout], ids: Sequence[Tensor], image_id: int) -> TokenLayout:
    """Layouts of single rows as one layout of rows that are filled up with a text token."""
    filling = 0 if image_id else 1
    stack_ids = pad_sequence([row.stack_ids[0] for row in rows], batch_first=True, padding_value=filling)
    # What is filled in takes its embedding from the row's first position: any number will do that is one.
    first = pad_sequence([row.first for row in rows], batch_first=True)
    first = first + stack_ids.shape[1] * torch.arange(len(rows))[:, None]
    filled = pad_sequence(list(ids), batch_first=True, padding_value=filling)
    is_image = (stack_ids == image_id).flatten()
    return TokenLayout(
        stack_ids,
        (~is_image).nonzero().squeeze(1),
        is_image.nonzero().squeeze(1),
        first.flatten(),
        (filled == image_id).flatten().nonzero().squeeze(1),
    )


def joined(lengths: Sequence[int], most_tokens: int) -> list[int]:
    """Places of the prompts that are read together with the first: filled up they hold at most `most_tokens`, and none
    is filled up to more than twice its length."""
    if not lengths:
        return []
    taken = [0]
    shortest = longest = lengths[0]
    for place, length in enumerate(lengths[1:], 1):
        low, high = min(shortest, length), max(longest, length)
        if high <= 2 * low and high * (len(taken) + 1) <= most_tokens:
            taken.append(place)
            shortest, longest = low, high
    return taken
