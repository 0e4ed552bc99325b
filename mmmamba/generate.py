"""Generation: two phases over a state that the caller owns, sampling, and streamed text."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from mmmamba.decoder import decoder_for
from mmmamba.decoder_cpu import cpu_decoder_for
from mmmamba.model import MMMamba
from mmmamba.sampling import SamplingParams, sample
from mmmamba.state import DecodeState
from mmmamba.tokenizer import StreamDecoder, Tokenizer

if TYPE_CHECKING:
    from mmmamba.decoder.session import Session

__all__ = [
    "ModelInputs",
    "PrefillCancelled",
    "SamplingParams",
    "StreamEvent",
    "decode_one_token",
    "piece_size",
    "prefill",
    "sample",
    "stream",
]

# Tokens read between two looks at the cancel flag: a fraction of a second of work on either device.
CPU_PIECE = 256
GPU_PIECE = 8192

FinishReason = Literal["stop", "length", "cancel"]


def piece_size(device: torch.device) -> int:
    """Tokens to read between two looks at a cancel flag on this device."""
    return CPU_PIECE if device.type == "cpu" else GPU_PIECE


@dataclass(frozen=True)
class ModelInputs:
    """`input_ids` (batch, seqlen) int64; `pixel_values` (num_tiles, channels, side, side), rows in order, or None."""

    input_ids: Tensor
    pixel_values: Tensor | None = None


@dataclass(frozen=True)
class StreamEvent:
    """A step of `stream`. `text` is new, `reply` all of it; `finish_reason` is set on the last event only.

    `ttft_ms` runs from the call to the first token; `tok_per_sec` counts the tokens after the first, by the model's own
    clock (time that the consumer spends between events is left out).
    """

    text: str
    reply: str
    num_tokens: int
    ttft_ms: float | None
    elapsed_ms: float
    tok_per_sec: float | None
    finish_reason: FinishReason | None = None


class PrefillCancelled(Exception):
    """The cancel flag was set while a prompt was being read; the state has seen a part of it."""


@torch.inference_mode()
def prefill(
    model: MMMamba,
    inputs: ModelInputs,
    state: DecodeState,
    *,
    piece_size: int = 1024,
    cancel: threading.Event | None = None,
) -> Tensor:
    """Read a prompt into `state` in pieces of at most `piece_size` tokens, so that memory stays that of a piece.

    Returns: logits of the last position, (batch, vocab_size).
    Raises: ValueError if image tokens and tiles do not match, or piece_size is below 1; PrefillCancelled if `cancel` is
        set between two pieces. The state is advanced in place: to be able to go back, keep a clone.
    """
    if piece_size < 1:
        raise ValueError(f"piece_size={piece_size} must be 1 or more")
    ids = inputs.input_ids
    batch, seqlen = ids.shape
    if cancel is not None and cancel.is_set():
        raise PrefillCancelled
    fused = decoder_for(model)
    if fused is not None and seqlen <= piece_size:
        read = fused.read(model, ids, inputs.pixel_values, state)
        if read is not None:
            return read
    config = model.config.embedding
    image_tokens = ids == config.img_context_token_id
    num_image = int(image_tokens[0].sum())
    embedded = min(state.pending.shape[1], seqlen)  # tokens of a tile that the embedding stack has seen already
    total = (
        state.embedding.seqlen + (seqlen - num_image) + (num_image - embedded) * config.stack_tokens_per_image_token,
        state.language.seqlen + seqlen,
    )
    if seqlen > piece_size:
        state.reserve_(total)
    tiles = inputs.pixel_values
    if tiles is not None and len(tiles) % batch:
        raise ValueError(f"{len(tiles)} tiles do not divide among {batch} rows; every row needs equally many")
    rows = None if tiles is None else tiles.view(batch, -1, *tiles.shape[1:])
    per_tile = 1 if tiles is None else max(1, (tiles.shape[-1] // (2 * config.patch_size)) ** 2)
    used = 0
    logits = None
    for start in range(0, max(seqlen, 1), piece_size):
        if start and cancel is not None and cancel.is_set():
            raise PrefillCancelled
        piece = ids[:, start : start + piece_size]
        last = start + piece_size >= seqlen
        piece_tiles = None
        if rows is not None:
            # A tile goes with the piece that holds its first token; the last piece takes what is left, so that surplus
            # tiles are reported rather than dropped.
            fresh = int((piece[0] == config.img_context_token_id).sum()) - state.pending.shape[1]
            count = rows.shape[1] - used if last else max(0, -(-fresh // per_tile))
            if count:
                piece_tiles = rows[:, used : used + count].flatten(0, 1)
            used += count
        if last:
            logits = model(piece, piece_tiles, state, total_seqlens=total, last_only=True)[:, -1]
        else:
            model.hidden_states(piece, piece_tiles, state, total_seqlens=total)
    assert logits is not None
    return logits


@torch.inference_mode()
def decode_one_token(model: MMMamba, token: Tensor, state: DecodeState) -> Tensor:
    """Feed one token a row, (batch,) int64, and advance `state`; returns logits (batch, vocab_size)."""
    for fast in (decoder_for(model), cpu_decoder_for(model)):
        if fast is not None and fast.fits(token, state):
            return fast.decode_one_token(token, state)
    return model(token[:, None], None, state)[:, -1]


@torch.inference_mode()
def stream(
    model: MMMamba,
    tokenizer: Tokenizer,
    inputs: ModelInputs,
    state: DecodeState,
    params: SamplingParams,
    *,
    stop_token_ids: Sequence[int],
    stop_strings: Sequence[str] = (),
    cancel: threading.Event | None = None,
) -> Iterator[StreamEvent]:
    """Read a prompt (batch 1) and yield the reply as it comes, one event a token and a last one with the reason.

    Text is held back while it could be the beginning of a stop string or half a character. A token's event comes before
    the token is fed back. When the last event has been yielded, or the generator is closed, `state` has seen the prompt
    and every token of the reply but the stop token: the next turn goes on from there. (After a stop string it has also
    seen the tokens that spelled it. Cancelled before the first token, it has seen a part of the prompt only: go back to
    a clone.)

    Raises: ValueError if the batch is not 1, or from `prefill`.
    """
    if inputs.input_ids.shape[0] != 1:
        raise ValueError(f"stream takes one conversation, input_ids holds {inputs.input_ids.shape[0]} rows")
    started = time.perf_counter()
    try:
        logits = prefill(model, inputs, state, piece_size=piece_size(model.device), cancel=cancel)
    except PrefillCancelled:
        yield StreamEvent("", "", 0, None, (time.perf_counter() - started) * 1e3, None, "cancel")
        return
    text = _StopText(StreamDecoder(tokenizer), stop_strings)
    banned = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    banned[tokenizer.vocab_size :] = True  # rows of the head that stand for no token
    banned[model.config.embedding.img_context_token_id] = True  # stands for pixels that nobody has
    source = _token_source(model, state, logits, params, banned, stop_token_ids)
    stops = set(stop_token_ids)
    history: list[int] = []
    ttft_ms: float | None = None
    decode_s = 0.0

    def event(new: str, reason: FinishReason | None = None) -> StreamEvent:
        rate = (len(history) - 1) / decode_s if len(history) > 1 and decode_s > 0 else None
        elapsed = (time.perf_counter() - started) * 1e3
        return StreamEvent(new, text.shown, len(history), ttft_ms, elapsed, rate, reason)

    reason: FinishReason = "length"
    tick = time.perf_counter()
    try:
        while len(history) < params.max_new_tokens:
            if cancel is not None and cancel.is_set():
                reason = "cancel"
                break
            token_id = source.draw()
            if token_id in stops:
                reason = "stop"
                break
            history.append(token_id)
            new = text.push(token_id)
            if ttft_ms is None:
                ttft_ms = (time.perf_counter() - started) * 1e3
            else:
                decode_s += time.perf_counter() - tick
            try:
                yield event(new)  # seen at once; the token is fed back while it is being read
            finally:
                # Also when the generator is closed here: the state must have seen what was shown.
                tick = time.perf_counter()
                source.feed()
            if text.stopped:
                reason = "stop"
                break
    finally:
        source.close()
    yield event(text.flush(), reason)


class _TokenSource(Protocol):
    """Tokens of a reply. After `draw` the token is either fed, or the reply is over."""

    def draw(self) -> int: ...

    def feed(self) -> None: ...

    def close(self) -> None: ...


class _PlainTokens:
    """By the model's own forward pass and `sample`."""

    def __init__(
        self, model: MMMamba, state: DecodeState, logits: Tensor, params: SamplingParams, banned: Tensor
    ) -> None:
        self._model, self._state, self._logits, self._params, self._banned = model, state, logits, params, banned
        self._generator = torch.Generator(device=logits.device)
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)
        self._history: list[int] = []
        self._token = logits.new_zeros(1, dtype=torch.int64)

    def draw(self) -> int:
        logits = self._logits.masked_fill(self._banned, float("-inf"))
        penalised = self._params.repetition_penalty != 1.0
        seen = torch.tensor([self._history], device=logits.device) if penalised else None
        self._token = sample(logits, self._params, generator=self._generator, history=seen)
        token_id = int(self._token)
        self._history.append(token_id)
        return token_id

    def feed(self) -> None:
        self._logits = decode_one_token(self._model, self._token, self._state)

    def close(self) -> None:
        """Nothing is held."""


