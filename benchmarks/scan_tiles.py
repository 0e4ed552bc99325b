"""The training scan over tiles, warps and tiles in flight: what each kernel takes, for `mmmamba.kernels.ssd_op.TILES`.

    python -m benchmarks.scan_tiles --shape 2.6b-embedding-256

Every setting goes to all kernels at once; the time of each is read off the profiler, so that the fastest may be
picked kernel by kernel. A setting that does not compile is a line, not the end. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels import SHAPES, Shape, random_inputs
from benchmarks.machine import device_name, synchronize

KERNELS = ("chunk_states", "pass_states", "scan_forward", "scan_backward_kv", "scan_backward_q", "step_gradients")
# BLOCK x num_warps x num_stages, and the most registers a thread where a fourth number follows.
SETTINGS = "64x8x2,64x8x1,64x4x2,64x4x1,64x8x2x128,64x8x1x128,64x4x1x168,128x8x1,128x8x2"


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; see the module's text."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scan_tiles", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--shape", choices=tuple(SHAPES), default="2.6b-embedding-256")
    parser.add_argument(
        "--settings", default=SETTINGS, help="tokens x warps x stages [x registers], with commas between"
    )
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("this times Triton kernels on an NVIDIA GPU; torch sees none here")
    device = torch.device("cuda")
    shape = SHAPES[args.shape]
    inputs, ids = random_inputs(shape, device, torch.bfloat16)
    wanted: list[Tensor] | None = None
    records = []
    for setting in args.settings.split(","):
        tiles = parse(setting)
        record: dict[str, Any] = {"shape": args.shape, "setting": setting}
        try:
            found = run(shape, inputs, ids, tiles)
            wanted = wanted or found
            record["difference"] = float(f"{difference(found, wanted):.1e}")
            record |= times_us(shape, inputs, ids, tiles, args.steps)
        except Exception as error:  # a tile that needs too much shared memory, or a compiler that gives up
            record["skipped"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        print(json.dumps(record), flush=True)
        records.append(record)
    facts = {"device": device_name(device), "date": datetime.date.today().isoformat()}
    print(json.dumps({"benchmark": "scan_tiles", **facts, "records": records}))


def parse(setting: str) -> dict[str, int]:
    """ "64x8x2x128" as what kernels are launched with.  Raises: ValueError if it is not three or four numbers."""
    numbers = setting.split("x")
    if len(numbers) not in (3, 4) or not all(n.isdigit() for n in numbers):
        raise ValueError(f'setting "{setting}" is not known; use BLOCKxWARPSxSTAGES or BLOCKxWARPSxSTAGESxREGISTERS')
    return dict(zip(("BLOCK", "num_warps", "num_stages", "maxnreg"), map(int, numbers), strict=False))


def run(shape: Shape, inputs: list[Tensor], ids: Tensor | None, tiles: dict[str, int]) -> list[Tensor]:
    """y and the gradients of x, dt, A, B, C for y itself."""
    from mmmamba.kernels import ssd_op

    x, dt, A, B, C = inputs
    before = dict(ssd_op.TILES)
    try:
        ssd_op.TILES.update({name: tiles for name in KERNELS if name.startswith("scan") or name == "chunk_states"})
        scan = ssd_op.Scan(x, dt, A, B, C, ids, shape.chunk_size)
        return [scan.y, *scan.gradients(scan.y)]
    finally:
        ssd_op.TILES.clear()
        ssd_op.TILES.update(before)


def difference(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest relative RMS difference; settings change the order of sums, not what is summed."""
    pairs = zip(found, wanted, strict=True)
    return max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs)


def times_us(
    shape: Shape, inputs: list[Tensor], ids: Tensor | None, tiles: dict[str, int], steps: int
) -> dict[str, float]:
    """Microseconds of each kernel a pass, forward and backward, and of all of the pass."""
    synchronize(inputs[0].device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            run(shape, inputs, ids, tiles)
        synchronize(inputs[0].device)
    events = profile.key_averages()
    total = sum(event.self_device_time_total for event in events) / steps
    found = {n: sum(e.self_device_time_total for e in events if e.key == n) / steps for n in KERNELS}
    return {name: round(time, 1) for name, time in found.items()} | {"all": round(total, 1)}


if __name__ == "__main__":
    main()
