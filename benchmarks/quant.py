"""What every scheme of `quantize` costs and gains: bytes on disk and in memory, speed, answers lost, KL.

    python -m benchmarks.quant --device cpu
    python -m benchmarks.quant --device cpu --gguf SmolLM2-135M.Q4_1.gguf     # llama.cpp beside it, if it is installed

Each scheme is quantized, written, and read back; what is measured is what was read. Speed is that of
`benchmarks.decode`: all schemes and transformers' SmolLM2-135M in turn in one process, after a short and a long
context, beside the time that their bytes take at the memory bandwidth measured here. Answers are exact matches to
held-out questions about drawn shapes; KL(float32 || scheme), in nats a token, is the mean over the tokens of their
answers, and over those of held-out conversations; bfloat16 without a scheme stands beside the schemes. The last line is
one JSON object; the records also go to benchmarks/results/quant-<device>.json, those of speed to
quant-<device>-speed.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import decode, llama_cpp, machine, report, smollm2
from benchmarks.report import Record
from distill.data.batches import Batch, Row, Rows, pixel_values, stack
from distill.data.sample import Sample
from distill.data.shapes import QUESTIONS
from distill.data.text import Conversations
from distill.tasks import ALTERNATIVES, held_out
from mmmamba import MMMamba, load_model
from mmmamba.tokenizer import load_tokenizer
from quantize import SCHEMES, save_quantized
from quantize.bnb import import_bitsandbytes

TEXTS = Path(__file__).parents[1] / "distill" / "data" / "self.jsonl.gz"
PLAIN, HALF = "float32", "bfloat16"  # without a scheme
PIECE = 256  # tokens read at once
DTYPES = {PLAIN: torch.float32, HALF: torch.bfloat16}


@dataclass(frozen=True)
class QuantRecord:
    """One scheme. `file_bytes` is what a checkpoint takes, `load_peak_bytes` the memory that loading it took at most;
    `ms` is the median for a token of one conversation after `context`, beside the least that its bytes could take;
    `kl_*` are nats a token; `right` of `questions` were answered exactly."""

    what: str
    scheme: str
    group_size: int | None
    file_bytes: int
    weight_bytes: int
    load_peak_bytes: int
    context: int
    ms: float
    p20_ms: float
    p80_ms: float
    floor_ms: float
    tok_per_sec: float
    questions: int
    right: int
    changed: int  # questions answered right by one of this and the unquantized model, and wrong by the other
    kl_answers: float
    kl_text: float
    device: str
    date: str


class _Loaded(NamedTuple):
    model: MMMamba
    file_bytes: int
    load_peak_bytes: int


@dataclass
class _Answers:
    """What a model said to the held-out questions: `hidden` (tokens, hidden_size) before its head, rows in order."""

    right: list[bool]
    hidden: list[Tensor]
    text_hidden: list[Tensor]


def questions(model: MMMamba, count: int, batch_size: int) -> list[Batch]:
    """Held-out questions about shapes, `count` a task."""
    rows = Rows(load_tokenizer(_directory(model)), model.config, "image")
    asked = [q for task in QUESTIONS for q in held_out(task, count)]
    made = [rows.row(Sample(q.image, ((q.question, q.answer.partition(ALTERNATIVES)[0]),), "held out")) for q in asked]
    return _batches(made, batch_size)


def texts(model: MMMamba, count: int, batch_size: int) -> list[Batch]:
    """Conversations that no student was trained on."""
    rows = Rows(load_tokenizer(_directory(model)), model.config, "text")
    source = Conversations(TEXTS, "val")
    return _batches([rows.row(source.sample(0, index)) for index in range(count)], batch_size)


def _batches(made: Sequence[Row | None], batch_size: int) -> list[Batch]:
    rows = [row for row in made if row is not None]
    return [_cut(stack(rows[start : start + batch_size])) for start in range(0, len(rows), batch_size)]


def _directory(model: MMMamba) -> Path:
    assert model.source is not None, "loaded, so it has one"
    return model.source


def _cut(batch: Batch) -> Batch:
    """Without the padding that all rows share."""
    end = int(batch.loss_mask.any(dim=0).nonzero().max()) + 1
    return batch._replace(input_ids=batch.input_ids[:, :end], loss_mask=batch.loss_mask[:, :end])


@torch.inference_mode()
def ask(model: MMMamba, asked: Sequence[Batch], read: Sequence[Batch]) -> _Answers:
    """One teacher-forced pass over questions and texts; a greedy reply is right if each token is the likeliest."""
    answers = _Answers([], [], [])
    for batch in asked:
        hidden, rows, wanted = _answer_tokens(model, batch)
        wrong = (model.language.output(hidden).argmax(dim=-1) != wanted).int()
        errors = torch.zeros(len(batch.input_ids), dtype=torch.int, device=model.device).index_add_(0, rows, wrong)
        answers.right += (errors == 0).tolist()
        answers.hidden.append(hidden)
    for batch in read:
        answers.text_hidden.append(_answer_tokens(model, batch)[0])
    return answers


def _answer_tokens(model: MMMamba, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states that predict the answers' tokens, the rows that these are in, and the tokens."""
    ids = batch.input_ids.to(model.device)
    pixels = None if batch.pixels is None else pixel_values(batch.pixels.to(model.device)).to(model.dtype)
    rows, columns = (i.to(model.device) for i in batch.loss_mask[:, 1:].nonzero(as_tuple=True))
    return model.hidden_states(ids, pixels)[rows, columns], rows, ids[rows, columns + 1]


