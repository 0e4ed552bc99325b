"""One loop for all stages: a stage says what trains and what a step computes, the config how fast and how long."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from distill.checkpoints import Checkpoint, Checkpoints, rng_state, set_rng_state
from distill.clock import Clock
from distill.config import StageConfig
from distill.data.packed_stream import Batches, PackedStream
from distill.distributed import Processes
from distill.faults import Interrupted, Interrupts, Watch, WeightedInputs, explain_memory
from distill.inputs import prepare
from distill.memory import StageMemory
from distill.monitor import Monitor
from distill.optim import stage_optimizers
from distill.recompute import recompute_blocks_
from distill.rounding import round_, rounded_weights
from distill.runner import StepFn, step_runner
from distill.sharding import gradients_of, is_sharded, like, load_optimizer_, whole
from distill.stages import Stage
from distill.trained import check_trained, trained_table

LOG_EVERY = 25
ONE_PROCESS = Processes()


class Trained(NamedTuple):
    """Of a finished stage: its steps and how long it took, interruptions not counted."""

    steps: int
    seconds: float


def train(
    name: str,
    stage: Stage,
    config: StageConfig,
    image_batches: Batches,
    text_batches: Batches | None,
    log_path: Path,
    *,
    graph: bool = False,
    store: Checkpoints | None = None,
    resume: Checkpoint | None = None,
    tensorboard: Path | None = None,
    processes: Processes = ONE_PROCESS,
    estimate: StageMemory | None = None,
) -> Trained:
    """Run a stage; leaves the trained values in its parameters, rounded as stored if the config rounds at all.

    Appends a JSON line to `log_path` every LOG_EVERY steps. The minutes of the config count from this call on,
    compilation included, added to those before the checkpoint. Ctrl-C finishes the step first.

    Args:
        image_batches, text_batches: those after the checkpoint's, if there is one; packed ones hold both.
        graph: capture the step as a CUDA graph.
        store: where checkpoints go, every `config.save_minutes` or `config.save_steps` and when interrupted.
        resume: what to go on from; every value is then what it would have been without the interruption.
        tensorboard: folder for curves.
        processes: those that train together, each on batches of its own; the main one writes.
        estimate: what a step should need; named if there is less.
    Raises: FloatingPointError if a loss or gradient is not finite, with the batch kept; MemoryError saying what to
        lower; Interrupted when asked to stop, with everything saved; ValueError if nothing trains, a checkpoint does
        not fit, or settings exclude each other.
    """
    parameters = check_trained(name, stage)
    _check(name, parameters, config, graph=graph)
    if config.activation_checkpointing:
        recompute_blocks_(stage.networks())
    loop = Loop(name, stage, config, parameters, processes, graph=graph, estimate=estimate)
    if resume is not None:
        loop.restore(resume)
    clock = Clock(config, elapsed_s=resume.elapsed_s if resume else 0.0, step=loop.step)
    monitor = Monitor(
        name,
        config,
        log_path,
        tensorboard=tensorboard,
        quiet=not processes.is_main,
        progress=clock.progress(loop.step),
    )
    monitor.say(trained_table(name, stage, parameters))
    if resume is not None:
        monitor.say(f"{name}: going on from step {loop.step}")
    watch = Watch(name, log_path.parent, processes.rank)
    try:
        with Interrupts() as interrupts:
            while True:
                progress, save, stop = processes.agree(
                    clock.progress(loop.step), save=clock.save_due(loop.step), stop=interrupts.asked
                )
                monitor.move(progress)
                if (save or stop) and store is not None:
                    watch.drain()
                    _save(loop, clock, store, monitor, image_batches, must=stop)
                if stop:
                    raise Interrupted(_how_to_go_on(name, loop.step, store))
                if progress >= 1:
                    break
                with clock.waiting():
                    batches = [
                        _next(stage, config, image_batches, text_batches, fixed_shapes=graph)
                        for _ in range(config.accumulate)
                    ]
                values = loop.advance(batches, progress)
                watch.push(loop.step, values, batches)
                if loop.step % LOG_EVERY == 0 or loop.step == 1:
                    numbers = {k: round(float(v), 4 if k == "grad_norm" else 5) for k, v in values.items()}
                    line = {
                        "step": loop.step,
                        "progress": round(progress, 4),
                        "lr": loop.lr,
                        "rounding": progress >= config.round_from,
                    }
                    monitor.write(line | clock.lap(loop.step) | numbers)
            watch.drain()
    finally:
        monitor.close()
    if config.round_from < 1:
        round_(parameters)
    return Trained(loop.step, clock.elapsed_s)


class Loop:
    """What changes from step to step, but for the clock: weights, gradients, optimizers and their count."""

    def __init__(
        self,
        name: str,
        stage: Stage,
        config: StageConfig,
        parameters: dict[str, nn.Parameter],
        processes: Processes,
        *,
        graph: bool,
        estimate: StageMemory | None,
    ) -> None:
        self.name = name
        self.estimate = estimate
        self.config = config
        self.parameters = parameters
        self.processes = processes
        self.step = 0
        self.batches = 0  # taken from each stream by all processes together
        self.lr = 0.0  # of the last step
        self.optimizers = stage_optimizers(stage, parameters, config)
        self._peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        self._gradients = gradients_of(parameters.values())
        self._stage = stage
        self._run: StepFn = step_runner(stage, self._gradients, graph=graph)

    def advance(self, batches: list[WeightedInputs], progress: float) -> dict[str, Tensor]:
        """One step; returns what to log, on the device."""
        self._set_rates(self.config.lr_factor(progress))
        rounding = progress >= self.config.round_from
        with explain_memory(self.name, self.config, batches[0], self.estimate):
            with rounded_weights(self.parameters) if rounding else nullcontext():
                values = self._compute(batches)
            self._gradients.average_(self.processes)
            values["grad_norm"] = self._gradients.clip_(self.config.clip)
            for optimizer in self.optimizers:
                optimizer.step()
        self.step += 1
        self.batches += len(batches) * self.processes.world_size
        return values

    def _compute(self, batches: list[WeightedInputs]) -> dict[str, Tensor]:
        """Gradients of the mean over batches, and the mean of what they log."""
        total: dict[str, Tensor] = {}
        share = 1 / len(batches)
        for i, batch in enumerate(batches):
            scaled = [(weight * share, inputs) for weight, inputs in batch]
            # A captured step returns the same memory every time, so the first is copied before it is added to.
            for key, value in self._run(scaled, add=i > 0).items():
                total[key] = value * share if i == 0 else total[key] + value * share
        return total

    def _set_rates(self, factor: float) -> None:
        self.lr = self.config.lr * factor
        self._stage.follow(factor)
        for optimizer, peaks in zip(self.optimizers, self._peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor

    def checkpoint(self, facts: dict[str, object], elapsed_s: float, batches: Batches) -> Checkpoint:
        """The state after the last step; all processes must call it, only the main one's is whole."""
        needed = self.processes.is_main or is_sharded(self.parameters.values())
        return Checkpoint(
            facts=facts,
            step=self.step,
            elapsed_s=elapsed_s,
            batches=self.batches,
            parameters=whole({name: p.data for name, p in self.parameters.items()}) if needed else {},
            optimizers=whole([optimizer.state_dict() for optimizer in self.optimizers]) if needed else [],
            rng=self.processes.gather(rng_state()),
            streams=self.processes.gather(batches.position.plain()) if isinstance(batches, PackedStream) else [],
        )

    @torch.no_grad()
    def restore(self, checkpoint: Checkpoint) -> None:
        """Raises: ValueError if the checkpoint is of other shapes."""
        checkpoint.check_shapes(self.parameters)
        for name, parameter in self.parameters.items():
            parameter.copy_(like(checkpoint.parameters[name], parameter))
        for optimizer, state in zip(self.optimizers, checkpoint.optimizers, strict=True):
            load_optimizer_(optimizer, state)
        self.step, self.batches = checkpoint.step, checkpoint.batches
        if self.processes.rank < len(checkpoint.rng):
            set_rng_state(checkpoint.rng[self.processes.rank])


