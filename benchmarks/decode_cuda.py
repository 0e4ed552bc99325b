"""Time to decode a token on an NVIDIA GPU, at the published size: the fused decoder beside the ways it replaces.

    python -m benchmarks.decode --device cuda --full-size

Models have random weights, and contexts are not read: states and caches are filled with noise, since speed depends on
their size alone. Floors are the bytes of a step, counted on the real tensors, over the copy bandwidth measured in the
same run. A step is a graph replay with greedy sampling inside; its time is that between the ends of two steps while
the host runs ahead, as in a conversation.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks import full_size, machine, report
from benchmarks.full_size import Kind, Scheme, free_memory
from benchmarks.published import HuggingFaceTeacher, PublishedStudent
from benchmarks.report import Record
from mmmamba import cost
from mmmamba.decoder import make_decoder
from mmmamba.model import MMMamba
from mmmamba.sampling import SamplingParams
from mmmamba.state import DecodeState, KVState

COPY_BYTES = 1 << 32
WARM_UP_STEPS = 8
AHEAD = 2  # steps that the host is ahead of the tokens it takes
CONTEXT_1M = 1_000_000
CONTEXT_LONG = 103 * 1024
# What is timed: kind, scheme, batch, context. The first ones say the most, should a run be cut short.
POINTS: tuple[tuple[Kind, Scheme, int, int], ...] = (
    ("linear", "bf16", 1, 1000),
    ("linear", "bf16", 1, CONTEXT_1M),
    ("linear", "bf16", 8, 1000),
    ("linear", "bf16", 64, 1000),
    ("linear", "int8", 1, 1000),
    ("linear", "int4", 1, 1000),
    ("linear", "int8", 64, 1000),
    ("linear", "int4", 64, 1000),
    ("teacher", "bf16", 1, 1024),
    ("teacher", "bf16", 1, CONTEXT_LONG),
    ("hybrid", "bf16", 1, CONTEXT_LONG),
    ("hybrid", "int4", 1, CONTEXT_LONG),
)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a large copy reads and writes, the median of ten."""
    x = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return 2e3 * x.nbytes / report.spread(step_times_ms(lambda: y.copy_(x), 10, warm_up=3))[1]


def step_times_ms(step: Callable[[], object], steps: int, *, warm_up: int = WARM_UP_STEPS) -> list[float]:
    """Times between the ends of steps on the device; `step` only launches."""
    for _ in range(warm_up):
        step()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(events)]


@torch.no_grad()
def state_at(model: MMMamba, batch: int, context: int, room: int) -> DecodeState:
    """A state as if `context` tokens had been read, with room for more in its caches; noise in all of it."""
    state = model.new_state(batch)
    for stack in state.stacks:
        for layer in stack.layers:
            if isinstance(layer, KVState):
                layer.move_(0, context + room)
            for t in layer.tensors().values():
                t.normal_(0.0, 0.1)
        stack.seqlen = context
    return state


def fused_step(model: MMMamba, state: DecodeState) -> tuple[Callable[[], None], Callable[[], None]]:
    """A step of the fused decoder on a state, and what ends its session.

    Raises: ValueError if the fused decoder cannot run.
    """
    decoder, reason = make_decoder(model)
    if decoder is None:
        raise ValueError(f"the fused decoder cannot run here: {reason}")
    session = decoder.open([state], [SamplingParams(greedy=True)])
    session.begin(torch.randn(state.batch, decoder.layers.vocab_size, device=model.device).to(model.dtype))
    launched = 0

    def step() -> None:
        nonlocal launched
        session.advance()
        launched += 1
        if launched > AHEAD:
            session.take()

    return step, session.close


