"""One loop for all stages: a stage says what trains and what a step computes, the config how fast and how long."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn

from distill.config import StageConfig
from distill.data.batches import Batch
from distill.rounding import round_, rounded_weights
from distill.stages import Stage, no_weight_decay

LOG_EVERY = 25


def train(
    name: str,
    stage: Stage,
    config: StageConfig,
    image_batches: Iterator[Batch],
    text_batches: Iterator[Batch] | None,
    log_path: Path,
) -> None:
    """Run a stage; leaves the trained values in its parameters, rounded as stored if the config rounds at all.

    Appends a JSON line to `log_path` and prints one every LOG_EVERY steps.
    Raises: FloatingPointError if the loss is not finite (checked whenever a line is written).
    """
    parameters = stage.parameters()
    if not parameters:
        raise ValueError(f"{name} trains nothing; check the layer types of the recipe")
    print(f"{name}: {sum(p.numel() for p in parameters.values()):,} parameters in {len(parameters)} tensors", flush=True)
    optimizer = torch.optim.AdamW(_groups(stage, parameters, config), betas=(0.9, 0.95), fused=_fused(parameters))
    peaks = [group["lr"] for group in optimizer.param_groups]
    started = last = time.perf_counter()
    step = logged = 0
    rounding = False
    while (progress := _progress(step, started, config)) < 1:
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * config.lr_factor(progress)
        rounding = progress >= config.round_from
        batches = [(1.0, next(image_batches))]
        if text_batches is not None and config.text_batch:
            batches.append((config.text_weight, next(text_batches)))
        with rounded_weights(parameters) if rounding else nullcontext():
            metrics = stage.step(batches)
        norm = nn.utils.clip_grad_norm_(parameters.values(), config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step == 1:
            first_ms = (time.perf_counter() - started) * 1e3
            started = last = time.perf_counter()  # compilation does not count against the minutes
            print(f"{name}: first step took {first_ms:.0f} ms", flush=True)
        if step % LOG_EVERY == 0 or step == 1:
            values = {k: float(v) for k, v in metrics.items()}
            now = time.perf_counter()
            line = {
                "stage": name,
                "step": step,
                "progress": round(progress, 4),
                "seconds": round(now - started, 1),
                "ms_per_step": round((now - last) * 1e3 / (step - logged), 1),
                "grad_norm": round(float(norm), 4),
                "rounding": rounding,
            } | {k: round(v, 5) for k, v in values.items()}
            last, logged = now, step
            print(json.dumps(line), flush=True)
            with log_path.open("a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
            if not all(torch.isfinite(torch.tensor(list(values.values())))):
                raise FloatingPointError(f"{name}: the loss is not finite at step {step}: {values}; lower the learning rate")
    if config.round_from < 1:
        round_(parameters)


def _progress(step: int, started: float, config: StageConfig) -> float:
    by_time = (time.perf_counter() - started) / (60 * config.max_minutes) if config.max_minutes else 0.0
    return max(step / config.steps, by_time)


def _fused(parameters: dict[str, nn.Parameter]) -> bool:
    return next(iter(parameters.values())).device.type == "cuda"


def _groups(stage: Stage, parameters: dict[str, nn.Parameter], config: StageConfig) -> list[dict[str, object]]:
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        groups.setdefault((stage.learning_rate(name), no_weight_decay(name)), []).append(parameter)
    return [
        {
            "params": params,
            "lr": getattr(config, rate) or config.lr,
            "weight_decay": 0.0 if plain else config.weight_decay,
        }
        for (rate, plain), params in groups.items()
    ]
