"""Training steps of a recipe's stages on random weights and data: their time, utilisation and memory.

    python -m benchmarks.distill --recipe hovle-2.6b-linear --stages stage1,stage2,stage3 --out distill.jsonl
    torchrun --nproc-per-node 2 -m benchmarks.distill --recipe hovle-2.6b-linear --stages stage3
    python -m benchmarks.distill --recipe nano-linear --stages teacher,stage3 --graph
    python -m benchmarks.distill --recipe hovle-2.6b-linear --stages stage1 --layers both

A step is the trainer's own: batches from page-locked memory, forward, backward, averaging over the processes, clipping,
optimizer; reading and drawing samples is left out. Speed does not depend on the values of weights and tokens. A JSON
line per stage, printed and written to `--out` as soon as it is measured; one that runs out of memory or fails says so,
and the next goes on. With several processes each stage is measured in one of them while the others rest, then in all.

`mfu` is useful operations (`benchmarks.flops`; what is computed twice counts once) over the peak of the card's data
sheet, where that is known; `of_matmul` is the same over the rate of a large matrix product measured here.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast, get_args

import torch

from benchmarks.flops import step_flops
from benchmarks.machine import best_s, device_name, peak_flops, peak_memory_bytes, reset_peak_memory, synchronize
from benchmarks.networks import random_batches, random_stage, teacher_config, with_rows
from benchmarks.report import spread
from distill.config import STUDENT_STAGES, Recipe, StageConfig
from distill.distributed import Processes, end_process
from distill.layer_step import Layers
from distill.memory import StudentStage, step_memory
from distill.recompute import recompute_blocks_
from distill.runner import WeightedInputs
from distill.stages import LayerStage, Stage
from distill.trained import check_trained
from distill.trainer import ONE_PROCESS, Loop
from mmmamba.config import ModelConfig

WARM_UP_STEPS = 2
_RECOMPUTE: dict[str, tuple[bool | None, ...]] = {
    "recipe": (None,),
    "on": (True,),
    "off": (False,),
    "both": (False, True),
}
# How the layers of stages 1 and 2 run, by the option's value.
_LAYERS: dict[str, tuple[Layers, ...]] = {
    **{way: (way,) for way in get_args(Layers)},
    "both": ("written-out", "autograd"),
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distill", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", default="nano-linear", help="name in distill/recipes, or a YAML file")
    parser.add_argument("--stages", help="with commas between; default: all of the recipe")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a stage, 2 or more (%(default)s)")
    parser.add_argument("--image-batch", type=int, help="rows a step, instead of the recipe's")
    about = "compute blocks again in stage 3's backward pass: as the recipe says, or not, or each in turn"
    parser.add_argument("--recompute", choices=tuple(_RECOMPUTE), default="recipe", help=about)
    about = "layers of stages 1 and 2 in kernels written out, by autograd, each in turn, or as training has them here"
    parser.add_argument("--layers", choices=tuple(_LAYERS), default="auto", help=about)
    parser.add_argument("--all-tokens", action="store_true", help="stage 3 learns every token, not only answers")
    about = "where HoVLE shuffles pixels; post: 1,024 tokens a tile in the embedding stack (%(default)s)"
    parser.add_argument("--pixel-shuffle", choices=("pre", "post"), default="post", help=about)
    parser.add_argument("--graph", action="store_true", help="capture a step as a CUDA graph")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--profile", action="store_true", help="print the kernels that take the time")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON lines there too, each at once")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; see the module's text. Returns 1 if a stage failed otherwise than for want of memory."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.steps < 2:
        parser.error(f"--steps {args.steps} gives no spread; use 2 or more")
    recipe = Recipe.load(args.recipe)
    if args.all_tokens:
        recipe = recipe.with_reference_objective()
    names = args.stages.split(",") if args.stages else list(recipe.stages)
    if unknown := [name for name in names if name not in recipe.stages]:
        parser.error(f"--stages {','.join(unknown)}: recipe {recipe.name} has {', '.join(recipe.stages)}")
    processes = Processes.join()
    try:
        status = _Bench(args, recipe, processes).run(names)
        processes.wait()  # one that leaves takes its connections along
        return status
    finally:
        processes.leave()


class _Bench:
    """One run: what was asked for, on this process's device."""

    def __init__(self, args: argparse.Namespace, recipe: Recipe, processes: Processes) -> None:
        self.args = args
        self.recipe = recipe
        self.processes = processes
        self.device = torch.device(args.device)
        self.teacher = teacher_config(recipe, args.pixel_shuffle)
        self.matmul = _matmul_flops(self.device)
        self.records: list[dict[str, Any]] = []

    def run(self, names: list[str]) -> int:
        known = peak_flops(self.device)
        sheet = "" if known is None else f", {known / 1e12:.0f} on the data sheet"
        self._say(
            f"bf16 matrix products: {self.matmul / 1e12:.0f} TFLOP/s on {device_name(self.device)}{sheet}; "
            f"{self.processes.world_size} process(es), torch {torch.__version__}"
        )
        for name in names:
            for recompute in _RECOMPUTE[self.args.recompute] if name == "stage3" else (None,):
                config = with_rows(self.recipe.stages[name], self.args.image_batch, recompute)
                for layers in _LAYERS[self.args.layers] if name in ("stage1", "stage2") else ("auto",):
                    self._record(self._facts(name, config) | self._stage(name, config, layers))
        self._say(json.dumps({"benchmark": "distill", "records": self.records}))
        return int(any("failed" in record for record in self.records))

    def _stage(self, name: str, config: StageConfig, layers: Layers) -> dict[str, Any]:
        """What is measured of one stage; its memory is given up on return."""
        try:
            return self._measure(name, config, layers)
        finally:
            torch.compiler.reset()
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _measure(self, name: str, config: StageConfig, layers: Layers) -> dict[str, Any]:
        reset_peak_memory(self.device)
        stage: Stage | None = None
        loop: Loop | None = None
        batches: WeightedInputs = []
        problem: dict[str, str] = {}
        first_s = 0.0
        try:
            stage, loop, batches = self._prepare(name, config, layers)
            first_s = self._step_ms(loop, batches) / 1e3
            for _ in range(WARM_UP_STEPS - 1):
                self._step_ms(loop, batches)
        except (MemoryError, torch.OutOfMemoryError) as error:
            problem = {"out_of_memory": " ".join(str(error).split())[:300]}
        except Exception as error:  # what was measured before and what comes after are worth having all the same
            traceback.print_exc()
            problem = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        # One that stops here would leave the others waiting for its gradients.
        if found := [one for one in self.processes.gather(problem) if one]:
            return found[0] | {"peak_bytes": peak_memory_bytes(self.device)}
        assert loop is not None
        record = self._describe(name, batches) | {"first_s": round(first_s, 1)}
        if isinstance(stage, LayerStage):
            record["layers"] = "written-out" if stage.written_out else "autograd"
        if self.processes.is_main:
            alone = [self._step_ms(loop, batches) for _ in range(self.args.steps)]
        self.processes.wait()
        if self.processes.is_main:
            record |= self._rates(name, alone, batches)
            if self.args.profile:
                _print_profile(lambda: self._step_ms(loop, batches), self.device)
        record["peak_bytes"] = max(self.processes.gather(peak_memory_bytes(self.device)))
        if self.processes.world_size > 1:
            record |= self._together(loop, batches, record)
        return record

    def _together(self, loop: Loop, batches: WeightedInputs, record: dict[str, Any]) -> dict[str, Any]:
        """The same step in all processes at once, gradients averaged."""
        count = self.processes.world_size
        loop.processes = self.processes
        self._step_ms(loop, batches)
        self.processes.wait()
        times = [max(self.processes.gather(self._step_ms(loop, batches))) for _ in range(self.args.steps)]
        if not self.processes.is_main:
            return {}
        low, median, high = spread(times)
        return {
            "processes": count,
            "together_ms": round(median, 1),
            "together_p20_p80_ms": [round(low, 1), round(high, 1)],
            "together_tokens_per_s": round(count * record["tokens"] / median * 1e3),
            "scaling": round(count * record["ms"] / median, 3),
            "together_peak_bytes": peak_memory_bytes(self.device),
        }

    def _prepare(self, name: str, config: StageConfig, layers: Layers) -> tuple[Stage, Loop, WeightedInputs]:
        graph = self.args.graph and self.device.type == "cuda"
        how: dict[str, Any] = {"compiled": self.args.compile, "captured": graph, "layers": layers}
        stage = random_stage(name, self.recipe, config, self.teacher, self.device, **how)
        parameters = check_trained(name, stage)
        if config.activation_checkpointing:
            recompute_blocks_(stage.networks())
        loop = Loop(name, stage, config, parameters, ONE_PROCESS, graph=graph, estimate=None)
        return stage, loop, random_batches(self.recipe, config, stage, fixed_shapes=graph)

    def _step_ms(self, loop: Loop, batches: WeightedInputs) -> float:
        synchronize(self.device)
        started = time.perf_counter()
        loop.advance([batches], progress=0.5)
        synchronize(self.device)
        return (time.perf_counter() - started) * 1e3

    def _facts(self, name: str, config: StageConfig) -> dict[str, Any]:
        """What is known before anything is measured."""
        facts: dict[str, Any] = {
            "what": name,
            "recipe": self.recipe.name,
            "all_tokens": config.all_tokens,
            "recompute": config.activation_checkpointing and name not in ("stage1", "stage2"),
            "compile": self.args.compile,
            "graph": self.args.graph,
            "device": device_name(self.device),
            "torch": torch.__version__,
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        }
        if name in STUDENT_STAGES:
            recipe = Recipe(**{**vars(self.recipe), "stages": {name: config}})
            scan: Any = "triton" if self.device.type == "cuda" else "chunked"
            need = step_memory(recipe, cast(StudentStage, name), self._network(name), scan=scan)
            facts |= {"estimated_bytes": need.total}
        return facts

    def _network(self, name: str) -> ModelConfig:
        """The student's config; in the teacher's stage the teacher's."""
        if name == "teacher":
            return self.teacher
        return self.teacher.with_layer_types(*self.recipe.layer_types(self.teacher))

    def _describe(self, name: str, batches: WeightedInputs) -> dict[str, Any]:
        """The batches, and the operations that they ask for."""
        given = [inputs for _, inputs in batches]
        flops = step_flops(name, self._network(name), batches)
        return {
            "tokens": sum(inputs.shape[0] * inputs.shape[1] for inputs in given),
            "embedding_tokens": sum(inputs.layout.stack_ids.numel() for inputs in given),
            "tiles": sum(0 if inputs.pixels is None else len(inputs.pixels) for inputs in given),
            "segments": sum(
                inputs.shape[0] if inputs.segments is None else int((inputs.segments[1].cu_seqlens.diff() > 0).sum())
                for inputs in given
            ),
            "learned_tokens": sum(inputs.positions.numel() for inputs in given),
            "tflop": {part: float(f"{value / 1e12:.4g}") for part, value in flops._asdict().items()},
        }

    def _rates(self, name: str, times: list[float], batches: WeightedInputs) -> dict[str, Any]:
        low, median, high = spread(times)
        tokens = sum(inputs.shape[0] * inputs.shape[1] for _, inputs in batches)
        flops = step_flops(name, self._network(name), batches)
        rate = flops.total / median * 1e3
        known = peak_flops(self.device)
        products = flops.layers + flops.head + flops.image
        return {
            "ms": round(median, 1),
            "p20_p80_ms": [round(low, 1), round(high, 1)],
            "tokens_per_s": round(tokens / median * 1e3),
            "tflop_per_s": float(f"{rate / 1e12:.4g}"),
            "mfu": None if known is None else round(rate / known, 3),
            "mfu_of_weights_alone": None if known is None else round(products / median * 1e3 / known, 3),
            "of_matmul": round(rate / self.matmul, 3),
        }

    def _record(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        line = json.dumps(record)
        self._say(line)
        if self.args.out is not None and self.processes.is_main:
            self.args.out.parent.mkdir(parents=True, exist_ok=True)
            with self.args.out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    def _say(self, text: str) -> None:
        if self.processes.is_main:
            print(text, flush=True)


def _print_profile(step: Callable[[], object], device: torch.device) -> None:
    cuda = device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU] + ([torch.profiler.ProfilerActivity.CUDA] if cuda else [])
    with torch.profiler.profile(activities=kinds) as profile:
        step()
    key = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    print(profile.key_averages().table(sort_by=key, row_limit=30, max_name_column_width=70), flush=True)


def _matmul_flops(device: torch.device) -> float:
    """Rate of a large bf16 matrix product on random data, measured here."""
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / best_s(lambda: a @ b, device, repeats=8)


if __name__ == "__main__":
    end_process(main())
