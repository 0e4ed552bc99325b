"""Divergence and cross-entropy from hidden states, a chunk of tokens at a time: the logits of all never exist at once.

The gradient of a chunk is computed right behind its loss, in the forward pass, and its logits are given up: extra
memory is some five matrices of chunk_tokens x vocab_size, where the plain formula keeps as many of tokens x vocab_size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 2**26  # numbers in one matrix of logits: 256 MiB in float32
# A head's rows are filled up to a multiple: products over rows of, say, 92,553 numbers in bf16, which begin at odd
# addresses, cannot be read and written in whole vectors.
HEAD_ROWS = 64


class Loss(NamedTuple):
    """total: what to minimise, a scalar.  kl, ce: its parts without their factors, for logs; no gradient."""

    total: Tensor
    kl: Tensor
    ce: Tensor


def chunked_loss(
    hidden: Tensor,
    head: Tensor,
    *,
    teacher_hidden: Tensor | None = None,
    teacher_head: Tensor | None = None,
    kl_weights: Tensor | None = None,
    targets: Tensor | None = None,
    ce_weights: Tensor | None = None,
    temperature: float = 1.0,
    ce_factor: float = 1.0,
    chunk_tokens: int | None = None,
) -> Loss:
    """temperature² · Σ kl_weights · KL(teacher || student) + ce_factor · Σ ce_weights · cross-entropy.

    Products run in autocast's dtype if it is on, else in that of `hidden`; softmax and sums in float32 at least. Looks
    at no values and its shapes depend on none, so that it can be captured.

    Args:
        hidden: (tokens, hidden_size), the student's; gets a gradient.      head: (vocab_size, hidden_size); gets one if
            it asks for it.
        teacher_hidden: (tokens, hidden_size of the teacher).       teacher_head: (vocab_size, that).
        kl_weights: (tokens,). None for these three leaves the divergence out.
        targets: (tokens,), int64.      ce_weights: (tokens,). None for both leaves cross-entropy out.
        chunk_tokens: tokens at a time; None: as many as CHUNK_ELEMENTS logits allow, rounded to what products like.
    Raises: ValueError if there is nothing to compute, or only a part of what one of the two losses needs.
    """
    kl_given = [t is not None for t in (teacher_hidden, teacher_head, kl_weights)]
    ce_given = [t is not None for t in (targets, ce_weights)]
    if any(kl_given) != all(kl_given) or any(ce_given) != all(ce_given) or not (any(kl_given) or any(ce_given)):
        raise ValueError(
            "pass teacher_hidden, teacher_head and kl_weights for the divergence, targets and ce_weights for "
            "cross-entropy, or all five; a part of them makes no loss"
        )
    if chunk_tokens is None:
        chunk_tokens = max(128, CHUNK_ELEMENTS // head.shape[0] // 128 * 128)
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={chunk_tokens} must be 1 or more")
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    options = (temperature, ce_factor, chunk_tokens, dtype)
    return Loss(
        *_ChunkedLoss.apply(hidden, head, teacher_hidden, teacher_head, kl_weights, targets, ce_weights, options)
    )


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        teacher_hidden: Tensor | None,
        teacher_head: Tensor | None,
        kl_weights: Tensor | None,
        targets: Tensor | None,
        ce_weights: Tensor | None,
        options: tuple[float, float, int, torch.dtype],
    ) -> tuple[Tensor, Tensor, Tensor]:
        temperature, ce_factor, chunk_tokens, dtype = options
        wide = torch.promote_types(dtype, torch.float32)
        need_hidden, need_head = ctx.needs_input_grad[:2]
        vocab_size = head.shape[0]
        narrow_head = _filled_up(head, dtype)
        narrow_teacher_head: Tensor | None = narrow_head
        if teacher_head is not head:
            narrow_teacher_head = None if teacher_head is None else _filled_up(teacher_head, dtype)
        kl, ce = hidden.new_zeros((), dtype=wide), hidden.new_zeros((), dtype=wide)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_head = torch.zeros_like(head, dtype=wide) if need_head else None
        for start in range(0, hidden.shape[0], chunk_tokens):
            part = slice(start, start + chunk_tokens)
            x = hidden[part].to(dtype)
            logits = F.linear(x, narrow_head)[:, :vocab_size].to(wide)
            grad: Tensor | None = None
            if targets is not None and ce_weights is not None:
                weights = ce_weights[part, None].to(wide)
                log_q = F.log_softmax(logits, dim=-1)
                wanted = targets[part, None]
                ce -= (weights * log_q.gather(1, wanted)).sum()
                if need_hidden or need_head:
                    grad = log_q.exp_().scatter_add_(1, wanted, log_q.new_full((), -1.0).expand(wanted.shape))
                    grad *= ce_factor * weights
            if teacher_hidden is not None and narrow_teacher_head is not None and kl_weights is not None:
                weights = kl_weights[part, None].to(wide)
                teacher_logits = F.linear(teacher_hidden[part].to(dtype), narrow_teacher_head)[:, :vocab_size].to(wide)
                log_p = F.log_softmax(_over(teacher_logits, temperature), dim=-1)
                del teacher_logits
                log_q = F.log_softmax(_over(logits, temperature), dim=-1)
                p = log_p.exp()
                kl += (weights * log_p.sub_(log_q).mul_(p).sum(dim=-1, keepdim=True)).sum()
                del log_p
                if need_hidden or need_head:
                    # Of temperature² KL: temperature (q - p).
                    difference = log_q.exp_().sub_(p).mul_(temperature * weights)
                    grad = difference if grad is None else grad.add_(difference)
                del p, log_q
            del logits
            if grad is not None:
                narrow = grad.new_zeros(grad.shape[0], narrow_head.shape[0], dtype=dtype)
                narrow[:, :vocab_size] = grad
                del grad
                if grad_hidden is not None:
                    grad_hidden[part] = narrow @ narrow_head
                if grad_head is not None:
                    grad_head += (narrow.mT @ x)[:vocab_size]
        ctx.save_for_backward(grad_hidden, None if grad_head is None else grad_head.to(head.dtype))
        ctx.mark_non_differentiable(kl, ce)
        return temperature**2 * kl + ce_factor * ce, kl, ce

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grads = (None if g is None else g * grad_total.to(g.dtype) for g in ctx.saved_tensors)
        return (*grads, None, None, None, None, None, None)


def _filled_up(head: Tensor, dtype: torch.dtype) -> Tensor:
    """With rows of zeros to a multiple of HEAD_ROWS."""
    narrow, missing = head.to(dtype), -head.shape[0] % HEAD_ROWS
    return F.pad(narrow, (0, 0, 0, missing)) if missing else narrow


def _over(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1 else logits.div_(temperature)
