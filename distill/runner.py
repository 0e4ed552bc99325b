"""How a stage's step is run: plainly, or captured once as a CUDA graph and replayed.

A step of a small model is a few thousand short kernels; launching them from Python takes longer than running them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from distill.inputs import Inputs
from distill.stages import Stage

WeightedInputs = list[tuple[float, Inputs]]
StepFn = Callable[[WeightedInputs], dict[str, Tensor]]
WARMUP_STEPS = 3  # compilation and lazy allocations happen before the capture


def step_runner(stage: Stage, *, graph: bool) -> StepFn:
    """A function that takes batches on the CPU, zeroes the gradients, and leaves new ones.

    Raises (from the function): ValueError if a batch has other shapes than the first and `graph` is on.
    """
    return _GraphRunner(stage) if graph else _PlainRunner(stage)


class _PlainRunner:
    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.parameters = list(stage.parameters().values())

    def __call__(self, batches: WeightedInputs) -> dict[str, Tensor]:
        for parameter in self.parameters:
            parameter.grad = None
        device = self.stage.model.device
        return self.stage.compute([(weight, inputs.to(device)) for weight, inputs in batches])


class _GraphRunner:
    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.parameters = list(stage.parameters().values())
        self.static: WeightedInputs = []
        self.graph: torch.cuda.CUDAGraph | None = None
        self.metrics: dict[str, Tensor] = {}

    def __call__(self, batches: WeightedInputs) -> dict[str, Tensor]:
        if self.graph is None:
            self._capture(batches)
        assert self.graph is not None
        for (_, static), (_, new) in zip(self.static, batches, strict=True):
            static.copy_(new)
        self.graph.replay()
        return self.metrics

    def _capture(self, batches: WeightedInputs) -> None:
        self.static = [(weight, inputs.to(self.stage.model.device)) for weight, inputs in batches]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARMUP_STEPS):
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Thread-local: the loader's pinning thread may call CUDA meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.metrics = self._step()
        self.graph = graph

    def _step(self) -> dict[str, Tensor]:
        # The gradients keep their memory: the graph adds into it.
        grads = [p.grad for p in self.parameters if p.grad is not None]
        if grads:
            torch._foreach_zero_(grads)
        return self.stage.compute(self.static)
