"""Losses of the three stages as functions of tensors."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

MSE_SCALE = 1000.0  # the reference's; keeps bf16 gradients of small errors in range


def layer_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error between a mixer's and its attention's per-head outputs, before the output projection.

    Both (batch, seqlen, hidden_size). The stage loss is MSE_SCALE times the mean of this over layers.
    """
    return F.mse_loss(student.float(), teacher.float())


def token_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(teacher || student) of every row in nats: logits (..., vocab_size) to (...)."""
    log_p = F.log_softmax(teacher_logits.float(), dim=-1)
    log_q = F.log_softmax(student_logits.float(), dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)
