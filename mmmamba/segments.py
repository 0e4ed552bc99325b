"""Rows that hold more or less than one sequence: samples packed one behind the other, of which none sees another, and
sequences of different lengths filled up at their ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Segments(NamedTuple):
    """Where the samples of packed rows begin and end. Recurrent state, convolution and attention stop at the borders,
    rotary positions start anew there.

    ids: (batch, seqlen), int32: equal within a segment, greater in the next one of the row.
    positions: (batch, seqlen), int64: of each token in its segment, from 0.
    lengths: (batch, seqlen), int64: of each token's segment.
    cu_seqlens: (segments + 1,), int32: where each segment begins in the flattened batch, and the end; repeated at the
        end as often as there are empty slots.
    """

    ids: Tensor
    positions: Tensor
    lengths: Tensor
    cu_seqlens: Tensor

    @classmethod
    def of(cls, ids: Tensor, max_segments: int | None = None) -> Segments:
        """Read the borders off `ids` (batch, seqlen), whole numbers that never fall along a row, on the CPU.

        Args:
            max_segments: slots of `cu_seqlens`, for shapes that do not depend on the batch; None: as many as there are.
        Raises: ValueError for ids of another shape or that fall, or more segments than slots.
        """
        if ids.ndim != 2 or ids.shape[1] == 0:
            raise ValueError(f"segment ids have shape {tuple(ids.shape)}; use (batch, seqlen) with at least one token")
        batch, seqlen = ids.shape
        if bool((ids[:, 1:] < ids[:, :-1]).any()):
            raise ValueError("segment ids fall along a row; number the samples of a row in order")
        first = torch.ones(batch, seqlen, dtype=torch.bool)
        first[:, 1:] = ids[:, 1:] != ids[:, :-1]
        starts = first.flatten().nonzero().squeeze(1)
        ends = torch.cat([starts[1:], torch.tensor([batch * seqlen])])
        number = first.flatten().cumsum(0) - 1
        positions = torch.arange(batch * seqlen) - starts[number]
        lengths = (ends - starts)[number]
        slots = len(starts) if max_segments is None else max_segments
        if len(starts) > slots:
            raise ValueError(f"the rows hold {len(starts)} segments, more than max_segments={slots}; raise it")
        cu_seqlens = torch.full((slots + 1,), batch * seqlen, dtype=torch.int32)
        cu_seqlens[: len(starts)] = starts
        return cls(ids.to(torch.int32), positions.view(batch, -1), lengths.view(batch, -1), cu_seqlens)

    def mask(self) -> Tensor:
        """Who may look at whom, (batch, 1, seqlen, seqlen), bool: the tokens of one segment back to its first."""
        seqlen = self.ids.shape[1]
        causal = torch.ones(seqlen, seqlen, dtype=torch.bool, device=self.ids.device).tril()
        return ((self.ids[:, :, None] == self.ids[:, None, :]) & causal)[:, None]


class Padding(NamedTuple):
    """Rows of different lengths: recurrent state stops at their ends, what lies behind changes nothing.

    real: (batch, seqlen), bool: what belongs to a row.
    lengths: (batch,), int64: of the rows, at least 1.
    """

    real: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> Padding:
        """Rows of these lengths, filled up to the longest."""
        ends = torch.tensor(list(lengths), device=device)
        return cls(torch.arange(max(lengths), device=device) < ends[:, None], ends)
