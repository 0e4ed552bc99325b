"""Weights spread over the processes (FSDP), for networks that do not fit into one card: `--shard`.

Each process keeps its rows of every large matrix, of its gradient and of the optimizer's state; a matrix is put
together for the moment in which it is used. Units are the parts of a block (MLP, projections), not blocks: a teacher's
and a student's block share their MLP in memory, and stages run parts of a block by themselves. Embedding tables, the
output head and vectors stay whole in every process; their gradients are averaged as without sharding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from distill.convert import SplitProjection
from distill.distributed import FlatGradients, Processes
from distill.stages import Stage
from mmmamba.layers import GatedMLP
from mmmamba.model import Block


def shard_(stage: Stage, processes: Processes, device: torch.device) -> None:
    """Spread the matrices of all networks of a stage over the processes, and move everything to `device`; in place.

    The networks may come on the CPU, so that no card has to hold one whole.

    Raises: ValueError for one process, which has nobody to share with.
    """
    if processes.world_size == 1:
        raise ValueError(
            "--shard spreads the weights over several processes, and there is one; start more with "
            "`accelerate launch --num_processes N -m distill ...`, or leave --shard out"
        )
    mesh = init_device_mesh(device.type, (processes.world_size,))
    # What autocast would make of a weight, made before it is sent: half the traffic, the same products.
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if device.type == "cuda" else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    networks = stage.networks()
    for unit in _units(networks):
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    for parameter in {id(p): p for network in networks for p in network.parameters()}.values():
        if not isinstance(parameter, DTensor):
            parameter.data = parameter.data.to(device)


def _units(networks: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """Each once, though several networks hold it."""
    seen: set[int] = set()
    for network in networks:
        for block in (m for m in network.modules() if isinstance(m, Block)):
            inside_mlp = {id(m) for m in block.mlp.modules()}
            for module in block.modules():
                whole = isinstance(module, GatedMLP | SplitProjection)
                linear = isinstance(module, nn.Linear) and id(module) not in inside_mlp
                if (whole or linear) and id(module) not in seen:
                    seen.add(id(module))
                    yield module


class ShardedGradients:
    """The interface of FlatGradients over parameters of which some are spread and some whole."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        given = list(parameters)
        self.sharded = [p for p in given if isinstance(p, DTensor)]
        whole = [p for p in given if not isinstance(p, DTensor)]
        self.whole = FlatGradients(whole) if whole else None

    def zero_(self) -> None:
        for parameter in self.sharded:
            parameter.grad = None
        if self.whole is not None:
            self.whole.zero_()

    def average_(self, processes: Processes) -> None:
        """The mean over the processes; what is spread was averaged when it was sent."""
        if self.whole is not None:
            self.whole.average_(processes)

    def clip_(self, limit: float) -> Tensor:
        """Scale to a norm of at most `limit` over all processes; returns the norm before that, on the device."""
        local = [cast(DTensor, p.grad).to_local() for p in self.sharded if p.grad is not None]
        square = torch.stack([norm * norm for norm in torch._foreach_norm(local)]).sum()
        dist.all_reduce(square)
        if self.whole is not None:
            square = square + self.whole.flat.norm() ** 2
        norm = square.sqrt()
        scale = (limit / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(local, scale)
        if self.whole is not None:
            self.whole.flat *= scale
        return norm


def gradients_of(parameters: Iterable[nn.Parameter]) -> FlatGradients | ShardedGradients:
    """The gradients of a stage's parameters, spread or not."""
    given = list(parameters)
    return ShardedGradients(given) if is_sharded(given) else FlatGradients(given)


def is_sharded(tensors: Iterable[Tensor]) -> bool:
    return any(isinstance(t, DTensor) for t in tensors)


def whole(value: Any) -> Any:
    """`value` with every spread tensor in it put together, copied to the CPU; all processes must call it alike.

    Takes tensors and dicts, lists and tuples of them, such as the state of an optimizer.
    """
    if isinstance(value, DTensor):
        return value.full_tensor().detach().cpu()
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(whole(item) for item in value)
    return value


def like(tensor: Tensor, example: Tensor) -> Tensor:
    """A whole tensor spread as `example` is, on its device; plain if that is, or if it has another shape."""
    if isinstance(example, DTensor) and tensor.shape == example.shape:
        mesh = example.device_mesh
        # Everybody has read the same file: nothing has to be sent.
        return distribute_tensor(tensor.to(mesh.device_type), mesh, example.placements, src_data_rank=None)
    return tensor


def load_optimizer_(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """`optimizer.load_state_dict` of a state that `whole` has put together."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    spread = {
        index: {
            name: like(value, parameters[int(index)]) if isinstance(value, Tensor) else value
            for name, value in own.items()
        }
        for index, own in state["state"].items()
    }
    optimizer.load_state_dict(state | {"state": spread})
