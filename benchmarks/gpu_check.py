"""All that the fused decoder needs an NVIDIA GPU for, in one run that tells what it knows when it is cut short.

    python -m benchmarks.gpu_check --out DIR --seconds 150

Stages, in order; each writes to DIR/log.txt and DIR/results.jsonl as it goes, and a failure does not end the run:

    device   the card, its copy bandwidth
    agree    fused decoding against one forward pass in float32 over the same tokens, beside the plain path's own error
    decode   times at the published size (`benchmarks.decode_cuda`), records in DIR/decode.json
    tests    pytest on the kernels and the decoder, output in DIR/tests.txt
    prefill  times to read prompts (`benchmarks.prefill`), records in DIR/prefill.json
    parts    each launch of a token alone, beside its floor
    shapes   the matrix-vector kernel over rows a program and warps
    many     the products of 64 rows over tiles, warps and tiles in flight
    profile  the kernels that a piece of a prompt spends its time in
    warm     a new process up to its first token, kernels compiled before (`benchmarks.warm_up`)
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import decode_cuda, machine, prefill, report
from benchmarks.full_size import Kind, Scheme, config_of, free_memory, random_model
from mmmamba.decoder import AGREEMENT, make_decoder
from mmmamba.generate import piece_size
from mmmamba.generate import prefill as read_prompt
from mmmamba.model import MMMamba
from mmmamba.sampling import SamplingParams

STAGES = ("device", "agree", "decode", "tests", "prefill", "parts", "shapes", "many", "profile", "warm")
TESTS = (
    "tests/test_kernels_decode.py",
    "tests/test_kernels_many.py",
    "tests/test_kernels_sampler.py",
    "tests/test_pointwise.py",
    "tests/test_decoder.py",
    "tests/test_decoder_cuda.py",
)
TOKENS = 256
PIECE = 90  # tokens of an image prompt read at once: a tile is cut
ROOT = Path(__file__).resolve().parent.parent

# Size, kind, layers, dtype or scheme of what is compared. Few layers of the large size: rounding must stay visible.
MODELS: tuple[tuple[str, Kind, tuple[int, int] | None, str], ...] = (
    ("2.6b", "linear", (2, 2), "bf16"),
    ("nano", "linear", None, "float32"),
    ("nano", "linear", (4, 4), "bf16"),
    ("nano", "hybrid", None, "float32"),
    ("2.6b", "hybrid", (4, 4), "int4"),
    ("2.6b", "teacher", (2, 2), "int8"),
    ("nano", "teacher", None, "bf16"),
)


class Run:
    """Where results go, and how much time is left."""

    def __init__(self, out: Path, seconds: float) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.ends = out, time.monotonic() + seconds
        self.failures: list[str] = []
        self.bandwidth = 0.0
        self._log = (out / "log.txt").open("a", encoding="utf-8")
        self._results = (out / "results.jsonl").open("a", encoding="utf-8")

    def left(self) -> float:
        return self.ends - time.monotonic()

    def say(self, text: str) -> None:
        print(text, flush=True)
        print(text, file=self._log, flush=True)

    def keep(self, stage: str, **result: Any) -> None:
        print(json.dumps({"stage": stage} | result), file=self._results, flush=True)
        self.say(f"  {stage}: " + ", ".join(f"{name} {_short(value)}" for name, value in result.items()))

    def check(self, ok: bool, what: str) -> None:
        if not ok:
            self.failures.append(what)
            self.say(f"  FAILED: {what}")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def check_device(run: Run) -> None:
    device = torch.device("cuda")
    run.bandwidth = decode_cuda.copy_bandwidth(device)
    major, minor = torch.cuda.get_device_capability()
    import triton

    versions = {"torch": torch.__version__, "triton": triton.__version__, "capability": f"{major}.{minor}"}
    run.keep("device", name=machine.device_name(device), copy_gb_per_s=run.bandwidth / 1e9, **versions)


# --- agreement ---


def check_agreement(run: Run) -> None:
    for size, kind, layers, scheme in MODELS:
        if run.left() < 20:
            run.say("  no time for the rest")
            return
        name = f"{size} {kind} {scheme}"
        try:
            _compare(run, name, size, kind, layers, scheme)
        except Exception:
            run.check(False, f"{name}\n{traceback.format_exc()}")
        free_memory()


@torch.inference_mode()
def _compare(run: Run, name: str, size: str, kind: Kind, layers: tuple[int, int] | None, scheme: str) -> None:
    device = torch.device("cuda")
    packed: Scheme = scheme if scheme in ("int8", "int4") else "bf16"  # type: ignore[assignment]
    model = random_model(config_of(kind, size, layers=layers), device, packed)
    if scheme == "float32":
        model = model.float()
    started = time.perf_counter()
    decoder, reason = make_decoder(model)
    torch.cuda.synchronize()
    made_s = time.perf_counter() - started
    run.check(decoder is not None, f"{name}: no fused decoder: {reason}")
    if decoder is None:
        return
    ids = torch.randint(3, 5000, (1, TOKENS), generator=torch.Generator().manual_seed(1)).to(device)
    state = model.new_state()
    fused = torch.stack([decoder.decode_one_token(token, state)[0] for token in ids.T])
    read = model(ids)[0].float()
    reference_model = _wide(model)
    with prefill.plain(model), prefill.plain(reference_model):
        plain = model(ids)[0].float()
        reference = reference_model(ids)[0]
    error, noise, read_error = (_error(logits, reference) for logits in (fused, plain, read))
    same = float((fused.argmax(-1) == reference.argmax(-1)).float().mean())
    run.keep(
        "agree",
        model=name,
        fused_error=error,
        plain_error=noise,
        read_error=read_error,
        same_argmax=same,
        last_tokens_error=_error(fused[-16:], reference[-16:]),
        made_s=made_s,
        overlap=decoder.overlap,
    )
    allowed = min(max(1.5 * noise, 1e-3), AGREEMENT[model.dtype])
    run.check(error <= allowed, f"{name}: error {error:.3g}, {allowed:.3g} is allowed")
    run.check(read_error <= allowed, f"{name}: error of reading {read_error:.3g}, {allowed:.3g} is allowed")

    inputs = prefill.inputs_of(model, prefill.Prompt(100, tiles=1))
    got = read_prompt(model, inputs, model.new_state(), piece_size=PIECE)
    with prefill.plain(reference_model):
        want = reference_model(inputs.input_ids, inputs.pixel_values, last_only=True)[:, -1]
    image_error = _error(got, want)
    run.keep("agree", model=name, image_in_pieces_error=image_error)
    run.check(image_error <= 4 * allowed, f"{name}: error after an image in pieces {image_error:.3g}")

    started = time.perf_counter()
    session = decoder.open([model.new_state()], [SamplingParams(greedy=True)])
    session.begin(reference[:1])
    said = []
    captured_s = 0.0
    for _ in range(TOKENS):
        session.advance()
        said += session.take()
        captured_s = captured_s or time.perf_counter() - started
    session.close()
    seen = torch.tensor([said], device=device)
    with prefill.plain(reference_model):
        logits = reference_model(seen)[0]
    # Greedy tokens are the likeliest of the reference but for ties that rounding decides.
    chosen = logits[:-1].gather(1, seen[0, 1:, None])[:, 0]
    gap = float(((logits[:-1].amax(dim=1) - chosen) / logits.std()).max())
    run.keep("agree", model=name, greedy_tokens=len(said), largest_gap_in_std=gap, captured_s=captured_s)
    run.check(gap <= 20 * max(noise, 1e-3), f"{name}: a greedy token is {gap:.3g} standard deviations below the best")


def _wide(model: MMMamba) -> MMMamba:
    """The same numbers in float32; packed layers as they are, since they unpack to the dtype of their input."""
    import copy

    return copy.deepcopy(model).float()


def _error(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want).norm() / want.norm())


# --- timings ---


def time_decode(run: Run) -> None:
    records = []
    sweep = decode_cuda.Sweep(60, run.bandwidth)
    for point in decode_cuda.POINTS:
        if run.left() < 15:
            run.say("  no time for the rest")
            break
        try:
            for record in sweep.records(*point):
                run.say("  " + decode_cuda.row(record))
                records.append(record)
                report.save(records, run.out / "decode.json")
        except Exception:
            run.check(False, f"{point}\n{traceback.format_exc()}")
            free_memory()


def time_prefill(run: Run) -> None:
    device = torch.device("cuda")
    rate = prefill.matmul_rate(device, torch.bfloat16)
    run.keep("prefill", matmul_tera_per_s=rate / 1e12)
    records = []
    model = random_model(config_of("linear"), device)
    piece = piece_size(device)
    for prompt in prefill.prompts(prefill.LENGTHS):
        if run.left() < 10:
            run.say("  no time for the rest")
            return
        for record in prefill.sweep(model, "linear", [prompt], piece, 3, rate, run.bandwidth):
            run.say("  " + prefill.row(record))
            records.append(record)
            report.save(records, run.out / "prefill.json")


def time_parts(run: Run) -> None:
    from benchmarks import decode_parts

    for result in decode_parts.parts(run.bandwidth):
        run.keep("parts", **result)
        if run.left() < 5:
            return


def time_shapes(run: Run) -> None:
    from benchmarks import decode_parts

    for result in decode_parts.shapes(run.bandwidth, enough=lambda: run.left() < 5):
        run.keep("shapes", **result)


def time_many(run: Run) -> None:
    from benchmarks import decode_parts

    for result in decode_parts.many_shapes(run.bandwidth, rows=64, enough=lambda: run.left() < 5):
        run.keep("many", **result)


def profile_prefill(run: Run) -> None:
    """Time by kernel of a prompt read in one piece, in profile.txt."""
    model = random_model(config_of("linear"), torch.device("cuda"))
    for prompt in (prefill.Prompt(8192), prefill.Prompt(prefill.WORDS, tiles=1)):
        inputs = prefill.inputs_of(model, prompt)
        read_prompt(model, inputs, model.new_state(), piece_size=8192)
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profiler:
            read_prompt(model, inputs, model.new_state(), piece_size=8192)
            torch.cuda.synchronize()
        table = profiler.key_averages().table(sort_by="self_device_time_total", row_limit=25, max_name_column_width=60)
        with (run.out / "profile.txt").open("a", encoding="utf-8") as out:
            print(prompt.name, table, sep="\n", file=out)


def time_warm_up(run: Run) -> None:
    command = [sys.executable, "-m", "benchmarks.warm_up"]
    for _ in range(2):  # the first one compiles what is not compiled yet
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=max(20, run.left()), check=True
        )
    run.keep("warm", **json.loads(done.stdout.splitlines()[-1]))


def run_tests(run: Run) -> None:
    workers = max(1, min(12, (os.cpu_count() or 2) - 2))
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-n", str(workers)]
    command += [test for test in TESTS if (ROOT / test).exists()]
    with (run.out / "tests.txt").open("w", encoding="utf-8") as log:
        try:
            done = subprocess.run(
                command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=max(20, run.left() - 10), check=False
            )
            run.check(done.returncode == 0, f"tests exit with {done.returncode}; see tests.txt")
        except subprocess.TimeoutExpired:
            run.check(False, "tests took too long")
    lines = (run.out / "tests.txt").read_text(encoding="utf-8").splitlines()
    for line in [x for x in lines if x.startswith("FAILED")][:20] + lines[-1:]:
        run.say("  " + line[:200])


_WORK: dict[str, Callable[[Run], None]] = {
    "device": check_device,
    "agree": check_agreement,
    "decode": time_decode,
    "tests": run_tests,
    "prefill": time_prefill,
    "parts": time_parts,
    "shapes": time_shapes,
    "many": time_many,
    "profile": profile_prefill,
    "warm": time_warm_up,
}


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=(__doc__ or "").splitlines()[0])
    p.add_argument("--out", type=Path, required=True, help="directory for logs and results")
    p.add_argument("--seconds", type=float, default=150.0, help="stop beginning new work after so many (%(default)s)")
    p.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    args = p.parse_args(argv)
    if not torch.cuda.is_available():
        p.error("torch sees no CUDA device here")
    logging.basicConfig(level=logging.INFO, format="  %(name)s: %(message)s")
    torch.backends.cuda.matmul.allow_tf32 = False
    run = Run(args.out, args.seconds)
    for stage in dict.fromkeys(("device", *args.stages)):
        run.say(f"{stage} ({run.left():.0f} s left)")
        if run.left() < 5:
            run.check(False, f"no time for {stage}")
            continue
        try:
            _WORK[stage](run)
        except Exception:
            run.check(False, f"{stage}\n{traceback.format_exc()}")
        free_memory()
    run.say(f"{len(run.failures)} failures" + "".join(f"\n- {f.splitlines()[0]}" for f in run.failures))
    return int(bool(run.failures))


if __name__ == "__main__":
    sys.exit(main())
