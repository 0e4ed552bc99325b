"""Weights of the next launch asked for while this one still computes, so that the memory never rests between the two.

A decoding step is a chain of short kernels: each waits for the one before it, reads a few kilobytes, multiplies, sums
up over its threads and stores. Meanwhile nothing moves from memory, for about 2 to 3 µs a launch, unless somebody has
asked for what comes next. From Hopper on one thread of a program can ask for any run of bytes to be brought into L2.
"""

from __future__ import annotations

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# Triton reads the annotations of a kernel as marks of compile-time constants, so its pointers and numbers have none.
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

ALIGNMENT = 16  # bytes: addresses and sizes of what is asked for are multiples
LINE = 128  # bytes of a line of L2; programs ask for whole ones


@triton.jit
def fetch_ahead(base, start, share, stop):
    """Bring a program's share of the bytes `start` to `stop` at `base` into L2: those from program_id * share on."""
    at = start + tl.program_id(0) * share
    size = tl.minimum(share, stop - at)
    tl.inline_asm_elementwise(
        """
        {
            .reg .pred first, some;
            .reg .u32 thread;
            mov.u32 thread, %tid.x;
            setp.eq.u32 first, thread, 0;
            setp.gt.s32 some, $2, 0;
            and.pred first, first, some;
            @first cp.async.bulk.prefetch.L2.global [$1], $2;
            mov.u32 $0, 0;
        }
        """,
        "=r,l,r",
        [base.to(tl.int64) + at, size],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@dataclass(frozen=True)
class Ahead:
    """Bytes `start` to `stop` of each of one or two tensors, cut to what they hold and to whole units."""

    tensors: tuple[Tensor, ...]
    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 1 <= len(self.tensors) <= 2:
            raise ValueError(f"{len(self.tensors)} tensors are to be read ahead of; one or two can be")

    def arguments(self, programs: int) -> tuple[Tensor | None, Tensor | None, int, int, int]:
        """(first tensor, second, start, a program's share, stop) for a launch of so many programs; no tensors where
        there is nothing to ask for, or an address that cannot be asked for."""
        stop = min([self.stop, *(t.nbytes for t in self.tensors)]) // ALIGNMENT * ALIGNMENT
        start = self.start // LINE * LINE
        if start >= stop or any(t.data_ptr() % ALIGNMENT for t in self.tensors):
            return None, None, 0, 0, 0
        share = -(-(stop - start) // (programs * LINE)) * LINE
        first, *rest = self.tensors
        return first, rest[0] if rest else None, start, share, stop


NOTHING: tuple[Tensor | None, Tensor | None, int, int, int] = (None, None, 0, 0, 0)
