"""Time to read a prompt: text of several lengths, an image with a question, several prompts at once.

    python -m benchmarks.prefill --device cuda          # the published size, random weights
    python -m benchmarks.prefill --device cpu --size nano

Prompts are random tokens, images random pixels. The floor is the greater of the operations of all matrix products by
weights over the rate of a large product measured in the same run, and the weights' bytes over the bandwidth. Beside
the fused way of reading stands torch's own (`MMMAMBA_DECODER=plain`, chunk scan in torch). The last line is one JSON
object; records also go to benchmarks/results/prefill-<device>.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import full_size, machine, report
from benchmarks.full_size import KINDS, SIZES, Kind, config_of, random_model
from benchmarks.report import Record
from mmmamba import ModelInputs, cost, prefill
from mmmamba.generate import piece_size
from mmmamba.kernels import SWITCH
from mmmamba.mixer import Mamba2Mixer
from mmmamba.model import MMMamba

WORDS = 40  # of a question about an image
LENGTHS = (1024, 8192, 103 * 1024)
MATMUL_SIZE = {"cuda": 8192, "cpu": 1024}


class Prompt(NamedTuple):
    """`tokens` of text a row, and tiles before them."""

    tokens: int
    tiles: int = 0
    batch: int = 1

    @property
    def name(self) -> str:
        image = f"{self.tiles} tile, " if self.tiles else ""
        return f"{image}{self.tokens:,} tokens"


def prompts(lengths: Sequence[int]) -> list[Prompt]:
    return [Prompt(WORDS, tiles=1), Prompt(WORDS, tiles=1, batch=8), *(Prompt(n) for n in lengths)]


def inputs_of(model: MMMamba, prompt: Prompt) -> ModelInputs:
    config = model.config
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 128, (prompt.batch, prompt.tokens), generator=draw)
    if not prompt.tiles:
        return ModelInputs(ids.to(model.device))
    per_tile, side = config.tokens_per_tile, config.image_size
    image = torch.full((prompt.batch, prompt.tiles * per_tile), config.embedding.img_context_token_id)
    pixels = torch.randn(prompt.batch * prompt.tiles, 3, side, side, generator=draw)
    # Ids stay on the host, as a conversation has them: how tokens lie is worked out there.
    return ModelInputs(torch.cat([image, ids], dim=1), pixels)


def floor_s(model: MMMamba, prompt: Prompt, rate: float, bandwidth: float) -> float:
    """Seconds that the matrix products by weights take at the least."""
    config = model.config
    image = prompt.tiles * config.tokens_per_tile
    positions = (prompt.tokens + image * config.embedding.stack_tokens_per_image_token, prompt.tokens + image)
    weights = [sum(p.numel() for p in stack.layers.parameters()) for stack in (model.embedding, model.language)]
    products = sum(n * count for n, count in zip(positions, weights, strict=True))
    return max(2 * prompt.batch * products / rate, cost.weight_bytes(model).per_token / bandwidth)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large product of random numbers."""
    size = MATMUL_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    a @ b
    return 2 * size**3 / machine.best_s(lambda: a @ b, device, repeats=5)


@contextmanager
def plain(model: MMMamba) -> Iterator[None]:
    """Torch's operators and chunk scan in place of the fused ones."""
    mixers = [m for m in model.modules() if isinstance(m, Mamba2Mixer)]
    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = "plain"
    for mixer in mixers:
        mixer.impl = "chunked"
    try:
        yield
    finally:
        for mixer in mixers:
            mixer.impl = "auto"
        del os.environ[SWITCH]
        if before is not None:
            os.environ[SWITCH] = before


def times_ms(model: MMMamba, inputs: ModelInputs, piece: int, repeats: int) -> tuple[list[float], int]:
    """Times from ids on the host to the logits of the last position; and bytes that the state takes then."""
    times = []
    kept = 0
    for turn in range(repeats + 1):
        state = model.new_state(len(inputs.input_ids))
        machine.synchronize(model.device)
        started = time.perf_counter()
        logits: Tensor = prefill(model, inputs, state, piece_size=piece)
        logits.argmax(dim=-1).tolist()  # the first token is there when the host has it
        if turn:  # the first warms up
            times.append(1e3 * (time.perf_counter() - started))
        kept = state.nbytes
    return times, kept


