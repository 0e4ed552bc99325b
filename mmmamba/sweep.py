"""A model over a growing context: the same question after 1K, 4K, 16K, ... tokens of conversation, measured.

What a longer context will cost is predicted first, from the cost model (`predict_*`, `end_tokens`), so that a model
that grows is stopped before it runs out of memory, and says where its end is. Nothing here knows of a page or a file
format for results: the app and `python -m benchmarks.sweep` both use it.
"""

from __future__ import annotations

import csv
import hashlib
import io
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median, quantiles
from typing import Literal

import torch
from torch import Tensor

from mmmamba import cost
from mmmamba.chart import Chart, Line, mebibytes, milliseconds
from mmmamba.config import ModelConfig
from mmmamba.generate import ModelInputs, decode_one_token, prefill
from mmmamba.memory import current_memory_bytes, peak_memory_bytes, reset_peak_memory, synchronize
from mmmamba.model import MMMamba
from mmmamba.prompt import encode_user_turn
from mmmamba.state import DecodeState
from mmmamba.talk import TalkIds
from mmmamba.tokenizer import Tokenizer

CONTEXTS = (1024, 4096, 16_384, 65_536, 103_000)
QUESTION = "What did I ask you first?"
IMAGE_QUESTION = "What is in the picture?"
CPU_PIECE, GPU_PIECE = 512, 2048  # tokens read between two events
WARM_UP_STEPS = 2
SAVE_BYTES = 256 << 20  # states up to this size are saved, larger ones are quicker read again than moved
SAFE_SHARE = 0.9  # of the free memory that a context may be planned to take

Kind = Literal["teacher", "linear", "hybrid"]


@dataclass(frozen=True)
class Point:
    """What was measured after `context` tokens. `ms` is the median time of a token with its 20th and 80th percentile;
    `ttft_ms` from asking the question to its first token; `read_s` the time to read on from the point before, None if
    the state was restored (`restore_ms`). `peak_bytes` is what the question took above what was there before it."""

    model: str
    kind: Kind
    context: int
    text_tokens: int
    image_tokens: int
    ttft_ms: float
    ms: float
    p20_ms: float
    p80_ms: float
    recurrent_bytes: int
    cache_bytes: int
    peak_bytes: int
    read_s: float | None
    restore_ms: float | None = None


@dataclass(frozen=True)
class Reading:
    """`seen` of `context` tokens are read."""

    model: str
    context: int
    seen: int


@dataclass(frozen=True)
class Skipped:
    """A context that is not measured, nor any longer one, and why."""

    model: str
    context: int
    reason: str


Event = Point | Reading | Skipped


@dataclass(frozen=True)
class Prediction:
    """What the cost model says of one model on a machine that moves `bandwidth` bytes a second.

    `weight_bytes` are those that a token reads; `free_bytes` what states and caches may still take, None if unknown.
    """

    config: ModelConfig
    weight_bytes: int
    element_bytes: int
    bandwidth: float
    free_bytes: int | None

    def bytes(self, context: int, image_tokens: int = 0) -> int:
        """Of recurrent state and key-value cache."""
        return cost.state_bytes(self.config, element_bytes=self.element_bytes) + self.kv_bytes(context, image_tokens)

    def kv_bytes(self, context: int, image_tokens: int = 0) -> int:
        text = context - image_tokens
        size = self.element_bytes
        return cost.kv_cache_bytes(self.config, num_text_tokens=text, num_image_tokens=image_tokens, element_bytes=size)

    def ms(self, context: int, measured: Sequence[Point] = ()) -> float:
        """For one token: the least that it could be, and where points were measured what those took on top."""
        state = 2 * cost.state_bytes(self.config, element_bytes=self.element_bytes)  # read and written
        floor = 1e3 * (self.weight_bytes + state + self.kv_bytes(context)) / self.bandwidth
        return floor + (median(point.ms - self.ms(point.context) for point in measured) if measured else 0.0)

    @property
    def end_tokens(self) -> int | None:
        """The context at which the cache fills the free memory; None for a model that has no such end."""
        per_token = self.kv_bytes(1)
        if not per_token or self.free_bytes is None:
            return None
        return int(SAFE_SHARE * self.free_bytes / per_token)


def predict(model: MMMamba, bandwidth: float, free_bytes: int | None) -> Prediction:
    """`Prediction` of a loaded model."""
    return Prediction(model.config, cost.weight_bytes(model).per_token, model.dtype.itemsize, bandwidth, free_bytes)