def _check(name: str, parameters: dict[str, nn.Parameter], config: StageConfig, *, graph: bool) -> None:
    """Raises: ValueError for settings that exclude each other."""
    if not is_sharded(parameters.values()):
        return
    if graph:
        raise ValueError("--graph captures a step of one process, and --shard sends weights within it; leave one out")
    if config.round_from < 1:
        raise ValueError(
            f"{name}: round_from={config.round_from} rounds whole tensors, and --shard spreads them; set it to 1 or "
            "leave --shard out"
        )


def _save(loop: Loop, clock: Clock, store: Checkpoints, monitor: Monitor, batches: Batches, *, must: bool) -> None:
    """Write a checkpoint. On a full disk the run goes on and tries again after the next interval, unless it `must`.

    Raises: OSError if it must and cannot.
    """
    if clock.saved_step == loop.step:
        return
    checkpoint = loop.checkpoint(store.facts, clock.elapsed_s, batches)
    clock.saved(loop.step)
    if not loop.processes.is_main:
        return
    try:
        path = store.save(checkpoint)
        monitor.say(f"{loop.name}: step {loop.step} kept in {path}")
    except OSError as error:
        if must:
            raise
        print(f"{loop.name}: {error}; training goes on", file=sys.stderr, flush=True)


def _how_to_go_on(name: str, step: int, store: Checkpoints | None) -> str:
    if store is None:
        return f"{name} stopped after step {step}; nothing was kept, as no folder for checkpoints was given"
    return f"{name} stopped after step {step}, kept in {store.folder}; the same command goes on from there"


def _next(
    stage: Stage, config: StageConfig, image_batches: Batches, text_batches: Batches | None, *, fixed_shapes: bool
) -> WeightedInputs:
    options = {"all_tokens": stage.all_tokens, "mark_real": stage.mark_real, "fixed_shapes": fixed_shapes}
    image = prepare(next(image_batches), stage.model.config, config.image_answer_tokens, **options)
    batches = [(1.0, image)]
    if text_batches is not None and config.text_batch:
        text = prepare(next(text_batches), stage.model.config, config.text_answer_tokens, **options)
        batches.append((config.text_weight, text))
    return batches