@torch.inference_mode()
def mean_kl(plain: MMMamba, hidden: Sequence[Tensor], other: MMMamba, other_hidden: Sequence[Tensor]) -> float:
    """KL(plain || other) in nats, on average over tokens."""
    total, tokens = 0.0, 0
    for p, q in zip(hidden, other_hidden, strict=True):
        for a, b in zip(p.split(64), q.split(64), strict=True):
            log_p, log_q = (m.language.output(h).double().log_softmax(-1) for m, h in ((plain, a), (other, b)))
            total += float((log_p.exp() * (log_p - log_q)).sum())
            tokens += len(a)
    return total / max(tokens, 1)


def read_back(name: str, scheme: str, directory: Path, device: torch.device) -> tuple[MMMamba, int, int]:
    """Quantize, write and load: the model, the bytes of its file, and the memory that loading took at most."""
    if scheme in DTYPES:
        model, peak = _load(name, device, DTYPES[scheme])
        return model, sum(p.nbytes for p in model.parameters()), peak
    packed = load_model(name, quantize=scheme)
    files = save_quantized(packed, directory, source=name).stat().st_size
    del packed
    gc.collect()
    model, peak = _load(directory, device, torch.float32)
    return model, files, peak


def _load(name: str | Path, device: torch.device, dtype: torch.dtype) -> tuple[MMMamba, int]:
    """A model, and the memory that loading it took at most."""
    machine.reset_peak_memory(device)
    before = machine.peak_memory_bytes(device)
    model = load_model(name, device=device, dtype=dtype)
    return model, machine.peak_memory_bytes(device) - before


def load_all(args: argparse.Namespace, device: torch.device) -> dict[str, _Loaded]:
    """Every scheme's model, and those without a scheme."""
    loaded = {}
    with tempfile.TemporaryDirectory() as directory:
        for scheme in [PLAIN, HALF, *args.scheme]:
            loaded[scheme] = _Loaded(*read_back(args.model, scheme, Path(directory) / scheme, device))
    return loaded


def measure_speed(
    args: argparse.Namespace, loaded: dict[str, _Loaded], device: torch.device, bandwidth: float
) -> list[Record]:
    """Every scheme and the baselines in turn, after each context."""
    sides: list[decode.Side] = [
        decode.OurSide(it.model, f"{args.model} {scheme}", "checkpoint", 1, PIECE) for scheme, it in loaded.items()
    ]
    if not args.no_baseline:
        sides.append(smollm2.load_baseline(device, torch.float32, piece_size=PIECE))
    if args.gguf is not None:
        sides.append(llama_cpp.LlamaCppSide(args.gguf, args.contexts[-1] + args.steps + decode.WARM_UP_STEPS, PIECE))
    for side in sides:
        print(decode.bill(side, 1, bandwidth), flush=True)
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 128, (1, args.contexts[-1]), generator=draw).to(device)
    return decode.measure(sides, tokens, args.contexts, args.steps, bandwidth, "float32")


def measure_answers(
    args: argparse.Namespace, loaded: dict[str, _Loaded], speed: Sequence[Record], device: torch.device
) -> Iterator[QuantRecord]:
    """What each scheme answers, as a record with its sizes and its speed after the shortest context."""
    times_of = {r.what: r for r in reversed(speed)}
    plain = loaded[PLAIN].model
    asked = questions(plain, args.questions, args.batch)
    read = texts(plain, args.texts, args.batch)
    reference = ask(plain, asked, read)
    for scheme, (model, file_bytes, load_peak_bytes) in loaded.items():
        answers = reference if scheme == PLAIN else ask(model, asked, read)
        times = times_of[f"{args.model} {scheme}"]
        yield QuantRecord(
            what=args.model,
            scheme=scheme,
            group_size=SCHEMES[scheme].group_size if scheme in SCHEMES else None,
            file_bytes=file_bytes,
            weight_bytes=times.weight_bytes,
            load_peak_bytes=load_peak_bytes,
            context=times.context,
            ms=times.ms,
            p20_ms=times.p20_ms,
            p80_ms=times.p80_ms,
            floor_ms=times.floor_ms,
            tok_per_sec=times.tok_per_sec,
            questions=len(answers.right),
            right=sum(answers.right),
            changed=sum(a != b for a, b in zip(answers.right, reference.right, strict=True)),
            kl_answers=round(mean_kl(plain, reference.hidden, model, answers.hidden), 7),
            kl_text=round(mean_kl(plain, reference.text_hidden, model, answers.text_hidden), 7),
            device=machine.device_name(device),
            date=datetime.now(UTC).strftime("%Y-%m-%d"),
        )


