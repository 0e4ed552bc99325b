"""Attention over packed rows at the published size: ways to have it on an NVIDIA GPU, forward, side by side.

    python -m benchmarks.attention

    flash          keys and values copied for every query head, as each version of torch takes them
    flash-grouped  without the copies, where torch's variable-length attention knows of groups
    cudnn          cuDNN's kernels by torch's own operator, copied and (`cudnn-grouped`) not

One that does not run here is a line, not the end. `difference` is relative RMS from `flash`. The last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels import SHAPES, Shape
from benchmarks.machine import best_s, device_name
from benchmarks.report import spread
from mmmamba.segments import Segments

WAYS = ("flash", "flash-grouped", "cudnn", "cudnn-grouped")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", default="2.6b-embedding-256,2.6b-packed", help="names in benchmarks.kernels")
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("this times CUDA kernels; torch sees no GPU here")
    if unknown := [name for name in args.shapes.split(",") if name not in SHAPES]:
        parser.error(f"--shapes {','.join(unknown)}: known are {', '.join(SHAPES)}")
    records = [record for name in args.shapes.split(",") for record in measure(name, SHAPES[name], args.steps)]
    facts = {"device": device_name(torch.device("cuda")), "torch": torch.__version__}
    facts["date"] = datetime.date.today().isoformat()
    print(json.dumps({"benchmark": "attention", **facts, "records": records}))


def measure(name: str, shape: Shape, steps: int) -> list[dict[str, Any]]:
    """A record a way."""
    device = torch.device("cuda")
    q, k, v, segments = inputs(shape, device)
    lengths = segments.cu_seqlens.diff().double()
    flops = 4.0 * shape.num_heads * shape.dim * float((lengths * (lengths + 1) / 2).sum())
    wanted: Tensor | None = None
    records = []
    for way in WAYS:
        record: dict[str, Any] = {"shape": name, "way": way}
        try:
            attend = attention(way, q, k, v, segments)
            found = attend().float()
            wanted = found if wanted is None else wanted
            record["difference"] = float(f"{float((found - wanted).norm() / wanted.norm()):.1e}")
            low, median, high = spread([best_s(attend, device, repeats=1) * 1e3 for _ in range(max(2, steps))])
            record |= {"ms": round(median, 3), "p20_p80_ms": [round(low, 3), round(high, 3)]}
            record["tflop_per_s"] = round(flops / median / 1e9)
        except Exception as error:  # what this torch or cuDNN does not have
            record["skipped"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        print(json.dumps(record), flush=True)
        records.append(record)
    return records


def inputs(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Segments]:
    """q (tokens, num_heads, dim), k and v (tokens, num_kv_heads, dim) in bf16, of one row."""
    g = torch.Generator().manual_seed(0)
    draw = [torch.randn(shape.seqlen, n, shape.dim, generator=g) for n in (shape.num_heads, *[shape.num_kv_heads] * 2)]
    q, k, v = (t.to(device, torch.bfloat16) for t in draw)
    segments = Segments.of((torch.arange(shape.seqlen) * shape.segments // shape.seqlen)[None])
    return q, k, v, Segments(*(t.to(device) for t in segments))


def attention(way: str, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Callable[[], Tensor]:
    """A way as a function of nothing; copies of keys and values are part of it."""
    seqlen, rep = q.shape[0], q.shape[1] // k.shape[1]
    borders = segments.cu_seqlens

    def copied(t: Tensor) -> Tensor:
        return t if way.endswith("grouped") else t.repeat_interleave(rep, dim=1)

    if way.startswith("cudnn"):
        # As torch's variable-length attention would call it, which has it switched off.
        cudnn = torch.ops.aten._cudnn_attention_forward

        def attend() -> Tensor:
            longest = seqlen, seqlen
            given = q, copied(k), copied(v), None, borders, borders, *longest
            result: Tensor = cudnn(*given, False, 0.0, True, False)[0]
            return result

        return attend
    from torch.nn.attention import varlen

    flash: Callable[..., Tensor] = varlen.varlen_attn  # type: ignore[assignment]
    options: dict[str, Any] = {"window_size": (-1, 0)} | ({"enable_gqa": True} if way.endswith("grouped") else {})
    return lambda: flash(q, copied(k), copied(v), borders, borders, seqlen, seqlen, **options)


if __name__ == "__main__":
    main()