class _FusedTokens:
    """By a session of the fused decoder, which draws on the device: a token is fed before the host knows it, and not at
    all if it ends the reply."""

    def __init__(self, session: Session, logits: Tensor) -> None:
        self._session = session
        session.begin(logits)

    def draw(self) -> int:
        self._session.advance()
        return self._session.take()[0]

    def feed(self) -> None:
        """Done in `draw`."""

    def close(self) -> None:
        self._session.close()


def _token_source(
    model: MMMamba,
    state: DecodeState,
    logits: Tensor,
    params: SamplingParams,
    banned: Tensor,
    stop_token_ids: Sequence[int],
) -> _TokenSource:
    fused = decoder_for(model)
    if fused is None or fused.refuses([state], stop_token_ids):
        return _PlainTokens(model, state, logits, params, banned)
    session = fused.open([state], [params], stop_token_ids=stop_token_ids, banned=banned)
    return _FusedTokens(session, logits)


class _StopText:
    """Visible text of a reply: whole characters only, nothing from a stop string on."""

    def __init__(self, decoder: StreamDecoder, stop_strings: Sequence[str]) -> None:
        self._decoder = decoder
        self._stops = [s for s in stop_strings if s]
        self._held = ""
        self.shown = ""
        self.stopped = False

    def push(self, token: int) -> str:
        return self._advance(self._decoder.push(token))

    def flush(self) -> str:
        if self.stopped:
            return ""
        new = self._advance(self._decoder.flush())
        if not self.stopped:
            new += self._held
            self.shown += self._held
            self._held = ""
        return new

    def _advance(self, new: str) -> str:
        self._held += new
        hits = [at for s in self._stops if (at := self._held.find(s)) >= 0]
        if hits:
            out, self._held, self.stopped = self._held[: min(hits)], "", True
        else:
            keep = max((_overlap(self._held, s) for s in self._stops), default=0)
            out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self.shown += out
        return out


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