def measure(
    name: str, model: MMMamba, prompt: Prompt, piece: int, repeats: int, rate: float, bandwidth: float
) -> Record:
    device = model.device
    machine.reset_peak_memory(device)
    times, kept = times_ms(model, inputs_of(model, prompt), piece, repeats)
    p20, median, p80 = report.spread(times)
    image = prompt.tiles * model.config.tokens_per_tile
    return Record(
        what=f"{name}, {prompt.name}",
        batch=prompt.batch,
        context=prompt.tokens + image,
        ms=round(median, 3),
        p20_ms=round(p20, 3),
        p80_ms=round(p80, 3),
        floor_ms=round(1e3 * floor_s(model, prompt, rate, bandwidth), 3),
        tok_per_sec=round(1e3 * prompt.batch * (prompt.tokens + image) / median, 1),
        cache_bytes=kept,
        weight_bytes=cost.weight_bytes(model).total,
        peak_bytes=machine.peak_memory_bytes(device),
        dtype=str(model.dtype).removeprefix("torch."),
        weights="random",
        device=machine.device_name(device),
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
    )


def sweep(
    model: MMMamba, kind: Kind, wanted: Sequence[Prompt], piece: int, repeats: int, rate: float, bandwidth: float
) -> Iterator[Record]:
    """Records of all prompts; torch's way beside the fused one on CUDA."""
    given = (piece, repeats, rate, bandwidth)
    for prompt in wanted:
        if model.device.type == "cuda":
            yield measure(f"{kind}, fused", model, prompt, *given)
        with plain(model):
            yield measure(f"{kind}, torch", model, prompt, *given)


def row(r: Record) -> str:
    return (
        f"{r.what:40s} batch {r.batch:2d}  {r.ms:10.2f} ms ({r.p20_ms:.2f} to {r.p80_ms:.2f})  floor {r.floor_ms:9.2f} "
        f"({r.floor_ms / r.ms:4.0%})  {r.tok_per_sec:12,.0f} tokens/s  kept {report.mib(r.cache_bytes)} MiB  "
        f"peak {report.mib(r.peak_bytes)} MiB"
    )


def build_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.prefill", description=(__doc__ or "").splitlines()[0])
    p.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    p.add_argument("--size", default="2.6b", choices=tuple(SIZES))
    p.add_argument("--kind", nargs="+", default=["linear"], choices=KINDS)
    p.add_argument("--lengths", nargs="+", type=int, default=None, metavar="N", help=f"of text (default: {LENGTHS})")
    p.add_argument("--repeats", type=int, default=5, metavar="N", help="timed readings a prompt (%(default)s)")
    p.add_argument("--piece-size", type=int, default=None, metavar="N", help="tokens read at once")
    p.add_argument("--out", type=Path, default=None, help="default: benchmarks/results/prefill-<device>.json")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    p = build_parser()
    args = p.parse_args(argv)
    if args.repeats < 2:
        p.error(f"--repeats {args.repeats} must be 2 or more")
    lengths = args.lengths or LENGTHS
    if min(lengths) < 1:
        p.error(f"--lengths {min(lengths)} must be 1 or more")
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error("--device cuda: torch sees no CUDA device here; use --device cpu")
    device = torch.device(args.device)
    piece = args.piece_size or piece_size(device)
    bandwidth = machine.memory_bandwidth(device)
    rate = matmul_rate(device, torch.bfloat16)
    print(
        f"{machine.device_name(device)}; torch {torch.__version__}; memory bandwidth {bandwidth / 1e9:,.0f} GB/s, "
        f"products {rate / 1e12:,.2f} Tera-operations/s; pieces of {piece:,} tokens"
    )
    out = args.out or report.RESULTS / f"prefill-{machine.device_slug(device)}.json"
    records = []
    for kind in args.kind:
        model = random_model(config_of(kind, args.size), device)
        for record in sweep(model, kind, prompts(lengths), piece, args.repeats, rate, bandwidth):
            print(row(record), flush=True)
            records.append(record)
            report.save(records, out)
        del model
        full_size.free_memory()
    note = "random weights and prompts: speed does not depend on their values"
    print(json.dumps({"bench": "prefill", "note": note, "records": [asdict(r) for r in records]}, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
