"""A layer's step of stages 1 and 2 written out: forward and backward pass of a mixer against its attention.

Autograd over torch's operators is the plain way (`stages.PairedMixer`), and what this is tested against. Here nothing
is moved twice: V, K, Q that are still the attention's own rows are multiplied once for both, what lies between products
and scan is a launch each, the loss and its gradients are one pass, and gradients go where the next product reads them.
"""

from __future__ import annotations

import copy
import logging
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distill.convert import seed_mixer, vkq_rows
from distill.losses import layer_mse
from mmmamba.attention import Attention
from mmmamba.config import LanguageConfig
from mmmamba.kernels import MAX_DIFFERENCE
from mmmamba.kernels.segmented import product_dtype
from mmmamba.mixer import GATE_NORM_EPS
from mmmamba.segments import Segments

Layers = Literal["auto", "written-out", "autograd"]
# Compute capabilities of the cards on which steps written out were measured and found faster: "auto" takes them there.
MEASURED = frozenset({(9, 0)})

log = logging.getLogger(__name__)


class LayerStep:
    """The step of one mixer.

    Args: attention: what it is trained against; `shares`: whether V, K, Q are frozen and its own rows still.
    """

    def __init__(self, attention: Attention, mixer: Any) -> None:
        self.mixer = mixer
        vkq = self.mixer.in_proj.vkq
        self.shares = not vkq.requires_grad and torch.equal(vkq, vkq_rows(attention).to(vkq.dtype))

    def fits(self, x: Tensor) -> bool:
        """Whether the kernels take this input and these weights: not float64, nor weights spread over processes."""
        from mmmamba.kernels.ssd_op import MAX_DIM

        wide = product_dtype(x) == torch.float64 or self.mixer.head_dim > MAX_DIM
        return not wide and not isinstance(self.mixer.in_proj.gate_dt, DTensor)

    @torch.no_grad()
    def run(
        self, x: Tensor, qkv: Tensor, target: Tensor, segments: Segments | None, real: Tensor | None, factor: float
    ) -> Tensor:
        """Add the gradients of `factor` times the loss to those of what trains.

        Args:
            x: (batch, seqlen, hidden_size), the normed input.    qkv: what the attention's `in_proj` makes of it.
            target: (batch, seqlen, hidden_size), what the attention mixes to.
            real: (batch, seqlen), weights of the tokens in the mean; None: all the same.
        Returns: the loss, without the factor.
        """
        from mmmamba.kernels import mixer_train
        from mmmamba.kernels.ssd_op import Scan

        mixer, dtype = self.mixer, product_dtype(x)
        projection, conv = mixer.in_proj, mixer.conv
        _, hidden, heads = mixer.splits
        x = x.to(dtype)
        u = qkv.to(dtype) if self.shares else F.linear(x, projection.vkq.to(dtype))
        gate_step = F.linear(x, projection.gate_dt.to(dtype))
        gate, step = gate_step.split([hidden, heads], dim=-1)
        given = mixer_train.Projected(
            u=u,
            step=step,
            taps=conv.weight[:, 0],
            bias=conv.bias,
            dt_bias=mixer.dt_bias,
            positions=None if segments is None else segments.positions,
            num_kv_heads=mixer.num_kv_heads,
            head_dim=mixer.head_dim,
            grouped=self.shares,
        )
        v, k, q, dt = mixer_train.mix_forward(given)
        A = -torch.exp(mixer.A_log.float())
        scan = Scan(v, dt, A, k, q, None if segments is None else segments.ids, mixer.chunk_size)

        grad = torch.empty_like(gate_step)
        grad_gate, grad_step = grad.split([hidden, heads], dim=-1)
        weight, target = mixer.norm.weight, target.contiguous()
        loss, dy, dweight = mixer_train.gated_mse(
            scan.y, gate, weight, target, real, grad_gate, eps=GATE_NORM_EPS, factor=factor
        )
        dv, ddt, dA, dk, dq = scan.gradients(dy)
        need_u = projection.vkq.requires_grad
        others = mixer_train.mix_backward(given, dv, dk, dq, ddt, grad_step, need_u=need_u)
        if others.u is not None:
            _add_(projection.vkq, others.u.flatten(0, 1).mT @ x.flatten(0, 1))
        _add_(projection.gate_dt, grad.flatten(0, 1).mT @ x.flatten(0, 1))
        _add_(conv.weight, others.taps[:, None])
        _add_(conv.bias, others.bias)
        _add_(mixer.dt_bias, others.dt_bias)
        _add_(mixer.A_log, dA * A)
        _add_(weight, dweight)
        return loss


