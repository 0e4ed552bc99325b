"""The recurrence as matrix products over chunks, in plain torch: the path for CPU, training and other devices."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmmamba.kernels.reference import check_state, state_dtype


def ssd_scan_chunked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None = None,
    *,
    segment_ids: Tensor | None = None,
    chunk_size: int = 64,
    need_state: bool = True,
) -> tuple[Tensor, Tensor]:
    """State-space duality: inside a chunk attention with decay for a mask, between chunks the carried state.

    Follows the block decomposition of Mamba-2 (arXiv:2405.21060, section 6). Arguments and results as `ssd_scan_ref`;
    sequences that do not fill their last chunk are padded with dt = 0, which leaves the state alone. Between segments
    the weights are exactly zero.
    Differentiable. Cost grows linearly with seqlen; extra memory is num_heads * seqlen * chunk_size numbers.

    Raises: ValueError if initial_state is narrower than float32, or chunk_size is below 1.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be 1 or more")
    if initial_state is not None:
        check_state(initial_state)
    batch, seqlen, num_heads = dt.shape
    groups, head_dim, d_state = x.shape[2], x.shape[3], B.shape[3]
    rep = num_heads // groups
    acc = state_dtype(x.dtype)
    num_chunks = -(-seqlen // chunk_size)
    q = -(-seqlen // num_chunks)  # equal chunks: the last would else be mostly padding
    if pad := num_chunks * q - seqlen:
        x, dt, B, C = (F.pad(t, (0, 0) * (t.ndim - 2) + (0, pad)) for t in (x, dt, B, C))
    borders = None if segment_ids is None else _Borders.of(segment_ids, num_chunks, q)

    # Heads to the front, query heads of one kv head side by side, chunks apart.
    x = x.view(batch, num_chunks, q, groups, head_dim).permute(0, 3, 1, 2, 4)  # (b, g, c, q, p)
    B = B.view(batch, num_chunks, q, groups, d_state).permute(0, 3, 1, 2, 4)  # (b, g, c, q, n)
    C = C.view(batch, num_chunks, q, groups, rep, d_state).permute(0, 3, 1, 4, 2, 5)  # (b, g, c, r, q, n)
    dt = dt.to(acc).view(batch, num_chunks, q, groups, rep).permute(0, 3, 1, 4, 2)  # (b, g, c, r, q)
    causal = torch.ones(q, q, dtype=torch.bool, device=x.device).tril()
    steps = dt * A.to(acc).view(groups, 1, rep, 1)
    cum = _cumsum(steps, causal)  # log decay since the chunk's start
    total = cum[..., -1]  # (b, g, c, r)

    # Inside a chunk: y_t = sum_{s<=t} exp(cum_t - cum_s) dt_s (C_t . B_s) x_s. Query heads share their kv head's rows.
    scores = (C.reshape(batch, groups, num_chunks, rep * q, d_state) @ B.mT).view(batch, groups, num_chunks, rep, q, q)
    seen = causal if borders is None else causal & borders.same
    log_decay = (cum[..., :, None] - cum[..., None, :]).masked_fill(~seen, float("-inf"))
    weights = (scores * (torch.exp(log_decay) * dt[..., None, :])).to(x.dtype)
    y = (weights.view(batch, groups, num_chunks, rep * q, q) @ x).view(batch, groups, num_chunks, rep, q, head_dim)

    # What each chunk adds to the state: sum_s exp(total - cum_s) dt_s x_s B_s^T.
    kept = torch.exp(total[..., None] - cum) * dt
    since_start, over_chunk = torch.exp(cum), torch.exp(total)
    if borders is not None:
        kept = kept.masked_fill(~borders.to_end, 0.0)
        since_start = since_start.masked_fill(~borders.from_start, 0.0)
        over_chunk = over_chunk.masked_fill(~borders.through, 0.0)
    x_decayed = x[:, :, :, None].to(acc) * kept[..., None]  # (b, g, c, r, q, p)
    added = x_decayed.mT.reshape(batch, groups, num_chunks, rep * head_dim, q) @ B.to(acc)
    added = added.view(batch, groups, num_chunks, rep, head_dim, d_state)

    if initial_state is None:
        state = x.new_zeros(batch, groups, rep, head_dim, d_state, dtype=acc)
    else:
        state = initial_state.view(batch, groups, rep, head_dim, d_state)
    if num_chunks == 1 and initial_state is None:
        state = added[:, :, 0]
    else:
        before = []
        for c in range(num_chunks):
            before.append(state)
            state = state * over_chunk[:, :, c, :, None, None] + added[:, :, c]
        carried = torch.stack(before, dim=2)  # (b, g, c, r, p, n)
        y = y + ((C.to(acc) * since_start[..., None]) @ carried.mT).to(x.dtype)

    y = y.permute(0, 2, 4, 1, 3, 5).reshape(batch, num_chunks * q, num_heads, head_dim)
    return y[:, :seqlen], state.reshape(batch, num_heads, head_dim, d_state)


class _Borders(NamedTuple):
    """What the borders of segments let through, bool, shaped to broadcast over (batch, groups, chunks, rep, ...)."""

    same: Tensor  # (b, 1, c, 1, q, q): two tokens of one segment
    to_end: Tensor  # (b, 1, c, 1, q): from a token to the chunk's end
    from_start: Tensor  # (b, 1, c, 1, q): from the state before the chunk to a token
    through: Tensor  # (b, 1, c, 1): from that state to the chunk's end

    @classmethod
    def of(cls, segment_ids: Tensor, num_chunks: int, q: int) -> _Borders:
        batch, seqlen = segment_ids.shape
        if pad := num_chunks * q - seqlen:  # the last segment goes on, so that its state reaches the end
            segment_ids = torch.cat([segment_ids, segment_ids[:, -1:].expand(batch, pad)], dim=1)
        ids = segment_ids.view(batch, 1, num_chunks, 1, q)
        last = ids[..., -1]
        before = torch.cat([ids[:, :, :1, :, 0], last[:, :, :-1]], dim=2)
        return cls(
            ids[..., :, None] == ids[..., None, :], ids == last[..., None], ids == before[..., None], last == before
        )


def _cumsum(steps: Tensor, causal: Tensor) -> Tensor:
    # Inductor of torch 2.11 fails to generate code for a cumsum over this permuted layout on CUDA.
    return (steps[..., None, :] * causal).sum(dim=-1) if torch.compiler.is_compiling() else torch.cumsum(steps, dim=-1)
