"""Kernels behind one signature each; `select` is the one place that decides which implementation runs.

    ssd_scan(x, dt, A, B, C, initial_state)  a chunk of tokens from a carried state
    ssm_step(x, dt, A, B, C, ssm_state)      one token
    segment_attention(q, k, v, segments)     softmax attention over packed rows, for the layers that keep it
    fused_ops(x)                             norms, gates and convolution in one launch each, or None for torch's own

Kernels of a decoding step are chosen as a whole, by `mmmamba.decoder`.

The first two compute h <- exp(dt A) h + (dt x) B^T, y = h C per head (Mamba-2, arXiv:2405.21060). In a mixer seeded
from attention x, B and C are V, K and Q, so x and B come with `num_kv_heads` heads and dt, C and the state with
`num_heads`: head i reads kv head i // (num_heads // num_kv_heads).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import cache
from typing import Literal, Protocol

import torch
from torch import Tensor

from mmmamba.kernels.chunked import ssd_scan_chunked
from mmmamba.kernels.reference import ssd_scan_ref, ssm_step_ref
from mmmamba.kernels.segmented import VARLEN_DTYPES, attend_masked, infers_on_cuda, load_varlen, product_dtype
from mmmamba.kernels.upstream import load_upstream_scan
from mmmamba.segments import Segments

SegmentImpl = Literal["auto", "masked", "varlen"]
Impl = Literal["auto", "reference", "chunked", "triton", "mamba_ssm"]
ScanFn = Callable[..., tuple[Tensor, Tensor]]

# In the environment: "plain" has prompts read and tokens decoded by torch's operators and the chunk scan alone.
SWITCH = "MMMAMBA_DECODER"
MAX_DIFFERENCE = 1e-3  # of fused operators from torch in float32: rounding is below 1e-5, a wrong kernel about 1

log = logging.getLogger(__name__)

__all__ = [
    "SWITCH",
    "FusedOps",
    "Impl",
    "fused_ops",
    "infers_on_cuda",
    "segment_attention",
    "select_scan",
    "select_segment_attention",
    "ssd_scan",
    "ssd_scan_ref",
    "ssm_step",
    "ssm_step_ref",
    "training_chunk",
]


class FusedOps(Protocol):
    """The functions of `kernels.pointwise`."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...

    def swiglu(self, a: Tensor, b: Tensor) -> Tensor: ...

    def mix_inputs(
        self,
        u: Tensor,
        conv_state: Tensor,
        conv_weight: Tensor,
        conv_bias: Tensor,
        dt_bias: Tensor,
        hidden_size: int,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...

    def gated_norm(self, y: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor: ...


def fused_ops(x: Tensor) -> FusedOps | None:
    """Fused kernels for layers that get x, or None where torch's operators are to be taken: off CUDA, outside of
    inference mode, for float64, under autocast or a compiler, and where the environment says so."""
    if not infers_on_cuda(x) or x.dtype == torch.float64 or torch.is_autocast_enabled("cuda"):
        return None
    return None if os.environ.get(SWITCH) == "plain" else _load_pointwise(x.device)


@cache
def _load_pointwise(device: torch.device) -> FusedOps | None:
    """Chosen once for a device and logged with the reason, after a look at what the kernels compute there."""
    try:
        from mmmamba.kernels import pointwise

        difference = pointwise.disagreement(device)
    except Exception as error:  # as for the scans: whatever a broken build or compiler raises means "not here"
        log.info("norms and gates: torch (Triton fails: %s: %s)", type(error).__name__, error)
        return None
    if not difference <= MAX_DIFFERENCE:
        log.warning("norms and gates: torch (the fused ones differ by %.2g on this card)", difference)
        return None
    log.info("norms and gates: fused")
    return pointwise


@cache
def select_scan(device_type: str, impl: Impl = "auto", training: bool = False) -> ScanFn:
    """The chunk scan for a device, chosen once and logged with the reason: on CUDA our own, which takes few launches
    and no minutes of tuning before the first call; mamba-ssm's where Triton's import fails and its own does not.

    Raises: ValueError if `impl` is unknown, or names an implementation that cannot run here.
    """
    if impl == "reference":
        return ssd_scan_ref
    if impl == "chunked":
        return ssd_scan_chunked
    if impl not in ("auto", *_LOADERS):
        raise ValueError(f'impl "{impl}" is not known; use "auto", "reference", "chunked", "triton" or "mamba_ssm"')
    reasons = []
    for name, (what, load) in _LOADERS.items():
        if impl not in ("auto", name):
            continue
        if device_type != "cuda":
            reasons.append(f"device is {device_type}, {what} needs cuda")
            continue
        scan, reason = load()
        if scan is not None:
            log.info("chunk scan%s: %s", " for training" if training else "", what)
            if training:
                _IN_GRAPHS[device_type] = scan if name == "triton" else torch.compiler.disable(scan)
            return scan
        reasons.append(reason)
    if impl != "auto":
        raise ValueError(f'impl "{impl}" cannot run: {reasons[0]}; use "auto" or "chunked"')
    log.info("chunk scan%s: torch chunked (%s)", " for training" if training else "", "; ".join(reasons))
    if training and device_type != "cpu":
        _IN_GRAPHS[device_type] = torch.compiler.disable(ssd_scan_chunked)
    return ssd_scan_chunked


def training_chunk(head_dim: int) -> int:
    """Tokens a chunk to train with. Narrow heads: longer than nano's rows, which so need no states. Wide ones: where
    the products within chunks (chunk / 2 of them a token) are as many as those with the states (twice head_dim)."""
    return 512 if head_dim <= 64 else 2 * head_dim


def _load_triton_scan() -> tuple[ScanFn | None, str]:
    try:
        from mmmamba.kernels.ssd_op import ssd_scan_triton
    except Exception as error:  # as for mamba-ssm: whatever a broken build raises means "not here"
        return None, f"Triton does not import: {type(error).__name__}: {error}"
    return ssd_scan_triton, ""


# What needs CUDA, in order of preference: name -> (for the log, loader).
_LOADERS: dict[str, tuple[str, Callable[[], tuple[ScanFn | None, str]]]] = {
    "triton": ("our Triton scan", _load_triton_scan),
    "mamba_ssm": ("mamba-ssm", load_upstream_scan),
}
# What a traced graph calls to train, by device: ours is an operator, all others leave the graph and run as they are.
# `select_scan` fills it; call it before compiling. The torch form is not traced on GPUs: on an H100 under torch 2.11,
# with inputs in bf16, inductor's gradients of dt and A were wrong (relative errors 1.1 and 0.42), those of x, B and C
# right.
_IN_GRAPHS: dict[str, ScanFn] = {}


def ssd_scan(
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
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over a chunk of tokens; see `ssd_scan_ref` for shapes."""
    training = torch.is_grad_enabled() and any(t.requires_grad for t in (x, dt, A, B, C))
    if impl == "auto" and torch.compiler.is_compiling():
        # Tracing through foreign Triton autotuners breaks graphs; the torch form's forward pass fuses well by itself.
        scan = _to_train_in_graphs(x.device.type) if training else ssd_scan_chunked
    else:
        scan = select_scan(x.device.type, impl, training)
    return scan(x, dt, A, B, C, initial_state, segment_ids=segment_ids, chunk_size=chunk_size, need_state=need_state)


def _to_train_in_graphs(device_type: str) -> ScanFn:
    if device_type not in _IN_GRAPHS and device_type != "cpu":
        raise RuntimeError(
            f'call select_scan("{device_type}", training=True) before compiling what trains: which scan a graph calls '
            "must be known when it is traced"
        )
    return _IN_GRAPHS.get(device_type, ssd_scan_chunked)


def segment_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, impl: SegmentImpl = "auto") -> Tensor:
    """Causal softmax attention within the segments of packed rows.

    Args:
        q: (batch, num_heads, seqlen, head_dim).        k, v: (batch, num_kv_heads, seqlen, head_dim).
    Returns: (batch, num_heads, seqlen, head_dim).
    """
    narrow = product_dtype(q) in VARLEN_DTYPES
    if impl == "auto" and torch.compiler.is_compiling():
        return _ATTEND_IN_GRAPHS.get((q.device.type, narrow), attend_masked)(q, k, v, segments)
    return select_segment_attention(q.device.type, narrow, impl)(q, k, v, segments)


# As `_IN_GRAPHS`, by device and width: what is chosen by looking around cannot be traced.
_ATTEND_IN_GRAPHS: dict[tuple[str, bool], Callable[..., Tensor]] = {}


@cache
def select_segment_attention(device_type: str, narrow: bool, impl: SegmentImpl = "auto") -> Callable[..., Tensor]:
    """Attention over packed rows for a device, `narrow` for bf16 and fp16; chosen once and logged with the reason.

    Raises: ValueError if `impl` is unknown, or names an implementation that cannot run here.
    """
    if impl == "masked":
        return attend_masked
    if impl not in ("auto", "varlen"):
        raise ValueError(f'impl "{impl}" is not known; use "auto", "masked" or "varlen"')
    if device_type != "cuda" or not narrow:
        reason = f"device is {device_type}, {'narrow' if narrow else 'wide'} type; flash attention needs cuda and bf16"
    else:
        attend, reason = load_varlen()
        if attend is not None:
            log.info("attention over packed rows: flash attention of any length")
            _ATTEND_IN_GRAPHS[device_type, narrow] = attend
            return attend
    if impl == "varlen":
        raise ValueError(f'impl "varlen" cannot run: {reason}; use "auto" or "masked"')
    log.info("attention over packed rows: masked (%s)", reason)
    return attend_masked


def ssm_step(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, ssm_state: Tensor) -> Tensor:
    """Advance the recurrence by one token; see `ssm_step_ref` for shapes."""
    return ssm_step_ref(x, dt, A, B, C, ssm_state)
