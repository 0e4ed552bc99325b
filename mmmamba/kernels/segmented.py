"""Softmax attention over packed rows, where each segment looks at itself alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmmamba.segments import Segments

VARLEN_DTYPES = (torch.bfloat16, torch.float16)


def attend_masked(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """Any device and dtype; work and a mask of seqlen^2. Shapes as `segment_attention`."""
    # With a mask and unequal numbers of heads CUDA has no fast kernel: it would write all scores.
    rep = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(rep, dim=1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=segments.mask())


def load_varlen() -> tuple[Callable[..., Tensor] | None, str]:
    """Flash attention over the flattened rows (CUDA, VARLEN_DTYPES), or None with the reason why it cannot be had."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        return None, f"this torch has no variable-length attention: {error}"
    return _adapt(varlen_attn), ""


def _adapt(flash: Any) -> Callable[..., Tensor]:
    # Causal is a window without anything to the right, or a flag, as torch's version has it.
    parameters = inspect.signature(flash).parameters
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in parameters else {"is_causal": True}
    groups = "enable_gqa" in parameters  # where it is known keys and values need no copies for their query heads

    def attend_varlen(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        batch, num_heads, seqlen, head_dim = q.shape
        rep = num_heads // k.shape[1]
        dtype = product_dtype(q)
        q, k, v = (t.to(dtype).transpose(1, 2).reshape(batch * seqlen, -1, head_dim) for t in (q, k, v))
        if rep > 1 and not groups:
            k, v = (t.repeat_interleave(rep, dim=1) for t in (k, v))
        borders = segments.cu_seqlens
        y = flash(q, k, v, borders, borders, seqlen, seqlen, **options, **({"enable_gqa": rep > 1} if groups else {}))
        return y.view(batch, seqlen, num_heads, head_dim).transpose(1, 2)

    return attend_varlen


def product_dtype(x: Tensor) -> torch.dtype:
    """What a matrix product of `x` computes in; autocast does not reach into operators that are not torch's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def infers_on_cuda(x: Tensor) -> bool:
    """Whether x is on the current GPU, no gradient can be asked for, and no compiler traces (it cannot, past here)."""
    if torch.compiler.is_compiling() or not x.is_cuda or not torch.is_inference_mode_enabled():
        return False
    return x.device.index == torch.cuda.current_device()  # Triton launches there, wherever its tensors are
