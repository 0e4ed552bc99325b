"""Whether a token takes as long after a very long context as after a short one: a recurrent model's states, in turns.

    python -m benchmarks.flat --quantize int4
    python -m benchmarks.flat --quantize int4 --states runs/states     # a second run has nothing to read

Contexts are really read, in pieces; with --states the state at each is kept as a file, which is taken for the same
weights alone. Then tokens are timed after each context in turn, one by one, so that a slow moment of the machine meets
all of them. The last line is one JSON object; records also go to benchmarks/results/decode-<device>-long.json, as those
of benchmarks.decode.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from benchmarks import decode, machine, report
from benchmarks.decode import DTYPES, WARM_UP_STEPS, OurSide
from benchmarks.report import Record
from mmmamba import MMMamba
from mmmamba.checkpoint import weights_digest
from mmmamba.state import DecodeState
from quantize import SCHEMES


def states_at(side: OurSide, tokens: Tensor, contexts: Sequence[int], folder: Path | None) -> list[DecodeState]:
    """The state after each context: from `folder` if it is there, else read on from the one before, and kept there."""
    states: list[DecodeState] = []
    for context in contexts:
        file = None if folder is None else _file(folder, side, context)
        if file is not None and file.is_file():
            side.state = DecodeState.load(file, side.model.config, device=side.model.device)
            print(f"{context:,} tokens: from {file.name}", flush=True)
        else:
            started = time.perf_counter()
            side.read(tokens[:, side.state.seqlen : context])
            machine.synchronize(tokens.device)
            print(f"{context:,} tokens: read, {time.perf_counter() - started:.1f} s more", flush=True)
            if file is not None:
                part = file.with_suffix(".part")
                side.state.save(part)
                part.replace(file)
        states.append(side.state.clone())
    return states


def _file(folder: Path, side: OurSide, context: int) -> Path:
    model: MMMamba = side.model
    name = f"{side.name}-{weights_digest(model)}-{model.dtype}-{context}".replace("/", "-").replace(" ", "-")
    return folder / f"{name}.safetensors"


def measure(side: OurSide, states: Sequence[DecodeState], token: Tensor, turns: int) -> tuple[list[list[float]], int]:
    """Milliseconds of a token after each state, (states, turns), and the most memory that the process held meanwhile.

    In a turn every state is advanced twice: once to have it and the weights where a conversation has them, once timed.
    """
    device = token.device
    times: list[list[float]] = [[] for _ in states]
    machine.reset_peak_memory(device)
    for turn in range(WARM_UP_STEPS + turns):
        for i in range(len(states)):
            at = (i + turn) % len(states)  # nobody is always first
            side.state = states[at]
            token = side.step(token)
            machine.synchronize(device)
            started = time.perf_counter()
            token = side.step(token)
            machine.synchronize(device)
            if turn >= WARM_UP_STEPS:
                times[at].append(1e3 * (time.perf_counter() - started))
    return times, machine.peak_memory_bytes(device)


def records_of(
    side: OurSide, contexts: Sequence[int], times: Sequence[Sequence[float]], peak: int, bandwidth: float
) -> list[Record]:
    floor_ms = 1e3 * (side.weight_bytes.per_token + side.traffic_bytes()) / bandwidth
    found = []
    for context, mine in zip(contexts, times, strict=True):
        p20, middle, p80 = report.spread(mine)
        record = Record(
            what=side.name,
            batch=1,
            context=context,
            ms=round(middle, 4),
            p20_ms=round(p20, 4),
            p80_ms=round(p80, 4),
            floor_ms=round(floor_ms, 4),
            tok_per_sec=round(1e3 / middle, 2),
            cache_bytes=side.cache_bytes(),
            weight_bytes=side.weight_bytes.total,
            peak_bytes=peak,
            dtype=str(side.model.dtype).removeprefix("torch."),
            weights=side.weights,
            device=machine.device_name(side.model.device),
            date=datetime.now(UTC).strftime("%Y-%m-%d"),
        )
        found.append(record)
    return found


def ratios(times: Sequence[Sequence[float]]) -> list[float]:
    """Of each context's time over the first one's in the same turn, the median."""
    return [round(median(b / a for a, b in zip(times[0], mine, strict=True)), 4) for mine in times]


def build_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.flat", description=(__doc__ or "").splitlines()[0])
    p.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    p.add_argument("--dtype", default="float32", choices=tuple(DTYPES))
    p.add_argument("--model", default="nano-linear", help="a linear model (%(default)s)")
    p.add_argument("--quantize", default=None, choices=tuple(SCHEMES), help="default: as it is stored")
    p.add_argument("--contexts", nargs="+", type=int, default=[100, 1000, 10_000, 100_000], metavar="N")
    p.add_argument("--turns", type=int, default=60, metavar="N", help="timed tokens a context (%(default)s)")
    p.add_argument("--piece-size", type=int, default=512, metavar="N", help="tokens read at once (%(default)s)")
    p.add_argument("--states", type=Path, default=None, metavar="FOLDER", help="keep states here, and restore them")
    p.add_argument("--threads", type=int, default=None, metavar="N", help="CPU threads (default: torch's choice)")
    p.add_argument("--out", type=Path, default=None, help="default: benchmarks/results/decode-<device>-long.json")
    return p


def check_args(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for name, least in (("turns", 2), ("piece_size", 1), ("threads", 1)):
        if (value := getattr(args, name)) is not None and value < least:
            p.error(f"--{name.replace('_', '-')} {value} must be {least} or more")
    args.contexts.sort()
    if args.contexts[0] < 1 or any(a == b for a, b in pairwise(args.contexts)):
        p.error(f"--contexts {args.contexts} must be 1 or more, and each another one")
    if args.device != "cpu" and not torch.cuda.is_available():
        p.error(f"--device {args.device}: torch sees no CUDA device here; use --device cpu")
    if args.states is not None:
        args.states.mkdir(parents=True, exist_ok=True)


def main(argv: Sequence[str] | None = None) -> int:
    p = build_parser()
    args = p.parse_args(argv)
    check_args(p, args)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    given = {"random_weights": False, "batch": 1, "piece_size": args.piece_size, "scheme": args.quantize}
    side = decode.load_ours(args.model, device, DTYPES[args.dtype], **given)
    if side.grows:
        p.error(f"--model {args.model} keeps a cache, whose time grows; python -m benchmarks.decode measures it")
    draw = torch.Generator().manual_seed(0)
    # Small ids: text in every vocabulary, and the speed does not depend on them.
    tokens = torch.randint(3, 128, (1, args.contexts[-1]), generator=draw).to(device)
    states = states_at(side, tokens, args.contexts, args.states)
    bandwidth, load = machine.measured(device)
    print(decode.bill(side, 1, bandwidth))
    times, peak = measure(side, states, tokens[:, -1], args.turns)
    records = records_of(side, args.contexts, times, peak, bandwidth)
    print(decode.row(None))
    for record, ratio in zip(records, ratios(times), strict=True):
        print(f"{decode.row(record)}  {ratio:.3f} of the first")
    after = machine.memory_bandwidth(device)
    out = args.out or report.RESULTS / f"decode-{machine.device_slug(device)}-long.json"
    report.save(records, out)
    print(f"\nbandwidth again: {after / 1e9:.1f} GB/s; records in {out}")
    summary = {
        "bench": "flat",
        "torch": torch.__version__,
        "bandwidth_bytes_per_s": round(bandwidth),
        "bandwidth_after_bytes_per_s": round(after),
        "load_average_before": load,
        "turns": args.turns,
        "ratios": dict(zip(args.contexts, ratios(times), strict=True)),
        "records": [asdict(r) for r in records],
    }
    print(json.dumps(summary, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
