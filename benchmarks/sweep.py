"""Grow the context: the same question after 1K, 4K, 16K, ... tokens of conversation, student beside teacher.

    python -m benchmarks.sweep --contexts 1024 4096 16384

The models take turns at each context; a context is really read, in pieces, or restored from --states. Before a model
that grows would run out of memory (or of --budget) its end is said, and it stops there. The last line is one JSON
object; records go to benchmarks/results/sweep-<device>.json, and with --csv and --png into those files too.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, report
from mmmamba import load_model
from mmmamba.chart import png
from mmmamba.checkpoint import weights_digest
from mmmamba.image import load_image, tile_image
from mmmamba.memory import free_memory_bytes
from mmmamba.model import MMMamba
from mmmamba.sweep import CONTEXTS, Point, Prediction, Reading, Skipped, Sweep, charts, predict, run_together, to_csv
from mmmamba.tokenizer import load_tokenizer
from quantize import SCHEMES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_HEAD = (
    "context",
    "image",
    "first token ms",
    "ms a token",
    "p20",
    "p80",
    "floor ms",
    "state MiB",
    "cache MiB",
    "read s",
)


def build_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=(__doc__ or "").splitlines()[0])
    p.add_argument("--model", nargs="+", default=["nano-linear", "nano-teacher"], help="(%(default)s)")
    p.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    p.add_argument("--dtype", default="float32", choices=tuple(DTYPES))
    p.add_argument("--quantize", default=None, choices=tuple(SCHEMES), help="weights in 8 or 4 bits, of all models")
    p.add_argument("--contexts", nargs="+", type=int, default=list(CONTEXTS), metavar="N")
    p.add_argument("--image", type=Path, default=None, help="repeat this picture; without it the context is text")
    p.add_argument("--steps", type=int, default=16, metavar="N", help="timed tokens a context (%(default)s)")
    p.add_argument("--budget", type=float, default=600.0, metavar="S", help="seconds of reading a model (%(default)s)")
    p.add_argument("--states", type=Path, default=None, help="keep states at each context here, and restore them")
    p.add_argument("--threads", type=int, default=None, metavar="N", help="CPU threads (default: torch's choice)")
    p.add_argument("--out", type=Path, default=None, help="default: benchmarks/results/sweep-<device>.json")
    p.add_argument("--csv", type=Path, default=None, help="also write the points as a table")
    p.add_argument("--png", type=Path, default=None, help="also draw them")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    p = build_parser()
    args = p.parse_args(argv)
    if args.device != "cpu" and not torch.cuda.is_available():
        p.error(f"--device {args.device}: torch sees no CUDA device here; use --device cpu")
    if args.threads:
        torch.set_num_threads(args.threads)
    device, load = torch.device(args.device), machine.load_average()
    bandwidth = machine.memory_bandwidth(device)
    print(f"{machine.device_name(device)}; torch {torch.__version__}; memory bandwidth {bandwidth / 1e9:.1f} GB/s")
    if load is not None and load > 0.5:
        print(f"The machine is busy (load {load:.1f}): the times below are worth little.", file=sys.stderr)
    models: list[MMMamba] = []
    for name in args.model:
        loaded = load_model(name, device=device, dtype=DTYPES[args.dtype], quantize=args.quantize, share=models)
        models.append(loaded)
    free = free_memory_bytes(device)
    predictions = {name: predict(model, bandwidth, free) for name, model in zip(args.model, models, strict=True)}
    for name, prediction in predictions.items():
        print(bill(name, prediction, args.contexts))
    try:
        sweeps = [_sweep(args, name, model, predictions[name]) for name, model in zip(args.model, models, strict=True)]
    except ValueError as error:
        p.error(str(error))
    points, skipped = measure(sweeps, predictions)

    date, where = datetime.now(UTC).strftime("%Y-%m-%d"), machine.device_name(device)
    about = {"dtype": args.dtype, "quantize": args.quantize, "device": where, "load_average": load, "date": date}
    records = [asdict(point) | about for point in points]
    out = args.out or report.RESULTS / f"sweep-{machine.device_slug(device)}.json"
    save(records, out)
    print(f"\nrecords in {out}")
    if args.csv:
        args.csv.write_text(to_csv(points), encoding="utf-8")
    if args.png:
        args.png.write_bytes(png(charts(points, predictions), f"{where}, {args.quantize or args.dtype}, {date}"))
    summary: dict[str, Any] = {
        "bench": "sweep",
        "torch": torch.__version__,
        "bandwidth_bytes_per_s": round(bandwidth),
        "load_average_before": load,
        "ends": {name: prediction.end_tokens for name, prediction in predictions.items()},
        "skipped": [asdict(skip) for skip in skipped],
        "records": records,
    }
    print(json.dumps(summary, ensure_ascii=False))
    return 0


def _sweep(args: argparse.Namespace, name: str, model: MMMamba, prediction: Prediction) -> Sweep:
    assert model.source is not None, "a loaded model knows its directory"
    return Sweep(
        model,
        load_tokenizer(model.source),
        name,
        prediction,
        contexts=args.contexts,
        pixel_values=None if args.image is None else tile_image(load_image(args.image), model.config),
        steps=args.steps,
        budget_s=args.budget,
        states=args.states,
        weights=weights_digest(model),
    )


def bill(name: str, prediction: Prediction, contexts: Sequence[int]) -> str:
    """What each context must cost, before anything is measured."""
    longest = max(contexts)
    end = prediction.end_tokens
    tells = "no end" if end is None else f"memory ends at about {end:,} tokens"
    empty, full = (report.mib(prediction.bytes(n)) for n in (0, longest))
    return (
        f"{name}: {empty} MiB of state and cache, {full} MiB at {longest:,} tokens; "
        f"a token at least {prediction.ms(0):.1f} ms, there {prediction.ms(longest):.1f} ms; {tells}"
    )


def measure(sweeps: Sequence[Sweep], predictions: dict[str, Prediction]) -> tuple[list[Point], list[Skipped]]:
    """Run the sweeps and print a row a point."""
    print("  ".join(["".ljust(16), *(head.rjust(max(9, len(head))) for head in _HEAD)]))
    points: list[Point] = []
    skipped: list[Skipped] = []
    for event in run_together(sweeps):
        if isinstance(event, Reading):
            if sys.stderr.isatty():
                print(f"\r{event.model}: {event.seen:,} of {event.context:,} tokens", end="\r", file=sys.stderr)
        elif isinstance(event, Skipped):
            skipped.append(event)
            print(f"{event.model}: {event.reason}", flush=True)
        else:
            points.append(event)
            print(_row(event, predictions[event.model].ms(event.context)), flush=True)
    return points, skipped


def _row(r: Point, floor_ms: float) -> str:
    read = "restored" if r.read_s is None else f"{r.read_s:.1f}"
    times = (f"{ms:.1f}" for ms in (r.ttft_ms, r.ms, r.p20_ms, r.p80_ms, floor_ms))
    sizes = (report.mib(r.recurrent_bytes), report.mib(r.cache_bytes))
    cells = (f"{r.context:,}", f"{r.image_tokens:,}", *times, *sizes, read)
    return "  ".join([r.model.ljust(16), *(c.rjust(max(9, len(h))) for c, h in zip(cells, _HEAD, strict=True))])


def save(records: Iterable[dict[str, Any]], path: Path) -> None:
    """Put records into a JSON list, each in place of an older one for the same question."""

    def key(r: dict[str, Any]) -> tuple[Any, ...]:
        return r["model"], r["context"], r["image_tokens"] > 0, r["dtype"], r.get("quantize"), r["device"]

    new = {key(r): r for r in records}
    old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ",\n".join(
        json.dumps(r, ensure_ascii=False) for r in [*(r for r in old if key(r) not in new), *new.values()]
    )
    path.write_text(f"[\n{rows}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
