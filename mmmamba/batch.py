"""Many questions with one model: several are read and answered together, and who is done makes room.

A recurrent state has one size at any length, so rows of any length go side by side. Models with attention layers keep a
cache that grows: there only rows of equal length share a batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mmmamba.generate import (
    GPU_PIECE,
    FinishReason,
    ModelInputs,
    SamplingParams,
    decode_one_token,
    piece_size,
    prefill,
    sample,
)
from mmmamba.image import load_image, tile_image
from mmmamba.model import MMMamba
from mmmamba.prompt import encode_user_turn, stop_token_ids
from mmmamba.state import DecodeState, KVState, LayerState, StackState
from mmmamba.together import joined, prefill_together, reads_any_length
from mmmamba.tokenizer import StreamDecoder, Tokenizer

# Tokens of the embedding stack that are read in one pass: on a CPU more than this is no faster, on a GPU it is what a
# piece of a long prompt takes. Longer prompts are read alone, in pieces.
CPU_TOGETHER = 512
GPU_TOGETHER = GPU_PIECE


@dataclass(frozen=True)
class Question:
    """`images` are files or pictures; `system` None is the template's own, `max_tiles` None the model's own limit."""

    text: str
    images: tuple[Path | Image.Image, ...] = ()
    system: str | None = None
    max_tiles: int | None = None
    params: SamplingParams = field(default_factory=SamplingParams)


@dataclass(frozen=True)
class Answer:
    """Of question number `index`. With an `error` (one sentence) there is no answer, and the rest is empty."""

    index: int
    text: str = ""
    finish_reason: FinishReason | None = None
    num_tokens: int = 0
    text_tokens: int = 0
    image_tokens: int = 0
    error: str | None = None


@dataclass(eq=False)  # one is not another because it asks the same
class _Prompt:
    index: int
    params: SamplingParams
    ids: list[int]
    tiles: Tensor | None
    num_image: int
    lengths: tuple[int, int]  # positions that the two stacks will have seen


@dataclass
class _Row:
    """A question being answered; `lengths` count the positions that its state has seen."""

    prompt: _Prompt
    generator: torch.Generator
    lengths: tuple[int, int]
    tokens: list[int] = field(default_factory=list)


class Batch:
    """Answers with one model. Not for several threads.

    Args:
        size: rows that are answered together.
        plain: an error of one question in one sentence, or None for one that should end everything.
    """

    def __init__(
        self,
        model: MMMamba,
        tokenizer: Tokenizer,
        *,
        size: int = 8,
        plain: Callable[[Exception], str | None] = str,
    ) -> None:
        if size < 1:
            raise ValueError(f"a batch of {size} rows cannot answer; use 1 or more")
        self.model, self.tokenizer, self.size, self._plain = model, tokenizer, size, plain
        self._any_length = reads_any_length(model)
        self._together = CPU_TOGETHER if model.device.type == "cpu" else GPU_TOGETHER
        self._stops = set(stop_token_ids(tokenizer, model.config))
        config = model.config
        banned = torch.zeros(config.language.vocab_size, dtype=torch.bool)
        banned[tokenizer.vocab_size :] = True  # rows of the head that stand for no token
        banned[config.embedding.img_context_token_id] = True  # stands for pixels that nobody has
        self._banned = banned.to(model.device)

    @torch.inference_mode()
    def run(self, questions: Iterable[Question]) -> Iterator[Answer]:
        """Answers as they become whole, not in the order of the questions."""
        source = enumerate(questions)
        waiting: deque[_Prompt] = deque()
        rows: list[_Row] = []
        state: DecodeState | None = None
        logits: Tensor | None = None
        while True:
            while len(rows) < self.size:
                yield from self._prepare(source, waiting, self.size - len(rows))
                asked = self._next(waiting, rows)
                if not asked:
                    break
                for read in self._read(asked):
                    if isinstance(read, Answer):
                        yield read
                        continue
                    prompts, new_state, new_logits = read
                    rows += [self._row(prompt) for prompt in prompts]
                    state = new_state if state is None else join_states([state, new_state])
                    logits = new_logits if logits is None else torch.cat([logits, new_logits])
            if state is None or logits is None:
                return  # nothing runs, and nothing waits
            drawn = self._draw(rows, logits)
            over = [i for i, row in enumerate(rows) if drawn[i] in self._stops]
            for i, row in enumerate(rows):
                if i not in over:
                    row.tokens.append(drawn[i])
                    row.lengths = (row.lengths[0] + 1, row.lengths[1] + 1)
            most = [row.prompt.params.max_new_tokens for row in rows]
            full = [i for i, row in enumerate(rows) if i not in over and len(row.tokens) >= most[i]]
            for i in (*over, *full):
                yield self._answer(rows[i], "stop" if i in over else "length")
            left = [i for i in range(len(rows)) if i not in over and i not in full]
            rows = [rows[i] for i in left]
            if not left:
                state = logits = None
                continue
            if len(left) < len(drawn):
                state = take_rows(state, left)
            token = torch.tensor([drawn[i] for i in left], device=self.model.device)
            logits = decode_one_token(self.model, token, state)

    def _prepare(self, source: Iterator[tuple[int, Question]], waiting: deque[_Prompt], free: int) -> Iterator[Answer]:
        """Fill `waiting` for so many free rows; yields the errors of questions that cannot be asked."""
        ahead = free if self._any_length else 2 * self.size
        # Pictures take memory: no more than can be read at once wait with theirs.
        while len(waiting) < ahead and (not self._any_length or sum(p.lengths[0] for p in waiting) < self._together):
            index, question = next(source, (-1, None))
            if question is None:
                return
            try:
                waiting.append(self._encode(index, question))
            except (ValueError, OSError, MemoryError) as error:
                yield self._failed(index, error)

    def _encode(self, index: int, question: Question) -> _Prompt:
        config = self.model.config
        tiles = [tile_image(load_image(path), config, max_tiles=question.max_tiles) for path in question.images]
        ids = encode_user_turn(
            self.tokenizer, config, question.text, [len(t) for t in tiles], first=True, system=question.system
        )
        num_image = ids.count(config.embedding.img_context_token_id)
        stack = len(ids) + num_image * (config.embedding.stack_tokens_per_image_token - 1)
        pixels = torch.cat(tiles) if tiles else None
        return _Prompt(index, question.params, ids, pixels, num_image, (stack, len(ids)))

    def _next(self, waiting: deque[_Prompt], rows: Sequence[_Row]) -> list[_Prompt]:
        """Those that join `rows` and are read together: the first that may, and others that go with it."""
        fits = list(waiting)
        if not self._any_length:
            first = rows[0].lengths if rows else next((prompt.lengths for prompt in waiting), None)
            fits = [prompt for prompt in waiting if prompt.lengths == first]
        fits = fits[: self.size - len(rows)]
        taken = [fits[place] for place in joined([prompt.lengths[0] for prompt in fits], self._together)]
        for prompt in taken:
            waiting.remove(prompt)
        return taken

    def _read(self, prompts: Sequence[_Prompt]) -> Iterator[tuple[Sequence[_Prompt], DecodeState, Tensor] | Answer]:
        """States and logits of prompts; if they cannot be read together, of each, or why it cannot be read."""
        inputs = [ModelInputs(torch.tensor([prompt.ids]), prompt.tiles) for prompt in prompts]
        try:
            if len(inputs) == 1:
                state = self.model.new_state()
                logits = prefill(self.model, inputs[0], state, piece_size=piece_size(self.model.device))
            else:
                logits, state = prefill_together(self.model, inputs)
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            if len(prompts) == 1:
                yield self._failed(prompts[0].index, error)
                return
        else:
            for prompt in prompts:
                prompt.tiles = None
            yield prompts, state, logits
            return
        for prompt in prompts:
            yield from self._read([prompt])

    def _row(self, prompt: _Prompt) -> _Row:
        generator = torch.Generator(device=self.model.device)
        if prompt.params.seed is None:
            generator.seed()
        else:
            generator.manual_seed(prompt.params.seed)
        return _Row(prompt, generator, prompt.lengths)

    def _draw(self, rows: Sequence[_Row], logits: Tensor) -> list[int]:
        """A token a row, each by its own settings and generator: batch-mates do not change an answer."""
        logits = logits.masked_fill(self._banned, float("-inf"))
        if all(row.prompt.params.is_greedy and row.prompt.params.repetition_penalty == 1.0 for row in rows):
            return logits.argmax(dim=-1).tolist()  # one look for all of them
        drawn = []
        for i, row in enumerate(rows):
            params = row.prompt.params
            seen = torch.tensor([row.tokens], device=logits.device) if params.repetition_penalty != 1.0 else None
            drawn.append(sample(logits[i : i + 1], params, generator=row.generator, history=seen))
        return torch.cat(drawn).tolist()

    def _answer(self, row: _Row, reason: FinishReason) -> Answer:
        decoder = StreamDecoder(self.tokenizer)
        text = "".join(decoder.push(token) for token in row.tokens) + decoder.flush()
        prompt = row.prompt
        num_text = len(prompt.ids) - prompt.num_image + len(row.tokens)
        return Answer(prompt.index, text, reason, len(row.tokens), num_text, prompt.num_image)

    def _failed(self, index: int, error: Exception) -> Answer:
        sentence = self._plain(error)
        if sentence is None:
            raise error
        return Answer(index, error=sentence)


def join_states(states: Sequence[DecodeState]) -> DecodeState:
    """Rows of several states as one state; caches must be equally long.  Raises: ValueError if they are not."""

    def stack(parts: Sequence[StackState]) -> StackState:
        seqlens = {part.seqlen for part in parts}
        layers: list[LayerState] = []
        for i, layer in enumerate(parts[0].layers):
            if isinstance(layer, KVState) and len(seqlens) > 1:
                raise ValueError(f"caches of {sorted(seqlens)} positions cannot be rows of one state")
            tensors = [part.layers[i].tensors() for part in parts]
            if isinstance(layer, KVState):
                tensors = [{name: t[:, :, : parts[0].seqlen] for name, t in named.items()} for named in tensors]
            layers.append(type(layer)(**{name: torch.cat([t[name] for t in tensors]) for name in tensors[0]}))
        return StackState(layers, max(seqlens))

    first = states[0]
    return DecodeState(
        first.fingerprint,
        stack([state.embedding for state in states]),
        stack([state.language for state in states]),
        torch.cat([state.pending for state in states]),
        max(state.num_image_tokens for state in states),
    )


def take_rows(state: DecodeState, rows: Sequence[int]) -> DecodeState:
    """Some rows of a state, copied."""
    index = torch.tensor(list(rows), device=state.pending.device)

    def stack(part: StackState) -> StackState:
        layers: list[LayerState] = [
            type(layer)(**{name: t.index_select(0, index) for name, t in layer.tensors().items()})
            for layer in part.layers
        ]
        return StackState(layers, part.seqlen)

    return DecodeState(
        state.fingerprint,
        stack(state.embedding),
        stack(state.language),
        state.pending.index_select(0, index),
        state.num_image_tokens,
    )
