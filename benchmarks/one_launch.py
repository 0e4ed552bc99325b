"""A token in one launch beside a token in many, at the published size, on a card: agreement, faults, time, floor.

    python -m benchmarks.one_launch --out FILE [--layers 2] [--schemes bf16 int8 int4] [--rows 1 4]

Every scheme is a process of its own, and every step a line of JSON in FILE as soon as it is known: what fails or hangs
takes nothing else with it. Agreement is that of the first layer of each stack with the plain path, over a few tokens,
launched one by one and as a graph; beside it, that of the decoder of many launches.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import full_size, report
from benchmarks.decode_cuda import copy_bandwidth, state_at, step_times_ms
from benchmarks.full_size import SCHEMES, SIZES, config_of
from mmmamba import cost
from mmmamba.model import MMMamba

if TYPE_CHECKING:
    from mmmamba.decoder.fused import FusedDecoder

TOKENS, SKIPPED = 7, 2
STEPS = 60


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="lines of JSON are added to it")
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=["bf16", "int8", "int4"])
    parser.add_argument("--rows", nargs="+", type=int, choices=(1, 2, 4), default=[1, 4])
    parser.add_argument("--size", choices=sorted(SIZES), default="2.6b")
    parser.add_argument("--layers", type=int, help="of each stack; all of them by default")
    parser.add_argument("--warps", type=int, help="that compute, in a block")
    parser.add_argument("--piece", type=int, help="bytes of a row of weights that are copied at once")
    about = "up to so many rows the many launches keep weights in registers, above on tensor cores"
    parser.add_argument("--few-rows", type=int, help=about)
    parser.add_argument("--seconds", type=float, default=90, help="for everything; a scheme gets its share")
    parser.add_argument("--child", choices=SCHEMES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        measure(args)
        return 0
    args.out.parent.mkdir(parents=True, exist_ok=True)
    end, failed = time.monotonic() + args.seconds, 0
    for i, scheme in enumerate(args.schemes):
        share = max(5.0, (end - time.monotonic()) / (len(args.schemes) - i))
        command = [sys.executable, "-m", "benchmarks.one_launch", *sys.argv[1:], "--seconds", str(share)]
        try:
            status = subprocess.run([*command, "--child", scheme], timeout=share + 3, check=False).returncode
        except subprocess.TimeoutExpired:
            status = -1
        if status:
            failed = 1
            note(args, scheme, "failed", status=status)
    return failed


def note(args: argparse.Namespace, scheme: str, step: str, **found: Any) -> None:
    """One line more in the file, and on the screen."""
    line = json.dumps({"scheme": scheme, "step": step, **found})
    with args.out.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    print(line, flush=True)


def measure(args: argparse.Namespace) -> None:
    """All steps of one scheme."""
    faulthandler.dump_traceback_later(args.seconds, exit=True)
    from mmmamba.decoder import one_launch as kernel
    from mmmamba.decoder import workspace
    from mmmamba.decoder.fused import FusedDecoder
    from mmmamba.decoder.session import Binding
    from mmmamba.kernels.sampler import DrawKind

    scheme, device = args.child, torch.device("cuda")
    kernel.WARPS, kernel.PIECE = args.warps or kernel.WARPS, args.piece or kernel.PIECE
    greedy = DrawKind(greedy=True, penalty=False, top_k=False, top_p=False)
    bandwidth = copy_bandwidth(device)
    note(args, scheme, "bandwidth", gb_per_s=round(bandwidth / 1e9), device=torch.cuda.get_device_name())
    begun = time.perf_counter()
    shallow = full_size.random_model(config_of("linear", args.size, layers=(1, 1)), device, scheme)
    layers = None if args.layers is None else (args.layers, args.layers)
    model = full_size.random_model(config_of("linear", args.size, layers=layers), device, scheme)
    torch.cuda.synchronize()
    note(args, scheme, "made", seconds=round(time.perf_counter() - begun, 1))
    weights = cost.weight_bytes(model).per_token
    few_rows = workspace.FEW_ROWS
    for one_launch in (True, False):
        if not one_launch and args.few_rows is not None:
            workspace.FEW_ROWS = few_rows = args.few_rows
        for rows in args.rows:
            about: dict[str, Any] = {"rows": rows, "one_launch": one_launch, "few_rows": few_rows}
            try:
                begun = time.perf_counter()
                decoder = FusedDecoder(shallow, one_launch=(rows,) if one_launch else ())
                decoder.reserve(rows)
                note(args, scheme, "compiled", **about, seconds=round(time.perf_counter() - begun, 1))
                for graph in (False, True):
                    found = agreement(shallow, decoder, rows, graph=graph)
                    note(args, scheme, "agreement", **about, replayed=graph, **found)
                decoder = FusedDecoder(model, one_launch=(rows,) if one_launch else ())
                space = decoder._take(rows)
                state = state_at(model, rows, 1000, room=0)  # held: the tables say where it lies
                Binding(space, [state]).make_room()
                space.draws.alive.fill_(1)
                space.draws.stops.fill_(-1)
                times = step_times_ms(lambda space=space: space.run(None), STEPS)  # type: ignore[misc]
                drawn = step_times_ms(lambda space=space: space.run(greedy), STEPS)  # type: ignore[misc]
                moved = weights + 2 * cost.state_bytes(model.config, batch=rows)
                note(
                    args,
                    scheme,
                    "time",
                    **about,
                    ms=[round(t, 4) for t in report.spread(times)],
                    ms_with_draw=round(report.spread(drawn)[1], 4),
                    floor_ms=round(1e3 * moved / bandwidth, 4),
                    fault=space.one.fault if space.one is not None else "",
                )
                del decoder, space, state
            except Exception as error:  # the next number of rows may do better, unless the context is lost
                note(args, scheme, "error", **about, error=f"{type(error).__name__}: {error}"[:1500])


@torch.inference_mode()
def agreement(model: MMMamba, decoder: FusedDecoder, rows: int, *, graph: bool) -> dict[str, Any]:
    """Differences of the logits from the plain path's over a few tokens, and the fault of the kernel if it had one.

    Returns: `rms`, the median over tokens of the relative RMS; `largest` difference of a logit, and the largest logit.
    """
    mine, plain = model.new_state(rows), model.new_state(rows)
    errors, largest, size = [], 0.0, 0.0
    for i in range(TOKENS):
        ids = torch.tensor([3 + 7 * i + 11 * row for row in range(rows)], device=model.device)
        want = model(ids[:, None], None, plain)[:, -1].float()
        got = decoder.decode_one_token(ids, mine, graph=graph).float()
        if i >= SKIPPED:
            errors.append(((got - want).square().mean() / want.square().mean()).sqrt())
            largest, size = max(largest, float((got - want).abs().max())), max(size, float(want.abs().max()))
    spaces = [space for free in decoder._free.values() for space in free]
    return {
        "rms": round(float(torch.stack(errors).median()), 5),
        "largest": round(largest, 4),
        "largest_logit": round(size, 2),
        "fault": next((space.one.fault for space in spaces if space.one is not None), ""),
    }


if __name__ == "__main__":
    sys.exit(main())
