"""mamba-ssm's Triton chunk scan behind our signature, where the package imports (CUDA only)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from mmmamba.kernels.reference import state_dtype


def load_upstream_scan() -> tuple[Callable[..., tuple[Tensor, Tensor]] | None, str]:
    """The adapted scan, or None with the reason why it cannot be had."""
    try:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    except Exception as error:  # a broken build raises anything from ImportError to OSError; all mean "not here"
        return None, f"mamba-ssm does not import: {type(error).__name__}: {error}"
    return _adapt(mamba_chunk_scan_combined), ""


def _adapt(scan: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    def ssd_scan_upstream(
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
        rep = C.shape[2] // B.shape[2]
        # The kernel wants x per head and equally many groups in B and C; its initial state goes to segment 0.
        y, state = scan(
            x.repeat_interleave(rep, dim=2),
            dt.float(),
            A.float(),
            B.repeat_interleave(rep, dim=2),
            C.contiguous(),
            chunk_size=max(16, 1 << (chunk_size - 1).bit_length()),
            initial_states=initial_state,
            seq_idx=None if segment_ids is None else (segment_ids - segment_ids[:, :1]).int(),
            return_final_states=True,
        )
        return y.to(x.dtype), state.to(state_dtype(x.dtype))

    return ssd_scan_upstream
