"""Shapes of the grids: how many rows a program takes, with how many warps, and what the card offers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from mmmamba.kernels.weights import PHASES, Weight

LOADS_IN_FLIGHT = 8  # 16-byte loads that a thread starts before it uses the first
MAX_WARPS = 8
PROGRAMS_PER_SM = 4  # below this some multiprocessors idle while others work on
MAX_TILE_BYTES = 1 << 16  # of one row of weights: a program holds whole rows in registers


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


@cache
def multiprocessors(device: torch.device) -> int:
    """How many the card has; off CUDA (Triton's interpreter) a small number."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@cache
def overlaps_launches(device: torch.device) -> bool:
    """Whether a kernel may start before the one ahead of it ends (programmatic dependent launch, from Hopper on)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@dataclass(frozen=True)
class GemvShape:
    """`block_n` rows a program, all `block_w` words of each (a power of two), with `num_warps`."""

    block_n: int
    block_w: int
    num_warps: int


# What `benchmarks.gpu_check --stages shapes` found fastest on an H100 (2026-11-25) where the rule below is slower:
# (kind, rows, columns) of a weight -> rows a program, warps. Matrices read in pairs (gate and up) have rows of one.
_MEASURED = {
    ("dense", 2048, 2048): (2, 4),
    ("dense", 8192, 2048): (1, 8),
    ("dense", 2048, 8192): (4, 16),
    ("dense", 92553, 2048): (2, 8),
    ("int8", 2048, 8192): (4, 16),
}


def gemv_shape(weight: Weight, device: torch.device, *, tiles: int = 1) -> GemvShape:
    """A program whose threads each start `LOADS_IN_FLIGHT` loads of 16 bytes, and lie side by side along K: then x
    needs no exchange between threads.

    Args: tiles: matrices that a program reads at once (2 for gate and up).
    """
    rows, columns = weight.shape
    phases = PHASES[weight.kind]
    block_w = next_power_of_2(columns // phases)
    known = _MEASURED.get((weight.kind, rows, columns))
    if known is not None and overlaps_launches(device):
        return GemvShape(known[0], block_w, known[1])
    vector = 16 // (4 if phases > 1 else weight.data.itemsize)  # words a load
    warps = min(MAX_WARPS, max(1, block_w // (32 * vector)))
    per_row = max(1, block_w // (32 * warps * vector))
    block_n = max(1, LOADS_IN_FLIGHT // (per_row * tiles))
    enough = PROGRAMS_PER_SM * multiprocessors(device)
    while block_n > 1 and -(-rows // block_n) < enough:
        block_n //= 2
    return GemvShape(block_n, block_w, warps)