def _add_(parameter: nn.Parameter, gradient: Tensor) -> None:
    if not parameter.requires_grad:
        return
    if parameter.grad is None:
        parameter.grad = gradient.to(parameter.dtype, memory_format=torch.contiguous_format, copy=True)
    else:
        parameter.grad.add_(gradient)


def choose(layers: Layers, device: torch.device, *, compiled: bool, captured: bool) -> bool:
    """Whether layers run written out, logged with the reason. "auto": where that was measured, and a step is compiled
    and not captured as a CUDA graph.

    Args: compiled, captured: how a step will run.
    Raises: ValueError if they are to, and their kernels do not run on the device.
    """
    if layers == "written-out" and not runs_on(device):
        raise ValueError(f'layers "written-out" cannot run on {device}; the log says why; use "auto" or "autograd"')
    if layers != "auto" or device.type != "cuda":
        return layers == "written-out"
    if why := _not_measured(torch.cuda.get_device_capability(device), compiled=compiled, captured=captured):
        log.info('layers of stages 1 and 2: by autograd (%s; "written-out" takes the kernels)', why)
        return False
    return runs_on(device)


def _not_measured(capability: tuple[int, int], *, compiled: bool, captured: bool) -> str:
    """Why nobody knows whether steps written out are faster so, or nothing."""
    if not compiled:
        return "uncompiled"
    if captured:
        return "kernels not measured in a captured step"
    if capability not in MEASURED:
        return f"not measured on cards of compute capability {'.'.join(map(str, capability))}"
    return ""


@cache
def runs_on(device: torch.device) -> bool:
    """Whether steps written out run on a device: found out once and logged with the reason, by a look at what they
    compute there."""
    if device.type != "cuda":
        log.info("layers of stages 1 and 2: by autograd (device is %s, the kernels need cuda)", device.type)
        return False
    narrow = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = False  # its rounding would drown what is looked for
        difference = disagreement(device)
    except Exception as error:  # as for the scans: whatever a broken build or compiler raises means "not here"
        log.warning("layers of stages 1 and 2: by autograd (Triton fails: %s: %s)", type(error).__name__, error)
        return False
    finally:
        torch.backends.cuda.matmul.allow_tf32 = narrow
    if not difference <= MAX_DIFFERENCE:
        log.warning("layers of stages 1 and 2: by autograd (the kernels differ by %.2g on this card)", difference)
        return False
    log.info("layers of stages 1 and 2: written out")
    return True


def disagreement(device: torch.device) -> float:
    """The largest relative RMS difference of a layer's gradients from autograd's, small and in float32; NaN if any is.
    A kernel that is wrong on a card is off by about 1, rounding by less than 1e-5."""
    draw = torch.Generator().manual_seed(0)
    config = LanguageConfig(
        hidden_size=64, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1,
        vocab_size=8, rms_norm_eps=1e-5, rope_theta=1e4, max_position_embeddings=64,
    )  # fmt: skip
    attention = Attention(config).requires_grad_(False)
    for weight in attention.parameters():
        weight.copy_(torch.randn(weight.shape, generator=draw) / 8)
    x, target = (torch.randn(1, 40, 64, generator=draw).to(device) for _ in range(2))
    segments = Segments(*(t.to(device) for t in Segments.of((torch.arange(40) // 15)[None])))
    attention = attention.to(device)
    differences = []
    for shares in (True, False):
        mixer: Any = seed_mixer(attention, config, draw)
        mixer.conv.weight.data.add_(torch.randn(mixer.conv.weight.shape, generator=draw).to(device))
        mixer.in_proj.vkq.requires_grad_(not shares)
        mixer.out_proj.requires_grad_(False)
        mixer.chunk_size = 16
        plain = copy.deepcopy(mixer)
        plain.impl = "chunked"
        with torch.enable_grad():
            layer_mse(plain.mix(x, None, 0, None, segments), target).backward()
        step = LayerStep(attention, mixer)
        assert step.shares == shares
        step.run(x, attention.in_proj(x), target, segments, None, 1.0)
        for ours, theirs in zip(mixer.parameters(), plain.parameters(), strict=True):
            if theirs.grad is not None:
                differences.append((ours.grad - theirs.grad).norm() / theirs.grad.norm())
    return float(torch.stack(differences).max())
