"""The recurrence written token by token: slow, obvious, any dtype. In float64 it is the oracle of the tests."""

from __future__ import annotations

import torch
from torch import Tensor


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of `ssm_state` for inputs of `dtype`: never below float32, since long sums lose small terms in bf16."""
    return torch.promote_types(dtype, torch.float32)


def check_state(ssm_state: Tensor) -> None:
    """Raises: ValueError if the state is narrower than float32."""
    if ssm_state.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"ssm_state has dtype {ssm_state.dtype}; use float32, since long sums lose small terms in narrower types"
        )


def ssm_step_ref(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, ssm_state: Tensor) -> Tensor:
    """Advance the SSD recurrence by one token; updates `ssm_state` in place.

    h <- exp(dt A) h + (dt x) B^T,    y = h C          (Mamba-2, arXiv:2405.21060; here x=V, B=K, C=Q)

    Args:
        x: (batch, num_kv_heads, head_dim).     dt: (batch, num_heads), after softplus, so > 0.
        A: (num_heads,), negative.              B: (batch, num_kv_heads, d_state).
        C: (batch, num_heads, d_state).
        ssm_state: (batch, num_heads, head_dim, d_state), float32 (float64 as an oracle).
    Returns: y, (batch, num_heads, head_dim), dtype of x.
    Raises: ValueError if ssm_state is narrower than float32.
    """
    check_state(ssm_state)
    batch, num_heads = dt.shape
    groups = x.shape[1]
    dtype = ssm_state.dtype
    # Query heads of one kv head side by side: (batch, groups, heads per group, ...).
    state = ssm_state.view(batch, groups, num_heads // groups, *ssm_state.shape[2:])
    dt = dt.to(dtype).view(batch, groups, -1, 1, 1)
    decay = torch.exp(dt * A.to(dtype).view(groups, -1, 1, 1))
    update = x.to(dtype)[:, :, None, :, None] * B.to(dtype)[:, :, None, None, :]
    state.mul_(decay).addcmul_(dt, update)
    y = state @ C.to(dtype).view(batch, groups, -1, C.shape[-1], 1)
    return y.view(batch, num_heads, -1).to(x.dtype)


def ssd_scan_ref(
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
    """Run the SSD recurrence over a sequence, one token after the other.

    Args:
        x: (batch, seqlen, num_kv_heads, head_dim).   dt: (batch, seqlen, num_heads), after softplus.
        A: (num_heads,), negative.                    B: (batch, seqlen, num_kv_heads, d_state).
        C: (batch, seqlen, num_heads, d_state).
        initial_state: (batch, num_heads, head_dim, d_state) in float32, or None for zeros; not changed.
        segment_ids: (batch, seqlen), whole numbers that never fall along a row, or None for one segment. The state
            starts anew from zeros where they change; `initial_state` belongs to the segment of the first token.
        chunk_size: unused here; part of the common signature.
        need_state: False says that the second result will not be read, so it may be left empty; unused here too.
    Returns: y (batch, seqlen, num_heads, head_dim) in the dtype of x, and the state after the last token.
    """
    batch, seqlen, num_heads = dt.shape
    if initial_state is None:
        state = x.new_zeros(batch, num_heads, x.shape[-1], B.shape[-1], dtype=state_dtype(x.dtype))
    else:
        state = initial_state.clone()
    ys = []
    for t in range(seqlen):
        if segment_ids is not None and t:
            state[segment_ids[:, t] != segment_ids[:, t - 1]] = 0
        ys.append(ssm_step_ref(x[:, t], dt[:, t], A, B[:, t], C[:, t], state))
    return torch.stack(ys, dim=1), state
