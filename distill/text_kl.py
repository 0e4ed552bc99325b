"""How far a model's talk has moved from the language model that it grew from, on what that one says itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.data.batches import Row, Rows, stack
from distill.data.sample import Sample
from distill.data.text import Conversations
from distill.streams import OWN_TEXT
from mmmamba.model import MMMamba
from mmmamba.tokenizer import Tokenizer

SEQLEN = 512  # longer than any conversation that `distill.sample_text` draws
SELF = "self"
_CHUNK_TOKENS = 256  # as many rows of logits exist at a time
_BATCH_ROWS = 8


class TextKL(NamedTuple):
    """nats: KL(base || model) a token, the mean over `tokens` of the base's answers in `conversations`.
    left_out: conversations whose first turn is longer than SEQLEN."""

    nats: float
    tokens: int
    conversations: int
    left_out: int


def own_answers(folders: Sequence[Path] = ()) -> Conversations:
    """The held-out conversations of the base with itself: `self.jsonl.gz` of the first folder that has it, or ours.

    Raises: ValueError as `Conversations`.
    """
    paths = (folder / f"{SELF}{ending}" for folder in (*folders, OWN_TEXT) for ending in (".jsonl.gz", ".jsonl"))
    return Conversations(next(path for path in paths if path.is_file()), "val", name=SELF)


@torch.no_grad()
def text_kl(model: MMMamba, base: Any, tokenizer: Tokenizer, conversations: Conversations) -> TextKL:
    """Compare the two, answer token by answer token, after the same text.

    The divergence is over all ids of the model; those that the base lacks have no probability there, so what the model
    gives them counts against it.

    Args:
        base: as `base.load_base` returns it, a language model with `model` and `lm_head`; on the model's device.
        tokenizer: of the model; the base's ids must be its first.
    Raises: ValueError if the base knows more ids than the model, or no conversation fits.
    """
    known, ours = base.lm_head.weight.shape[0], model.config.language.vocab_size
    if known > ours:
        raise ValueError(f"the base has {known} ids and the model {ours}; pass the base that the model grew from")
    made = _rows(model, tokenizer, conversations)
    rows = [row for row in made if row is not None]
    if not rows:
        raise ValueError(f"no conversation of {conversations.name} fits {SEQLEN} tokens; take another file")
    total, tokens = 0.0, 0
    for start in range(0, len(rows), _BATCH_ROWS):
        batch = stack(rows[start : start + _BATCH_ROWS])
        columns_used = int(batch.loss_mask.any(dim=0).nonzero().max()) + 1
        ids = batch.input_ids[:, :columns_used].to(model.device)
        at = batch.loss_mask[:, 1:columns_used].nonzero(as_tuple=True)
        hidden = model.hidden_states(ids, None)[at]
        base_hidden = base.model(ids).last_hidden_state[at]
        for part in range(0, len(hidden), _CHUNK_TOKENS):
            chunk = slice(part, part + _CHUNK_TOKENS)
            total += float(_kl(base.lm_head(base_hidden[chunk]), model.language.output(hidden[chunk])).double().sum())
        tokens += len(hidden)
    return TextKL(total / tokens, tokens, len(rows), len(made) - len(rows))


def _rows(model: MMMamba, tokenizer: Tokenizer, conversations: Conversations) -> list[Row | None]:
    rows = Rows(tokenizer, model.config, "text", seqlen=SEQLEN)
    samples: Iterator[Sample] = (
        Sample(None, conversations.turns(number), conversations.name) for number in range(len(conversations))
    )
    return [rows.row(sample) for sample in samples]


def _kl(base_logits: Tensor, logits: Tensor) -> Tensor:
    """KL(base || model) of every row, (tokens,): the base may have fewer columns."""
    log_p = F.log_softmax(base_logits.float(), dim=-1)
    log_q = F.log_softmax(logits.float(), dim=-1)[:, : log_p.shape[-1]]
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)
