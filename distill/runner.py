"""How a stage's step is run: plainly, or captured once as a CUDA graph and replayed.

A step of a small model is a few thousand short kernels; launching them from Python takes longer than running them.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from distill.inputs import Inputs
from distill.stages import Stage

WeightedInputs = list[tuple[float, Inputs]]
WARMUP_STEPS = 3  # compilation and lazy allocations happen before the capture


class Gradients(Protocol):
    """What holds the gradients; see `distributed.FlatGradients`."""

    def zero_(self) -> None: ...


class StepFn(Protocol):
    """Takes batches on the CPU and leaves gradients, in place of those before or added to them; returns what to log."""

    def __call__(self, batches: WeightedInputs, *, add: bool = False) -> dict[str, Tensor]: ...


def step_runner(stage: Stage, gradients: Gradients, *, graph: bool) -> StepFn:
    """The step of a stage as a function.

    Raises (from the function): ValueError if a batch has other shapes than the first and `graph` is on.
    """
    return _GraphRunner(stage, gradients) if graph else _PlainRunner(stage, gradients)


class _PlainRunner:
    def __init__(self, stage: Stage, gradients: Gradients) -> None:
        self.stage = stage
        self.gradients = gradients

    def __call__(self, batches: WeightedInputs, *, add: bool = False) -> dict[str, Tensor]:
        device = self.stage.model.device
        if not add:
            self.gradients.zero_()
        return self.stage.compute([(weight, inputs.to(device)) for weight, inputs in batches])


class _GraphRunner(_PlainRunner):
    def __init__(self, stage: Stage, gradients: Gradients) -> None:
        super().__init__(stage, gradients)
        self.static: WeightedInputs = []
        self.graph: torch.cuda.CUDAGraph | None = None
        self.metrics: dict[str, Tensor] = {}

    def __call__(self, batches: WeightedInputs, *, add: bool = False) -> dict[str, Tensor]:
        if self.graph is None:
            self._capture(batches)
        assert self.graph is not None
        for (_, static), (_, new) in zip(self.static, batches, strict=True):
            static.copy_(new)
        if not add:
            self.gradients.zero_()
        self.graph.replay()
        return self.metrics

    def _capture(self, batches: WeightedInputs) -> None:
        self.static = [(weight, inputs.to(self.stage.model.device)) for weight, inputs in batches]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARMUP_STEPS):
                self.stage.compute(self.static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Thread-local: the loader's pinning thread may call CUDA meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.metrics = self.stage.compute(self.static)
        self.graph = graph
