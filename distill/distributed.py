"""Several processes that train one model on different batches: gradients are averaged, everything else is equal in all.

`accelerate launch` or `torchrun` starts them, on one host or many, and names the others in the environment; without it
there is one process. One averaging of one tensor a step, instead of a wrapper around the model, leaves the step whole,
so that it can be captured as a CUDA graph. Models too large for that: `distill.sharding`.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Processes:
    """This process among those of a run."""

    rank: int = 0
    world_size: int = 1

    @classmethod
    def join(cls) -> Processes:
        """Meet the others that the launcher's environment names; on CUDA each takes the card of its local rank."""
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if world_size == 1:
            return cls()
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # Gradients go from card to card, what the host has to know (the clock) from host to host.
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        return cls(dist.get_rank(), world_size)

    @property
    def is_main(self) -> bool:
        """True for the one that prints and writes."""
        return self.rank == 0

    def agree(self, progress: float, *, save: bool, stop: bool) -> tuple[float, bool, bool]:
        """The same in all: the main process's progress, whether it is due to save, whether any was asked to stop."""
        if self.world_size == 1:
            return progress, save, stop
        own = [progress, float(save)] if self.is_main else [-1.0, 0.0]
        shared = torch.tensor([*own, float(stop)], dtype=torch.float64)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return float(shared[0]), bool(shared[1]), bool(shared[2])

    def gather(self, value: Any) -> list[Any]:
        """What each process passes, in order of rank, in all of them."""
        if self.world_size == 1:
            return [value]
        out = [None] * self.world_size
        dist.all_gather_object(out, value)
        return out

    def first(self, value: float) -> float:
        """The main process's value, in all of them."""
        if self.world_size == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64)
        dist.broadcast(shared, src=0)
        return float(shared)

    def average_(self, tensor: Tensor) -> None:
        """The mean over the processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
            tensor /= self.world_size

    def wait(self) -> None:
        """Until all have come here."""
        if self.world_size > 1:
            dist.all_reduce(torch.zeros(()))  # of a broadcast the sender does not wait for anybody

    def leave(self) -> None:
        """End of a run."""
        if self.world_size > 1:
            dist.destroy_process_group()


def end_process(status: int) -> NoReturn:
    """Leave the interpreter.

    One among several leaves without destructors: threads of the connections can outlive them and abort a process that
    has done all its work (seen with torch 2.13), which the launcher takes for a run that failed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        sys.exit(status)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class FlatGradients:
    """The gradients of all parameters as views of one tensor: zeroed, averaged and clipped in one operation each.

    They keep their memory from step to step, which a captured graph relies on.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        first = self.parameters[0]
        self.flat = torch.zeros(sum(p.numel() for p in self.parameters), dtype=first.dtype, device=first.device)
        start = 0
        for parameter in self.parameters:
            parameter.grad = self.flat[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()

    def zero_(self) -> None:
        self.flat.zero_()

    def average_(self, processes: Processes) -> None:
        """The mean over the processes."""
        processes.average_(self.flat)

    def clip_(self, limit: float) -> Tensor:
        """Scale to a norm of at most `limit`; returns the norm before that, on the device."""
        norm = self.flat.norm()
        self.flat *= (limit / (norm + 1e-6)).clamp(max=1.0)
        return norm
