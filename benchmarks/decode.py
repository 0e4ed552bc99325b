"""Time to decode a token over the length of the context: a recurrent model beside one with a key-value cache.

    python -m benchmarks.decode --device cpu
    python -m benchmarks.decode --device cuda --full-size     # the published size: see benchmarks/decode_cuda.py
    python -m benchmarks.decode --device cpu --quantize none int8 int4 --gguf SmolLM2-135M.Q4_1.gguf
    python -m benchmarks.decode --device cpu --quantize int4 --contexts 100 1000 10000 100000 --longest-cache 10000

Both sides run in one process on the same tokens and take turns every few tokens, so that a slow moment of the machine
meets both. Contexts are really read, in pieces. Before any timing the bill is printed: the bytes that a token must
read, and the time that takes at the memory bandwidth measured here. The last line is one JSON object; the records also
go to benchmarks/results/decode-<device>.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from benchmarks import llama_cpp, machine, report, smollm2
from benchmarks.report import Record
from mmmamba import ModelInputs, cost, decode_one_token, load_model, prefill
from mmmamba.checkpoint import read_config, resolve_checkpoint
from mmmamba.model import MMMamba
from quantize import SCHEMES, quantize_

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WARM_UP_STEPS = 3
ROUNDS = 4  # turns that each side gets at a context


class Side(Protocol):
    """A model with its cache of one batch of contexts."""

    name: str
    weights: str  # where they come from
    weight_bytes: cost.WeightCount
    grows: bool  # what is kept of a context does, and with it the time that reading on takes

    def read(self, ids: Tensor) -> None:
        """Take (batch, n) tokens into the cache."""

    def step(self, token: Tensor) -> Tensor:
        """Feed (batch,) tokens, return the likeliest next ones."""

    def cache_bytes(self) -> int:
        """Bytes kept of the context; spare room that a cache allocates ahead is left out."""

    def traffic_bytes(self) -> int:
        """Bytes of the cache that a step reads and writes."""


class OurSide:
    """Any model of this project, as `decode_one_token` runs it."""

    def __init__(self, model: MMMamba, name: str, weights: str, batch: int, piece_size: int) -> None:
        self.model, self.name, self.weights = model, name, weights
        self.weight_bytes = cost.weight_bytes(model)
        self.batch, self.piece_size = batch, piece_size
        self.state = model.new_state(batch)
        self.grows = model.embedding.needs_rope or model.language.needs_rope

    def read(self, ids: Tensor) -> None:
        prefill(self.model, ModelInputs(ids), self.state, piece_size=self.piece_size)

    @torch.inference_mode()
    def step(self, token: Tensor) -> Tensor:
        logits = decode_one_token(self.model, token, self.state)
        logits[:, self.model.config.embedding.img_context_token_id] = float("-inf")  # it would ask for a tile
        return logits.argmax(dim=-1)

    def _bytes(self) -> tuple[int, int]:
        config, size = self.model.config, self.model.dtype.itemsize
        kv = cost.kv_cache_bytes(config, num_text_tokens=self.state.seqlen, batch=self.batch, element_bytes=size)
        return cost.state_bytes(config, batch=self.batch, element_bytes=size), kv

    def cache_bytes(self) -> int:
        return sum(self._bytes())

    def traffic_bytes(self) -> int:
        state, kv = self._bytes()
        return 2 * state + kv  # a recurrent state is read and written, keys and values are read


def load_ours(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    random_weights: bool,
    batch: int,
    piece_size: int,
    scheme: str | None = None,
) -> OurSide:
    if random_weights:
        with torch.device(device):
            model = MMMamba(read_config(resolve_checkpoint(name))).to(dtype).eval().requires_grad_(False)
        if scheme:
            quantize_(model, scheme)
    else:
        model = load_model(name, device=device, dtype=dtype, quantize=scheme)
    # A bundled name or a hub id as it stands, a directory without where it lies: records are for other machines too.
    label = "/".join(Path(name).resolve().parts[-2:]) if Path(name).is_dir() else name
    label += f" {scheme}" if scheme else ""
    return OurSide(model, label, "random" if random_weights else "checkpoint", batch, piece_size)


def measure(
    sides: Sequence[Side],
    tokens: Tensor,
    contexts: Sequence[int],
    steps: int,
    bandwidth: float,
    dtype: str,
    longest_cache: int | None = None,
) -> list[Record]:
    """Time `steps` tokens of every side after each context; the contexts grow out of one another.

    Args:
        tokens: (batch, at least the longest context) to read.   bandwidth: bytes a second, for the floor.
        longest_cache: sides whose cache grows are left out after longer contexts; None: nowhere.
    """
    batch, device = len(tokens), tokens.device
    records = []
    seen = 0
    for context in contexts:
        running = [side for side in sides if not side.grows or longest_cache is None or context <= longest_cache]
        points = [_read_up_to(side, sides, tokens, seen, context) for side in running]
        for turn in range(ROUNDS):
            for side, point in zip(running, points, strict=True):
                for _ in range(steps * turn // ROUNDS, steps * (turn + 1) // ROUNDS):
                    machine.synchronize(device)
                    started = time.perf_counter()
                    point.token = side.step(point.token)
                    machine.synchronize(device)
                    point.times_ms.append(1e3 * (time.perf_counter() - started))
        seen = context + steps
        for side, point in zip(running, points, strict=True):
            p20, median, p80 = report.spread(point.times_ms)
            record = Record(
                what=side.name,
                batch=batch,
                context=context,
                ms=round(median, 4),
                p20_ms=round(p20, 4),
                p80_ms=round(p80, 4),
                floor_ms=round(1e3 * (side.weight_bytes.per_token + point.traffic_bytes) / bandwidth, 4),
                tok_per_sec=round(1e3 * batch / median, 2),
                cache_bytes=point.cache_bytes,
                weight_bytes=side.weight_bytes.total,
                peak_bytes=point.peak_bytes,
                dtype=dtype,
                weights=side.weights,
                device=machine.device_name(device),
                date=datetime.now(UTC).strftime("%Y-%m-%d"),
            )
            print(row(record), flush=True)
            records.append(record)
    return records


@dataclass
class _Point:
    """A side that has read a context, and what is measured there."""

    token: Tensor
    cache_bytes: int
    traffic_bytes: int
    peak_bytes: int
    times_ms: list[float] = field(default_factory=list)


def _read_up_to(side: Side, sides: Sequence[Side], tokens: Tensor, seen: int, context: int) -> _Point:
    """Read on from `seen` tokens, the last few one by one as warm-up, so that the next step is the first after
    `context` tokens."""
    machine.reset_peak_memory(tokens.device)
    side.read(tokens[:, seen : context - WARM_UP_STEPS])
    token = tokens[:, context - WARM_UP_STEPS]
    for _ in range(WARM_UP_STEPS):
        token = side.step(token)
    # The other sides' weights and caches lie in memory too, but are not this side's need.
    others = sum(s.weight_bytes.total + s.cache_bytes() for s in sides if s is not side)
    peak = machine.peak_memory_bytes(tokens.device) - others
    return _Point(token, side.cache_bytes(), side.traffic_bytes(), peak)


def bill(side: Side, batch: int, bandwidth: float) -> str:
    """What a token must read at the least, before anything is timed."""
    read = side.weight_bytes.per_token
    return (
        f"{side.name} ({side.weights} weights): {report.mib(side.weight_bytes.total)} MiB of weights, a step reads "
        f"{report.mib(read)} MiB of them: at least {1e3 * read / bandwidth:.2f} ms, "
        f"at most {batch * bandwidth / read:,.0f} tokens/s, before state or cache"
    )


_HEAD = ("context", "ms a token", "p20", "p80", "floor ms", "tokens/s", "state or cache MiB", "peak MiB")


def row(r: Record | None) -> str:
    """A line of the table of results, or its head."""
    if r is None:
        cells = list(_HEAD)
    else:
        numbers = (r.ms, r.p20_ms, r.p80_ms, r.floor_ms)
        cells = [f"{r.context:,}", *(f"{n:.2f}" for n in numbers), f"{r.tok_per_sec:,.1f}"]
        cells += [report.mib(r.cache_bytes), report.mib(r.peak_bytes)]
    columns = (cell.rjust(max(len(head), 8)) for cell, head in zip(cells, _HEAD, strict=True))
    return "  ".join([("" if r is None else r.what).ljust(26), *columns])


def build_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=(__doc__ or "").splitlines()[0])
    p.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    p.add_argument("--dtype", nargs="+", default=["float32"], choices=tuple(DTYPES), help="one or both, in turn")
    p.add_argument("--model", nargs="+", default=["nano-linear"], help="models of this project (%(default)s)")
    p.add_argument("--random-weights", action="store_true", help="read the models' config.json alone")
    p.add_argument(
        "--quantize",
        nargs="+",
        default=["none"],
        choices=("none", *SCHEMES),
        metavar="SCHEME",
        help=f"weights of this project's models: none or {', '.join(SCHEMES)}; several in turn (%(default)s)",
    )
    p.add_argument(
        "--gguf", type=Path, default=None, metavar="FILE", help="SmolLM2-135M for llama.cpp, beside the rest"
    )
    p.add_argument("--no-baseline", action="store_true", help="leave transformers' SmolLM2-135M out")
    p.add_argument("--full-size", action="store_true", help="the published size on CUDA, all widths, contexts, batches")
    p.add_argument("--contexts", nargs="+", type=int, default=[100, 1000, 8000], metavar="N")
    p.add_argument(
        "--longest-cache", type=int, default=None, metavar="N", help="leave models with caches out after more tokens"
    )
    p.add_argument("--steps", type=int, default=40, metavar="N", help="timed tokens a context (%(default)s)")
    p.add_argument("--batch", type=int, default=1, metavar="N")
    p.add_argument("--piece-size", type=int, default=512, metavar="N", help="tokens read at once (%(default)s)")
    p.add_argument("--threads", type=int, default=None, metavar="N", help="CPU threads (default: torch's choice)")
    p.add_argument("--out", type=Path, default=None, help="default: benchmarks/results/decode-<device>.json")
    return p


def check_args(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for name, least in (("steps", 2), ("batch", 1), ("piece_size", 1), ("threads", 1)):
        if (value := getattr(args, name)) is not None and value < least:
            p.error(f"--{name.replace('_', '-')} {value} must be {least} or more")
    args.contexts.sort()
    for shorter, longer in zip([WARM_UP_STEPS - args.steps, *args.contexts], args.contexts, strict=False):
        if longer <= shorter + args.steps + WARM_UP_STEPS:
            p.error(
                f"--contexts {longer} leaves no room: the first must be above {2 * WARM_UP_STEPS}, the others "
                f"more than --steps + {WARM_UP_STEPS} apart"
            )
    if args.longest_cache is not None and args.longest_cache < args.contexts[0]:
        p.error(
            f"--longest-cache {args.longest_cache} leaves caches nothing: the shortest context is {args.contexts[0]}"
        )
    if args.gguf is not None and (args.device != "cpu" or args.batch != 1):
        p.error(f"--gguf {args.gguf} is for --device cpu and --batch 1")
    if args.gguf is not None and (fault := llama_cpp.fault(args.gguf)):
        p.error(fault)
    if args.device != "cpu" and not torch.cuda.is_available():
        p.error(f"--device {args.device}: torch sees no CUDA device here; use --device cpu")
    if args.full_size and args.device == "cpu":
        p.error("--full-size is timed on a GPU; add --device cuda, or leave it out")


def main(argv: Sequence[str] | None = None) -> int:
    p = build_parser()
    args = p.parse_args(argv)
    check_args(p, args)
    if args.full_size:
        from benchmarks import decode_cuda

        return decode_cuda.run(decode_cuda.POINTS, args.steps, args.out, baselines=not args.no_baseline)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    bandwidth, load = machine.measured(device)
    # Small ids: text in every vocabulary, and the speed does not depend on them.
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 128, (args.batch, args.contexts[-1]), generator=draw).to(device)

    records: list[Record] = []
    for dtype in args.dtype:
        sides = _load_sides(args, device, DTYPES[dtype])
        print(f"\n{dtype}, batch {args.batch}")
        for side in sides:
            print(bill(side, args.batch, bandwidth))
        print(row(None))
        records += measure(sides, tokens, args.contexts, args.steps, bandwidth, dtype, args.longest_cache)
        del sides, side
        gc.collect()  # the next dtype should find the memory as this one did
    after = machine.memory_bandwidth(device)
    out = args.out or report.RESULTS / f"decode-{machine.device_slug(device)}.json"
    report.save(records, out)
    print(f"\nbandwidth again: {after / 1e9:.1f} GB/s; records in {out}")
    summary = {
        "bench": "decode",
        "torch": torch.__version__,
        "bandwidth_bytes_per_s": round(bandwidth),
        "bandwidth_after_bytes_per_s": round(after),
        "load_average_before": load,
        "steps": args.steps,
        "note": "random weights where a record says so: speed does not depend on their values",
        "records": [asdict(r) for r in records],
    }
    print(json.dumps(summary, ensure_ascii=False))
    return 0


def _load_sides(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> list[Side]:
    sides: list[Side] = [
        load_ours(
            name,
            device,
            dtype,
            random_weights=args.random_weights,
            batch=args.batch,
            piece_size=args.piece_size,
            scheme=None if scheme == "none" else scheme,
        )
        for name in args.model
        for scheme in args.quantize
    ]
    if not args.no_baseline:
        sides.append(smollm2.load_baseline(device, dtype, piece_size=args.piece_size))
    if args.gguf is not None:
        longest = min(args.contexts[-1], args.longest_cache or args.contexts[-1])
        sides.append(llama_cpp.LlamaCppSide(args.gguf, longest + args.steps + WARM_UP_STEPS, args.piece_size))
    return sides


if __name__ == "__main__":
    sys.exit(main())
