"""How a stage's step is run: plainly, or captured once as a CUDA graph and replayed.

A step of a small model is a few thousand short kernels; launching them from Python takes longer than running them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from distill.distributed import FlatGradients
from distill.inputs import Inputs
from distill.stages import Stage

WeightedInputs = list[tuple[float, Inputs]]
StepFn = Callable[[WeightedInputs], dict[str, Tensor]]
WARMUP_STEPS = 3  # compilation and lazy allocations happen before the capture


def step_runner(stage: Stage, gradients: FlatGradients, *, graph: bool) -> StepFn:
    """A function that takes batches on the CPU, zeroes the gradients, and leaves new ones.

    Raises (from the function): ValueError if a batch has other shapes than the first and `graph` is on.
    """
    return _GraphRunner(stage, gradients) if graph else _PlainRunner(stage, gradients)


class _PlainRunner:
    def __init__(self, stage: Stage, gradients: FlatGradients) -> None:
        self.stage = stage
        self.gradients = gradients

    def __call__(self, batches: WeightedInputs) -> dict[str, Tensor]:
        device = self.stage.model.device
        return self._step([(weight, inputs.to(device)) for weight, inputs in batches])

    def _step(self, batches: WeightedInputs) -> dict[str, Tensor]:
        self.gradients.zero_()
        return self.stage.compute(batches)


class _GraphRunner(_PlainRunner):
    def __init__(self, stage: Stage, gradients: FlatGradients) -> None:
        super().__init__(stage, gradients)
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
                self._step(self.static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Thread-local: the loader's pinning thread may call CUDA meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.metrics = self._step(self.static)
        self.graph = graph
