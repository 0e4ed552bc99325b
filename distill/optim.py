"""The optimizers of a stage: AdamW, and Muon for the matrices of a stack that starts from nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from distill.config import StageConfig
from distill.sharding import is_sharded
from distill.stages import Stage, no_weight_decay

# Coefficients of the quintic Newton-Schulz iteration (Jordan et al. 2024, "Muon: an optimizer for hidden layers").
_QUINTIC = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
# A step then moves a matrix by about as much as AdamW's would at the same rate (Liu et al., arXiv:2502.16982, eq. 4).
_RMS_OF_ADAMW = 0.2


def orthogonalize(matrices: Tensor) -> Tensor:
    """Singular values to about 1: (n, rows, columns), any dtype, to the same in bfloat16 (float32 on a CPU)."""
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    wide = x.shape[1] <= x.shape[2]
    if not wide:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = _QUINTIC
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized, for matrices (Jordan et al. 2024); all of one shape at once.

    Args:
        params: matrices, or groups of them with `lr` and `weight_decay` (decoupled, as AdamW's).
    Raises: ValueError for a parameter that is no matrix.
    """

    def __init__(
        self, params: Iterable[Any], *, lr: float = 1e-3, weight_decay: float = 0.0, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        for parameter in (p for group in self.param_groups for p in group["params"]):
            if parameter.ndim != 2:
                raise ValueError(f"Muon takes matrices, not a tensor of shape {tuple(parameter.shape)}; use AdamW")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                shapes[parameter.shape].append(parameter)
            for shape, members in shapes.items():
                gradients = torch.stack([p.grad for p in members if p.grad is not None])
                state = self.state[members[0]]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(gradients)
                momentum = state["momentum"].lerp_(gradients, 1 - group["momentum"])
                update = orthogonalize(gradients.lerp_(momentum, group["momentum"]))  # Nesterov's look ahead
                update *= _RMS_OF_ADAMW * max(shape) ** 0.5
                torch._foreach_mul_(members, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(members, list(update.to(members[0].dtype)), alpha=-group["lr"])


def stage_optimizers(
    stage: Stage, parameters: dict[str, nn.Parameter], config: StageConfig
) -> list[torch.optim.Optimizer]:
    """Optimizers over all parameters, in groups by learning rate and weight decay.

    Raises: ValueError for Muon on spread matrices, which it needs whole.
    """
    adamw: dict[tuple[str, bool, bool], list[nn.Parameter]] = {}
    muon: list[nn.Parameter] = []
    for name, parameter in parameters.items():
        rate, plain = stage.learning_rate(name), no_weight_decay(name)
        if config.muon and rate == "lr" and parameter.ndim == 2 and not plain:
            muon.append(parameter)
        else:
            adamw.setdefault((rate, plain, is_sharded([parameter])), []).append(parameter)
    if is_sharded(muon):
        raise ValueError(
            "muon: true needs whole matrices, and --shard spreads them; set muon: false or leave --shard out"
        )
    groups: list[dict[str, Any]] = [
        {
            "params": params,
            "lr": getattr(config, rate) or config.lr,
            "weight_decay": 0.0 if plain else config.weight_decay,
        }
        for (rate, plain, _), params in adamw.items()
    ]
    optimizers: list[torch.optim.Optimizer] = []
    if groups:
        cuda = groups[0]["params"][0].is_cuda
        optimizers.append(torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=cuda))
    if muon:
        optimizers.append(Muon(muon, lr=config.lr, weight_decay=config.weight_decay))
    return optimizers
