"""The training scan, ours against the others: `python -m benchmarks.kernels` on a machine with CUDA.

Prints the bill first: bytes that must be read and written, operations that must be done, and the least time for both at
the rates measured here. Then forward, and forward with backward, of every implementation that runs, in one process on
the same inputs, beside the error of output and gradients against the torch form in float64. The last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.machine import best_s, device_name, memory_bandwidth, synchronize
from benchmarks.report import spread
from mmmamba.kernels import select_scan
from mmmamba.kernels.chunked import ssd_scan_chunked

IMPLS = ("triton", "chunked-compiled", "chunked", "mamba_ssm")


class Shape(NamedTuple):
    """A scan of one layer. `segments` samples are packed into a row."""

    batch: int
    seqlen: int
    num_heads: int
    num_kv_heads: int
    dim: int
    chunk_size: int
    segments: int = 1

    def flops(self) -> tuple[float, float]:
        """Operations of the matrix products, forward and backward: pairs of tokens of a chunk that see each other, and
        the states between chunks."""
        length = min(self.chunk_size, self.seqlen)
        chunks = -(-self.seqlen // length)
        pairs = self.batch * self.num_heads * chunks * length * (length + 1) / 2
        states = self.batch * self.num_heads * self.seqlen * self.dim**2 if chunks > 1 else 0.0
        # Per pair and product 2 * dim: C B and its x forward; backward both again, dy x twice, and three gradients.
        return 2 * self.dim * pairs * 2 + 2 * states * 2, 2 * self.dim * pairs * 6 + 2 * states * 5

    def bytes(self, element_bytes: int) -> tuple[float, float]:
        """Bytes of the inputs and results, forward and backward; each once."""
        tokens = self.batch * self.seqlen
        kv, heads = (tokens * n * self.dim * element_bytes for n in (self.num_kv_heads, self.num_heads))
        dt = tokens * self.num_heads * 4
        return 2 * kv + 2 * heads + dt, 4 * kv + 3 * heads + 2 * dt  # x B C dt y; x B C dt dy dx dB dC ddt


SHAPES = {
    "nano-embedding": Shape(128, 368, 9, 3, 64, 512),
    "nano-language": Shape(128, 176, 9, 3, 64, 512),
    "nano-packed": Shape(1, 8192, 9, 3, 64, 512, segments=24),
    "2.6b": Shape(1, 8192, 16, 8, 128, 256),
    "2.6b-packed": Shape(1, 8192, 16, 8, 128, 256, segments=10),
    # The embedding stack of a packed row with 24 tiles, at several chunk lengths.
    "2.6b-embedding-128": Shape(1, 26_624, 16, 8, 128, 128, segments=8),
    "2.6b-embedding-256": Shape(1, 26_624, 16, 8, 128, 256, segments=8),
    "2.6b-embedding-512": Shape(1, 26_624, 16, 8, 128, 512, segments=8),
    "tiny": Shape(2, 40, 4, 2, 16, 16, segments=2),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--shapes", default="nano-embedding,nano-language,nano-packed,2.6b,2.6b-packed")
    parser.add_argument("--impls", default=",".join(IMPLS))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    bandwidth = memory_bandwidth(device, num_bytes=2**29 if device.type == "cuda" else 2**24)
    rate = _matmul_rate(device)
    print(f"{device_name(device)}: {bandwidth / 1e9:.0f} GB/s, {rate / 1e12:.1f} TFLOP/s in {dtype}", flush=True)
    records = []
    for name in args.shapes.split(","):
        shape = SHAPES[name]
        flops, moved = shape.flops(), shape.bytes(dtype.itemsize)
        floors = [max(f / rate, b / bandwidth) * 1e3 for f, b in zip(flops, moved, strict=True)]
        print(
            f"\n{name}: {shape._asdict()}\n  forward {moved[0] / 1e6:.0f} MB, {flops[0] / 1e9:.1f} GFLOP, at least "
            f"{floors[0]:.3f} ms; backward {moved[1] / 1e6:.0f} MB, {flops[1] / 1e9:.1f} GFLOP, at least "
            f"{floors[1]:.3f} ms",
            flush=True,
        )
        inputs, ids = random_inputs(shape, device, dtype)
        wanted = _results(ssd_scan_chunked, [t.double() for t in inputs], ids, shape)
        for impl in args.impls.split(","):
            record = {"shape": name, "impl": impl, "floor_ms": [round(f, 4) for f in floors]}
            record |= _measure(impl, inputs, ids, shape, wanted, args.steps)
            print(json.dumps(record), flush=True)
            records.append(record)
    print(
        json.dumps(
            {
                "benchmark": "kernels",
                "device": device_name(device),
                "date": datetime.date.today().isoformat(),
                "dtype": str(dtype),
                "records": records,
            }
        )
    )


def random_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[list[Tensor], Tensor | None]:
    """x, dt, A, B, C as a mixer passes them, and the segment ids."""
    g = torch.Generator().manual_seed(0)
    batch, seqlen, heads, kv_heads, dim = shape[:5]
    x, B = (torch.randn(batch, seqlen, kv_heads, dim, generator=g) for _ in range(2))
    C = torch.randn(batch, seqlen, heads, dim, generator=g)
    dt = F.softplus(torch.randn(batch, seqlen, heads, generator=g) - 3)
    A = -torch.exp(torch.ones(heads))
    ids = None
    if shape.segments > 1:
        ids = (torch.arange(seqlen) * shape.segments // seqlen).int().expand(batch, -1).contiguous().to(device)
    narrow = [t.to(device, dtype) for t in (x, B / dim**0.5, C)]
    return [narrow[0], dt.to(device), A.to(device), narrow[1], narrow[2]], ids


def _scan(impl: Any, device: torch.device) -> Callable[..., tuple[Tensor, Tensor]]:
    if impl == "chunked-compiled":
        return torch.compile(ssd_scan_chunked, dynamic=False)
    return select_scan(device.type, impl, True)


def _results(scan: Any, inputs: list[Tensor], ids: Tensor | None, shape: Shape) -> list[Tensor]:
    """y and the gradients of its sum of squares."""
    leaves = [t.clone().requires_grad_() for t in inputs]
    oracle = inputs[0].dtype == torch.float64  # in small chunks, to fit into memory
    y, _ = scan(*leaves, segment_ids=ids, chunk_size=min(64, shape.chunk_size) if oracle else shape.chunk_size)
    y.square().sum().backward()
    return [y.detach(), *(t.grad for t in leaves if t.grad is not None)]


def _measure(
    impl: str, inputs: list[Tensor], ids: Tensor | None, shape: Shape, wanted: list[Tensor], steps: int
) -> dict[str, Any]:
    device = inputs[0].device
    try:
        scan = _scan(impl, device)
        started = time.perf_counter()
        results = _results(scan, inputs, ids, shape)
        synchronize(device)
        first_ms = (time.perf_counter() - started) * 1e3
    except Exception as error:  # one that cannot run here is a line in the record, not the end of it
        return {"skipped": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    errors = [
        float((got.double() - want).square().mean().sqrt() / want.square().mean().sqrt())
        for got, want in zip(results, wanted, strict=True)
    ]
    leaves = [t.clone().requires_grad_() for t in inputs]
    grad = torch.randn_like(results[0])

    def forward() -> Tensor:
        return scan(*leaves, segment_ids=ids, chunk_size=shape.chunk_size, need_state=False)[0]

    def both() -> object:
        return torch.autograd.grad(forward(), leaves, grad)

    record: dict[str, Any] = {"first_ms": round(first_ms, 1)}
    timed: tuple[tuple[str, Callable[[], object]], ...] = (("forward", forward), ("forward_backward", both))
    for name, fn in timed:
        run = _captured(fn) if device.type == "cuda" else fn
        low, median, high = spread([best_s(run, device, repeats=1) * 1e3 for _ in range(max(2, steps))])
        record |= {f"{name}_ms": round(median, 4), f"{name}_p20_p80_ms": [round(low, 4), round(high, 4)]}
    names = ("y", "dx", "ddt", "dA", "dB", "dC")
    return record | {"relative_rms_error": {n: float(f"{e:.1e}") for n, e in zip(names, errors, strict=True)}}


def _captured(fn: Callable[[], object]) -> Callable[[], object]:
    """`fn` as a CUDA graph, as training replays it: what Python takes to launch it is no part of the time."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            fn()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fn()
    return graph.replay


def _matmul_rate(device: torch.device) -> float:
    """Operations a second of a matrix product on random data."""
    cuda = device.type == "cuda"
    size, dtype = (4096, torch.bfloat16) if cuda else (512, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / best_s(lambda: a @ b, device, repeats=8)


if __name__ == "__main__":
    main()
