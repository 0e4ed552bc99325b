"""Training steps of nano's stages on random data: `python -m benchmarks.distill --stages teacher,stage3 --graph`.

Prints, for every stage of a recipe, the time of a step, samples a second, model FLOP utilisation against a measured
matrix product, and peak memory; `--profile` adds the kernels that take the time. Random weights and tokens: speed does
not depend on their values. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.machine import best_s, device_name, peak_memory_bytes, reset_peak_memory, synchronize
from distill.config import Recipe, StageConfig
from distill.convert import make_student
from distill.data.batches import Batch
from distill.distributed import FlatGradients
from distill.inputs import Inputs, prepare
from distill.nano import IMG_CONTEXT_TOKEN_ID, nano_config
from distill.runner import step_runner
from distill.stages import Stage, TeacherStage, student_stage
from mmmamba.config import ModelConfig
from mmmamba.model import MMMamba


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distill", description=__doc__)
    parser.add_argument("--recipe", default="nano-linear")
    parser.add_argument("--stages", default="teacher,stage1,stage2,stage3")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--image-batch", type=int, help="instead of the recipe's")
    parser.add_argument("--graph", action="store_true", help="capture a step as a CUDA graph")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--profile", action="store_true", help="print the kernels that take the time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    recipe = Recipe.load(args.recipe)
    device = torch.device(args.device)
    peak = _matmul_flops(device)
    print(f"bf16 matrix products: {peak / 1e12:.0f} TFLOP/s on {device_name(device)}", flush=True)
    records = []
    for name in args.stages.split(","):
        config = recipe.stages[name]
        image_batch = args.image_batch or config.image_batch
        stage = _stage(name, config, device, compiled=args.compile)
        shape = recipe.image_seqlen, image_batch, config.image_answer_tokens, recipe.pictures
        batches = [(1.0, _random(stage, *shape))]
        if config.text_batch:
            text = _random(stage, recipe.text_seqlen, config.text_batch, config.text_answer_tokens, 0)
            batches.append((config.text_weight, text))
        record = _measure(name, stage, batches, config, args) | {
            "device": device_name(device),
            "date": datetime.date.today().isoformat(),
        }
        record["mfu"] = round(_step_flops(name, stage.model.config, batches) / (record["ms"] / 1e3) / peak, 3)
        print(json.dumps(record), flush=True)
        records.append(record)
        del stage
        torch.compiler.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(json.dumps({"benchmark": "distill", "matmul_tflops": round(peak / 1e12), "records": records}))


def _stage(name: str, config: StageConfig, device: torch.device, *, compiled: bool) -> Stage:
    with torch.device(device):
        teacher = MMMamba(nano_config())
    for parameter in teacher.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    if name == "teacher":
        return TeacherStage(teacher, compiled=compiled)
    student = make_student(teacher, *Recipe(name="linear", stages={}).layer_types(teacher.config))
    return student_stage(name, teacher, student, config, compiled=compiled)


def _random(stage: Stage, seqlen: int, batch: int, answer_tokens: int | None, pictures: int) -> Inputs:
    config = stage.model.config
    ids = torch.randint(3, 49_000, (batch, seqlen))
    start = 5
    for _ in range(pictures):
        ids[:, start : start + config.tokens_per_tile] = IMG_CONTEXT_TOKEN_ID
        start += config.tokens_per_tile + 5
    mask = torch.zeros(batch, seqlen, dtype=torch.bool)
    mask[:, start : start + (answer_tokens or 16)] = True
    side = config.image_size
    pixels = torch.randint(0, 255, (batch * pictures, side, side, 3), dtype=torch.uint8) if pictures else None
    return prepare(Batch(ids, mask, pixels, 0), config, answer_tokens, all_tokens=stage.all_tokens)


def _measure(
    name: str, stage: Stage, batches: list[tuple[float, Inputs]], config: StageConfig, args: argparse.Namespace
) -> dict[str, Any]:
    parameters = stage.parameters()
    cuda = stage.model.device.type == "cuda"
    optimizer = torch.optim.AdamW(parameters.values(), fused=cuda)
    gradients = FlatGradients(parameters.values())
    run = step_runner(stage, gradients, graph=args.graph and cuda)

    def step() -> float:
        started = time.perf_counter()
        run(batches)
        gradients.clip_(config.clip)
        optimizer.step()
        synchronize(stage.model.device)
        return (time.perf_counter() - started) * 1e3

    reset_peak_memory(stage.model.device)
    first = step()
    step()
    times = [step() for _ in range(args.steps)]
    if args.profile:
        _print_profile(step, cuda)
    ms = statistics.median(times)
    return {
        "what": name,
        "graph": args.graph,
        "first_ms": round(first),
        "ms": round(ms, 1),
        "rows_per_s": round(batches[0][1].shape[0] / ms * 1e3),
        "peak_bytes": peak_memory_bytes(stage.model.device),
    }


def _print_profile(step: Any, cuda: bool) -> None:
    kinds = [torch.profiler.ProfilerActivity.CPU] + ([torch.profiler.ProfilerActivity.CUDA] if cuda else [])
    with torch.profiler.profile(activities=kinds) as profile:
        step()
    key = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    print(profile.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=70), flush=True)


def _step_flops(name: str, config: ModelConfig, batches: list[tuple[float, Inputs]]) -> float:
    """Floating-point operations of the matrix products of a step: 2 a weight and token forward, twice that backward
    where weights train; what only passes gradients on needs half of the backward."""
    total = 0.0
    for _, inputs in batches:
        tokens_of = (inputs.layout.stack_ids.numel(), inputs.shape[0] * inputs.shape[1])
        for stack, tokens in zip(config.stacks, tokens_of, strict=True):
            mixer = stack.hidden_size * (stack.mixer_dim + stack.hidden_size)
            attention = stack.hidden_size * (2 * stack.hidden_size + 2 * stack.kv_dim)
            mlp = 3 * stack.hidden_size * stack.intermediate_size
            forward = 2 * tokens * stack.num_hidden_layers
            total += (
                forward
                * {
                    "teacher": 3 * (attention + mlp),
                    "stage1": attention + mlp + 3 * mixer,
                    "stage2": attention + mlp + 3 * mixer,
                    "stage3": (attention + mlp) + 3 * mixer + 2 * mlp,
                }[name]
            )
    return total


def _matmul_flops(device: torch.device, size: int = 4096) -> float:
    """Rate of a large bf16 matrix product on random data, measured here."""
    size = size if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / best_s(lambda: a @ b, device, repeats=8)


if __name__ == "__main__":
    main()