class Sweep:
    """One model over growing contexts. Not for several threads.

    Args:
        pixel_values: tiles of one picture, (num_tiles, 3, side, side), shown again in every turn; None for text alone.
        steps: timed tokens at each context.
        budget_s: seconds that reading may take in all; a context that would take longer is skipped, and said.
        states: directory for states at each context; one found there is restored, so nothing is read again.
        weights: names the weights in the file names of those states (`checkpoint.weights_digest`).
    """

    def __init__(
        self,
        model: MMMamba,
        tokenizer: Tokenizer,
        name: str,
        prediction: Prediction,
        *,
        contexts: Sequence[int] = CONTEXTS,
        pixel_values: Tensor | None = None,
        steps: int = 16,
        budget_s: float = float("inf"),
        states: Path | None = None,
        weights: str = "",
    ) -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.prediction, self.steps, self.budget_s, self.states = prediction, steps, budget_s, states
        self.contexts = sorted(contexts)
        if not self.contexts or self.contexts[0] < 64 or steps < 2:
            raise ValueError(
                f"contexts {list(contexts)} and {steps} steps; use contexts of 64 or more and 2 steps or more"
            )
        self.pixel_values = pixel_values
        self.question = QUESTION if pixel_values is None else IMAGE_QUESTION
        self._piece = CPU_PIECE if model.device.type == "cpu" else GPU_PIECE
        self._text = TalkIds(tokenizer, model.config, pixel_values)
        self._state = model.new_state()
        self._spent_s = 0.0
        self._pieces: list[tuple[int, float]] = []  # (context in the middle, seconds a token) of every piece read
        held = model.dtype if model.scheme is None else f"{model.scheme} {model.dtype}"
        facts = f"{weights} {held} {self._text.digest}"
        self._id = f"{model.config.fingerprint()}-{hashlib.sha256(facts.encode()).hexdigest()[:12]}"

    def run(self, cancel: threading.Event | None = None) -> Iterator[Event]:
        """Read, ask and measure at each context, shortest first; ends early when `cancel` is set."""
        for context in self.contexts:
            if reason := self._obstacle(context):
                yield Skipped(self.name, context, reason)
                return
            read_s, restore_ms = 0.0, self._restore(context)
            if restore_ms is None:
                for seen, seconds in self._read(context, cancel):
                    read_s += seconds
                    yield Reading(self.name, context, seen)
                    if self._spent_s > self.budget_s and seen < context:
                        reason = (
                            f"{seen:,} of {context:,} tokens were read in the {self.budget_s:,.0f} s that are the limit"
                        )
                        yield Skipped(self.name, context, reason)
                        return
                if self._state.seqlen < context:
                    return  # cancelled
                self._save(context)
            yield self._measure(context, None if restore_ms is not None else read_s, restore_ms)
            if cancel is not None and cancel.is_set():
                return

    def _obstacle(self, context: int) -> str | None:
        """Why this context cannot be measured, in plain words; None if it can."""
        end = self.prediction.end_tokens
        if end is not None and context > end:
            need, free = self.prediction.kv_bytes(context), self.prediction.free_bytes or 0
            return (
                f"{context:,} tokens would need {need / 2**30:.1f} GiB of keys and values, {free / 2**30:.1f} GiB are "
                f"free: the end is at about {end:,} tokens"
            )
        if self._file(context) is not None:
            return None
        seconds = self._read_s(context)
        if self._spent_s + seconds > self.budget_s:
            limit = f"the limit is {self.budget_s:,.0f} s"
            return f"reading {context:,} tokens would take about {seconds:,.0f} s more; {limit}"
        return None

    def _read_s(self, context: int) -> float:
        """Expected seconds to read on to `context`: a straight line through the pieces so far, as attention's time for
        a token grows with what stands before it and a recurrent model's does not."""
        start = self._state.seqlen
        if not self._pieces or context <= start:
            return 0.0
        middle = (start + context) / 2
        count = len(self._pieces)
        mean_x = sum(x for x, _ in self._pieces) / count
        mean_y = sum(y for _, y in self._pieces) / count
        spread = sum((x - mean_x) ** 2 for x, _ in self._pieces)
        slope = sum((x - mean_x) * (y - mean_y) for x, y in self._pieces) / spread if count > 3 and spread else 0.0
        # Noise must not promise that reading gets faster, nor a recurrent model appear to slow down.
        slope = max(0.0, slope) if self.model.config.kind != "linear" else 0.0
        return (mean_y + slope * (middle - mean_x)) * (context - start)

    def _read(self, context: int, cancel: threading.Event | None) -> Iterator[tuple[int, float]]:
        """Read on to `context` in pieces; yields (tokens seen, seconds of the piece)."""
        device = self.model.device
        while self._state.seqlen < context:
            if cancel is not None and cancel.is_set():
                return
            start = self._state.seqlen
            ids, tiles = self._text.take(min(self._piece, context - start))
            started = time.perf_counter()
            prefill(self.model, ModelInputs(torch.tensor([ids]), tiles), self._state, piece_size=self._piece)
            synchronize(device)
            seconds = time.perf_counter() - started
            self._spent_s += seconds
            self._pieces.append((start + len(ids) // 2, seconds / len(ids)))
            yield self._state.seqlen, seconds

    @torch.inference_mode()
    def _measure(self, context: int, read_s: float | None, restore_ms: float | None) -> Point:
        """Ask the question on a fork of the state."""
        model, config, device = self.model, self.model.config, self.model.device
        state = self._state.fork()
        tiles = 0 if self.pixel_values is None else len(self.pixel_values)
        ids = encode_user_turn(
            self.tokenizer,
            config,
            self.question,
            [tiles] if tiles else [],
            first=False,
            images_before=self._text.images,
        )
        reset_peak_memory(device)
        before = current_memory_bytes(device)
        started = time.perf_counter()
        logits = prefill(model, ModelInputs(torch.tensor([ids]), self.pixel_values), state, piece_size=self._piece)
        token = _likeliest(logits, config)
        synchronize(device)
        ttft_ms = 1e3 * (time.perf_counter() - started)
        times = []
        for _ in range(WARM_UP_STEPS + self.steps):
            started = time.perf_counter()
            token = _likeliest(decode_one_token(model, token, state), config)
            synchronize(device)
            times.append(1e3 * (time.perf_counter() - started))
        tenths = quantiles(times[WARM_UP_STEPS:], n=10, method="inclusive")
        return Point(
            model=self.name,
            kind=config.kind,
            context=context,
            text_tokens=self._state.num_text_tokens,
            image_tokens=self._state.num_image_tokens,
            ttft_ms=round(ttft_ms, 3),
            ms=round(tenths[4], 3),
            p20_ms=round(tenths[1], 3),
            p80_ms=round(tenths[7], 3),
            recurrent_bytes=self._state.recurrent_nbytes,
            cache_bytes=self._state.cache_nbytes,
            peak_bytes=max(0, peak_memory_bytes(device) - before),
            read_s=None if read_s is None else round(read_s, 2),
            restore_ms=None if restore_ms is None else round(restore_ms, 2),
        )

    # States at each context, on disk

    def _path(self, context: int) -> Path | None:
        return None if self.states is None else self.states / f"{self._id}-{context}.safetensors"

    def _file(self, context: int) -> Path | None:
        path = self._path(context)
        return path if path is not None and path.is_file() else None

    def _restore(self, context: int) -> float | None:
        """Take the state at `context` from disk; the milliseconds that took, None if there is none to take."""
        path = self._file(context)
        if path is None or context <= self._state.seqlen:
            return None
        started = time.perf_counter()
        try:
            state = DecodeState.load(path, self.model.config, device=self.model.device)
        except (ValueError, OSError):
            path.unlink(missing_ok=True)  # cut short, or not ours: read instead
            return None
        self._text.skip(context - self._state.seqlen, self._piece)
        self._state = state
        return 1e3 * (time.perf_counter() - started)

    def _save(self, context: int) -> None:
        path = self._path(context)
        if path is None or self._state.nbytes > SAVE_BYTES:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{time.time_ns()}")
        self._state.save(part)
        part.replace(path)  # whole or not at all


def run_together(sweeps: Sequence[Sweep], cancel: threading.Event | None = None) -> Iterator[Event]:
    """Several models, in turn at each context: the device is never theirs at once, and the lines grow side by side."""
    running = [sweep.run(cancel) for sweep in sweeps]
    while running:
        for events in list(running):
            for event in events:
                yield event
                if isinstance(event, Point):
                    break
            else:
                running.remove(events)


def charts(points: Sequence[Point], predictions: Mapping[str, Prediction]) -> tuple[Chart, Chart]:
    """Time of a token and memory over context: what was measured over what was predicted, for each model."""
    longest = max([point.context for point in points] + [CONTEXTS[-1]])
    shortest = min([point.context for point in points] + [CONTEXTS[0]])
    marks = sorted({round(shortest * (longest / shortest) ** (i / 24)) for i in range(25)})
    latency, memory = [], []
    for name, prediction in predictions.items():
        mine = [point for point in points if point.model == name]
        kind, end = prediction.config.kind, prediction.end_tokens
        reach = [c for c in marks if end is None or c <= end]
        reach += [] if end is None or end >= longest else [end]
        latency.append(
            Line(
                name,
                kind,
                tuple((point.context, point.ms) for point in mine),
                tuple((c, prediction.ms(c, mine)) for c in reach),
                end,
            )
        )
        memory.append(
            Line(
                name,
                kind,
                tuple((point.context, point.recurrent_bytes + point.cache_bytes) for point in mine),
                tuple((c, prediction.bytes(c)) for c in reach),
                end,
            )
        )
    return (
        Chart("Time for a token", milliseconds, tuple(latency), log_x=True),
        Chart("Memory of the conversation", mebibytes, tuple(memory), log_x=True, binary=True),
    )


def to_csv(points: Sequence[Point]) -> str:
    """One line a point, with a head."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [f.name for f in fields(Point)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(point) for point in points)
    return out.getvalue()


def _likeliest(logits: Tensor, config: ModelConfig) -> Tensor:
    logits = logits.clone()
    logits[:, config.embedding.img_context_token_id] = float("-inf")  # it would ask for a tile
    return logits.argmax(dim=-1)