def measure(
    name: str, model: MMMamba, scheme: str, state: DecodeState, step: Callable[[], None], steps: int, bandwidth: float
) -> Record:
    """Time a step, and set it beside its floor."""
    device = model.device
    context, batch = state.seqlen, state.batch
    size = model.dtype.itemsize
    recurrent = cost.state_bytes(model.config, batch=batch, element_bytes=size)
    kv = cost.kv_cache_bytes(model.config, num_text_tokens=context, batch=batch, element_bytes=size)
    weights = cost.weight_bytes(model)
    p20, median, p80 = report.spread(step_times_ms(step, steps))
    return Record(
        what=name,
        batch=batch,
        context=context,
        ms=round(median, 4),
        p20_ms=round(p20, 4),
        p80_ms=round(p80, 4),
        floor_ms=round(1e3 * (weights.per_token + 2 * recurrent + kv) / bandwidth, 4),
        tok_per_sec=round(1e3 * batch / median, 1),
        cache_bytes=recurrent + kv,
        weight_bytes=weights.total,
        peak_bytes=machine.peak_memory_bytes(device),
        dtype=scheme,
        weights="random",
        device=machine.device_name(device),
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
    )


class Sweep:
    """Measures points one by one; the model of a point is kept for the next one, as long as that wants the same."""

    def __init__(self, steps: int, bandwidth: float, *, baselines: bool = True) -> None:
        self.steps, self.bandwidth, self.baselines = steps, bandwidth, baselines
        self._made: tuple[Kind, Scheme] | None = None
        self._model: MMMamba | None = None

    def model(self, kind: Kind, scheme: Scheme) -> MMMamba:
        if self._model is None or self._made != (kind, scheme):
            self._model = None
            free_memory()
            self._model = full_size.random_model(full_size.config_of(kind), torch.device("cuda"), scheme)
            self._made = kind, scheme
        return self._model

    def records(self, kind: Kind, scheme: Scheme, batch: int, context: int) -> Iterator[Record]:
        """The fused decoder, and at bf16 points the way that it replaces."""
        model = self.model(kind, scheme)
        state = state_at(model, batch, context, room=4 * self.steps)
        machine.reset_peak_memory(model.device)
        step, close = fused_step(model, state)
        yield measure(f"{kind}, fused", model, scheme, state, step, self.steps, self.bandwidth)
        close()
        del step, close
        free_memory()
        if not self.baselines or scheme != "bf16" or context == CONTEXT_1M or kind == "hybrid":
            return
        machine.reset_peak_memory(model.device)
        for stack in state.stacks:
            stack.seqlen = context
        baseline = PublishedStudent(model, state) if kind == "linear" else HuggingFaceTeacher(model, state)
        name = f"{kind}, {baseline.name}"
        yield measure(name, model, scheme, state, baseline.step, min(self.steps, 20), self.bandwidth)
        del baseline
        free_memory()


def row(record: Record) -> str:
    share = record.floor_ms / record.ms
    return (
        f"{record.what:62s} {record.dtype:5s} batch {record.batch:3d}  context {record.context:9,d}  "
        f"{record.ms:8.3f} ms ({record.p20_ms:.3f} to {record.p80_ms:.3f})  floor {record.floor_ms:7.3f} "
        f"({share:4.0%})  {record.tok_per_sec:10,.0f} tokens/s  kept {report.mib(record.cache_bytes)} MiB  "
        f"peak {report.mib(record.peak_bytes)} MiB"
    )


def run(points: Sequence[tuple[Kind, Scheme, int, int]], steps: int, out: Path | None, *, baselines: bool) -> int:
    """Print and keep the records of all points; the last line is one JSON object."""
    device = torch.device("cuda")
    bandwidth = copy_bandwidth(device)
    print(f"{machine.device_name(device)}; torch {torch.__version__}; a copy moves {bandwidth / 1e9:,.0f} GB/s")
    records = []
    path = out or report.RESULTS / f"decode-{machine.device_slug(device)}.json"
    timed = Sweep(steps, bandwidth, baselines=baselines)
    for point in points:
        for record in timed.records(*point):
            print(row(record), flush=True)
            records.append(record)
            report.save(records, path)
    summary = {
        "bench": "decode",
        "torch": torch.__version__,
        "bandwidth_bytes_per_s": round(bandwidth),
        "steps": steps,
        "note": "random weights and states: speed does not depend on their values",
        "records": [asdict(r) for r in records],
    }
    print(json.dumps(summary, ensure_ascii=False))
    return 0