def markdown(records: Sequence[QuantRecord]) -> str:
    """A table for people."""
    rows = [
        "| weights | file, MB | in memory, MB | ms a token (floor) | tokens/s | right | KL answers, text |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in records:
        rows.append(
            f"| {r.scheme} | {r.file_bytes / 1e6:.1f} | {r.weight_bytes / 1e6:.1f} | {r.ms:.1f} ({r.floor_ms:.1f}) "
            f"| {r.tok_per_sec:.1f} | {r.right} of {r.questions} | {r.kl_answers:.1e}, {r.kl_text:.1e} |"
        )
    return "\n".join(rows)


def usable_schemes() -> list[str]:
    """All schemes, those of bitsandbytes if it can be imported."""
    try:
        import_bitsandbytes()
    except ValueError as error:
        print(f"Left out: {error}", file=sys.stderr)
        return [name for name, scheme in SCHEMES.items() if scheme.method != "bitsandbytes"]
    return list(SCHEMES)


def build_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.quant", description=(__doc__ or "").splitlines()[0])
    p.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    p.add_argument("--model", default="nano-linear", help="of this project, made by distill (%(default)s)")
    p.add_argument("--scheme", nargs="+", default=None, choices=tuple(SCHEMES), help="default: all that can be had")
    p.add_argument("--questions", type=int, default=20, metavar="N", help="a task, seven tasks (%(default)s)")
    p.add_argument("--texts", type=int, default=16, metavar="N", help="held-out conversations (%(default)s)")
    p.add_argument("--contexts", nargs="+", type=int, default=[100, 4000], metavar="N", help="tokens read (100 4000)")
    p.add_argument("--no-baseline", action="store_true", help="leave transformers' SmolLM2-135M out")
    p.add_argument(
        "--gguf", type=Path, default=None, metavar="FILE", help="SmolLM2-135M for llama.cpp, beside the rest"
    )
    p.add_argument("--steps", type=int, default=40, metavar="N", help="timed tokens (%(default)s)")
    p.add_argument("--batch", type=int, default=8, metavar="N", help="questions at once (%(default)s)")
    p.add_argument("--threads", type=int, default=None, metavar="N", help="CPU threads (default: torch's choice)")
    p.add_argument("--out", type=Path, default=None, help="default: benchmarks/results/quant-<device>.json")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    p = build_parser()
    args = p.parse_args(argv)
    for name, least in (("questions", 1), ("texts", 1), ("steps", 2), ("batch", 1), ("threads", 1)):
        if (value := getattr(args, name)) is not None and value < least:
            p.error(f"--{name} {value} must be {least} or more")
    args.contexts.sort()
    apart = args.steps + decode.WARM_UP_STEPS
    if args.contexts[0] <= 2 * decode.WARM_UP_STEPS or any(b - a <= apart for a, b in pairwise(args.contexts)):
        p.error(f"--contexts {args.contexts} must be above {2 * decode.WARM_UP_STEPS} and more than {apart} apart")
    if args.gguf is not None and (fault := llama_cpp.fault(args.gguf)):
        p.error(fault)
    if args.device != "cpu" and not torch.cuda.is_available():
        p.error(f"--device {args.device}: torch sees no CUDA device here; use --device cpu")
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    bandwidth, load = machine.measured(device)
    args.scheme = args.scheme or usable_schemes()
    loaded = load_all(args, device)
    speed = measure_speed(args, loaded, device, bandwidth)
    records = []
    for record in measure_answers(args, loaded, speed, device):
        print(f"{record.scheme}: {record.right} of {record.questions} right, {record.changed} changed", flush=True)
        records.append(record)
    print(markdown(records))
    out = args.out or report.RESULTS / f"quant-{machine.device_slug(device)}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = [asdict(r) for r in records]
    out.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n", encoding="utf-8")
    report.save(speed, out.with_stem(f"{out.stem}-speed"))
    print(f"records in {out}")
    print(json.dumps({"bench": "quant", "torch": torch.__version__, "load_average_before": load, "records": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
