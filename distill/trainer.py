"""One loop for all stages: a stage says what trains and what a step computes, the config how fast and how long."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distill.config import StageConfig
from distill.data.batches import Batch
from distill.distributed import FlatGradients, Processes
from distill.inputs import Inputs, prepare
from distill.optim import Muon
from distill.rounding import round_, rounded_weights
from distill.runner import step_runner
from distill.stages import Stage, no_weight_decay

LOG_EVERY = 25
ONE_PROCESS = Processes()


def train(
    name: str,
    stage: Stage,
    config: StageConfig,
    image_batches: Iterator[Batch],
    text_batches: Iterator[Batch] | None,
    log_path: Path,
    *,
    graph: bool = False,
    save: Callable[[], None] | None = None,
    processes: Processes = ONE_PROCESS,
) -> None:
    """Run a stage; leaves the trained values in its parameters, rounded as stored if the config rounds at all.

    Appends a JSON line to `log_path` and prints one every LOG_EVERY steps; the minutes of the config count from this
    call on, compilation included.

    Args:
        graph: capture the step as a CUDA graph.
        save: called every `config.save_minutes`, to write what there is so far.
        processes: those that train together, each on batches of its own; the main one writes.
    Raises: FloatingPointError if the loss is not finite (checked whenever a line is written), ValueError if nothing
        trains.
    """
    parameters = stage.parameters()
    if not parameters:
        raise ValueError(f"{name} trains nothing; check the layer types of the recipe")
    if processes.is_main:
        count = sum(p.numel() for p in parameters.values())
        print(f"{name}: {count:,} parameters in {len(parameters)} tensors", flush=True)
    optimizers = _optimizers(stage, parameters, config)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    peaks = [group["lr"] for group in groups]
    gradients = FlatGradients(parameters.values())
    run = step_runner(stage, gradients, graph=graph)
    clock = _Clock(config)
    step = 0
    while (progress := processes.first(clock.progress(step))) < 1:
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * config.lr_factor(progress)
        rounding = progress >= config.round_from
        with clock.waiting():
            batches = _next(stage, config, image_batches, text_batches)
        with rounded_weights(parameters) if rounding else nullcontext():
            metrics = run(batches)
        processes.average_(gradients.flat)
        norm = gradients.clip_(config.clip)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        if not processes.is_main:
            continue
        if step % LOG_EVERY == 0 or step == 1:
            values = {k: round(float(v), 5) for k, v in metrics.items()} | {"grad_norm": round(float(norm), 4)}
            line = {"stage": name, "step": step, "progress": round(progress, 4), "rounding": rounding}
            _write(log_path, line | clock.lap(step) | values)
            if not all(math.isfinite(v) for v in values.values()):
                raise FloatingPointError(f"{name}: not finite at step {step}: {values}; lower the learning rate")
        if save is not None and clock.save_due():
            save()
    if config.round_from < 1:
        round_(parameters)


def _next(
    stage: Stage, config: StageConfig, image_batches: Iterator[Batch], text_batches: Iterator[Batch] | None
) -> list[tuple[float, Inputs]]:
    every = stage.all_tokens
    image = prepare(next(image_batches), stage.model.config, config.image_answer_tokens, all_tokens=every)
    batches = [(1.0, image)]
    if text_batches is not None and config.text_batch:
        text = prepare(next(text_batches), stage.model.config, config.text_answer_tokens, all_tokens=every)
        batches.append((config.text_weight, text))
    return batches


def _optimizers(stage: Stage, parameters: dict[str, nn.Parameter], config: StageConfig) -> list[torch.optim.Optimizer]:
    adamw: dict[tuple[str, bool], list[nn.Parameter]] = {}
    muon: list[nn.Parameter] = []
    for name, parameter in parameters.items():
        rate, plain = stage.learning_rate(name), no_weight_decay(name)
        if config.muon and rate == "lr" and parameter.ndim == 2 and not plain:
            muon.append(parameter)
        else:
            adamw.setdefault((rate, plain), []).append(parameter)
    groups: list[dict[str, Any]] = [
        {
            "params": params,
            "lr": getattr(config, rate) or config.lr,
            "weight_decay": 0.0 if plain else config.weight_decay,
        }
        for (rate, plain), params in adamw.items()
    ]
    optimizers: list[torch.optim.Optimizer] = []
    if groups:
        cuda = groups[0]["params"][0].is_cuda
        optimizers.append(torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=cuda))
    if muon:
        optimizers.append(Muon(muon, lr=config.lr, weight_decay=config.weight_decay))
    return optimizers


def _write(log_path: Path, line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)
    with log_path.open("a", encoding="utf-8") as log:
        log.write(json.dumps(line) + "\n")


class _Clock:
    """Time of a run: its progress, the rate since the last log line, the share spent waiting for data."""

    def __init__(self, config: StageConfig) -> None:
        self.config = config
        self.started = self.last_lap = self.last_save = time.perf_counter()
        self.lap_step = 0
        self.waited_s = 0.0
        self._wait_began = 0.0

    def progress(self, step: int) -> float:
        minutes = (time.perf_counter() - self.started) / 60
        by_time = minutes / self.config.max_minutes if self.config.max_minutes else 0.0
        return max(step / self.config.steps, by_time)

    def waiting(self) -> _Clock:
        return self

    def __enter__(self) -> None:
        self._wait_began = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.waited_s += time.perf_counter() - self._wait_began

    def lap(self, step: int) -> dict[str, float]:
        now = time.perf_counter()
        steps = step - self.lap_step
        line = {
            "seconds": round(now - self.started, 1),
            "ms_per_step": round((now - self.last_lap) * 1e3 / steps, 1),
            "data_ms": round(self.waited_s * 1e3 / steps, 1),
        }
        self.last_lap, self.lap_step, self.waited_s = now, step, 0.0
        return line

    def save_due(self) -> bool:
        now = time.perf_counter()
        due = bool(self.config.save_minutes) and now - self.last_save >= 60 * self.config.save_minutes
        if due:
            self.last_save = now
        return due
