"""Losses of the three stages as functions of tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

MSE_SCALE = 1000.0  # the reference's; keeps bf16 gradients of small errors in range


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What stage 3 minimises: temperature² · KL(teacher || student) + ce_weight · cross-entropy + hidden_weight ·
    relative error of hidden states.

    all_tokens: the divergence counts at every token of a sample, its picture and question too; else where an answer is
        to be learned. Cross-entropy counts on answers alone.
    reduction: "mean" over the tokens that count, or their "sum".
    temperature: divides the logits of both in the divergence. Its gradient falls with temperature², which the factor
        makes up for, so that `ce_weight` and learning rate keep their meaning (Hinton et al., arXiv:1503.02531).
    hidden_weight: of the `relative_error` between what the layers of both leave behind them, its mean over a stack's
        layers and tokens and over the two stacks (as TinyBERT's hidden states, arXiv:1909.10351, equation 8). It rises
        and falls with the learning rate: it shows the way while there is far to go, and leaves the end to the KL.
    """

    all_tokens: bool = False
    reduction: Literal["mean", "sum"] = "mean"
    temperature: float = 1.0
    ce_weight: float = 0.0
    hidden_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.reduction not in ("mean", "sum"):
            raise ValueError(f'reduction "{self.reduction}" is not known; use "mean" or "sum"')
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be above 0; 1 leaves the logits alone")
        if not self.ce_weight >= 0:
            raise ValueError(f"ce_weight={self.ce_weight} is below 0; use 0 to leave cross-entropy out")
        if not self.hidden_weight >= 0:
            raise ValueError(f"hidden_weight={self.hidden_weight} is below 0; use 0 to leave hidden states alone")

    @classmethod
    def reference(cls) -> Objective:
        """The published training code's: the sum over all tokens."""
        return cls(all_tokens=True, reduction="sum")


def layer_mse(student: Tensor, teacher: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean squared error between a mixer's and its attention's per-head outputs, before the output projection.

    Both (batch, seqlen, hidden_size). The stage loss is MSE_SCALE times the mean of this over layers.

    Args: weights: (batch, seqlen) of the positions in the mean; None: all the same.
    """
    if weights is None:
        return F.mse_loss(student.float(), teacher.float())
    errors = (student.float() - teacher.float()).square().mean(dim=-1)
    return (errors * weights).sum() / weights.sum().clamp(min=1.0)


def token_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """temperature² · KL(teacher || student) of every row in nats: logits (..., vocab_size) to (...).

    Holds several matrices of that size; `chunked_loss` computes the same from hidden states in pieces.
    """
    wide = torch.promote_types(student_logits.dtype, torch.float32)
    log_p = F.log_softmax(teacher_logits.to(wide) / temperature, dim=-1)
    log_q = F.log_softmax(student_logits.to(wide) / temperature, dim=-1)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def relative_error(student: Tensor, teacher: Tensor, weights: Tensor | None = None) -> Tensor:
    """|student - teacher|² / |teacher|² of a hidden state, averaged over tokens; both (batch, seqlen, hidden_size).

    Relative, since the residual stream is fifty times as large at some tokens (nano's first) as at others.

    Args: weights: (batch, seqlen) of the positions in the mean; None: all the same.
    """
    error = (student.float() - teacher.float()).square().sum(dim=-1)
    error = error / teacher.float().square().sum(dim=-1).clamp(min=1e-6)
    if weights is None:
        return error.mean()
    return (error * weights).sum() / weights.sum().clamp(min=1.0)
