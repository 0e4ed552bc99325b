"""Make a student from a teacher, step by step or all at once; `python -m distill COMMAND --help` says how.

Several processes train together under a launcher: `accelerate launch -m distill run ...`, see docs/distill.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch

from distill.base import HUB_ID, load_base
from distill.card import check_marks, failures_part, fill_card, named_paths, read_log, scores_part, training_part
from distill.checkpoints import write_whole, writing_model
from distill.config import STUDENT_STAGES, Recipe
from distill.data.batches import Rows
from distill.data.photos import Photos
from distill.distributed import Processes, end_process
from distill.evaluate import held_out_questions
from distill.failures import write_failures
from distill.faults import Interrupted
from distill.layer_step import Layers
from distill.pipeline import Run, convert, export, export_upstream, run_all, train_stage, train_teacher
from distill.reading import printed_error_rate
from distill.rounding import storage_spec
from distill.scores import score
from distill.streams import accepted, nlvr_folder, places
from distill.tables import Measure, read_scores, scores_table
from distill.text_kl import own_answers, text_kl
from mmmamba.bundle import save_bundle
from mmmamba.checkpoint import load_model
from mmmamba.tokenizer import load_tokenizer

TEXT_TOKENS = 96  # room for a held-out question and its answer, beside the picture
EXIT_ERROR = 1
EXIT_INTERRUPTED = 130  # what shells report after Ctrl-C


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command.  Raises: what it raises; `cli` makes sentences of it."""
    args = _parser().parse_args(argv)
    torch.backends.cuda.matmul.allow_tf32 = True
    if torch.cuda.is_available():
        # What is left to the CPU is small, and the loaders need the cores: 32 threads took 20 times as long as one.
        torch.set_num_threads(1)
    args.processes = Processes.join()
    try:
        args.run(args)
        args.processes.wait()  # one that leaves takes its connections along, which others may still be reading
    finally:
        args.processes.leave()


def cli() -> int:
    """`main`, with errors that a user can mend as one sentence; returns the exit status."""
    try:
        main()
    except (Interrupted, KeyboardInterrupt) as stopped:
        print(f"distill: {stopped or 'interrupted'}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (ValueError, OSError, MemoryError, FloatingPointError) as error:
        print(f"distill: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_ERROR
    return 0


def run_teacher(args: argparse.Namespace) -> None:
    """Train the teacher from the base language model and write it to OUT."""
    train_teacher(_run(args), args.base, args.out, weights=args.resume)


def run_convert(args: argparse.Namespace) -> None:
    """Seed a student from its teacher or a finished student, keep its mixers in OUT/stages and write it to OUT."""
    run = _run(args)
    convert(run, args.teacher, args.out, trained=args.student)
    export(run, args.teacher, args.out, stage="convert")


def run_stage(args: argparse.Namespace) -> None:
    """Train one stage from what the one before it left in OUT/stages."""
    train_stage(_run(args), args.command, args.teacher, args.out)


def run_everything(args: argparse.Namespace) -> None:
    """Do all that a recipe names, in order, and export the student to OUT; what is finished is skipped."""
    run = _run(args)
    teacher = args.teacher
    if teacher is None:
        if "teacher" not in run.recipe.stages:
            raise ValueError(f"recipe {run.recipe.name} trains no teacher; pass one with --teacher")
        teacher = str(args.out / "teacher")
        train_teacher(run, args.base, args.out / "teacher", weights=args.resume)
    run_all(run, teacher, args.out, layers_from=args.layers_from)


def run_export(args: argparse.Namespace) -> None:
    """Write the student of the last finished stage to OUT, in the published layout; or one that others trained."""
    run = _run(args)
    if args.from_upstream is not None:
        export_upstream(run, args.teacher, args.from_upstream, args.out, allow_changed=args.allow_changed)
    else:
        export(run, args.teacher, args.out, stage=args.stage)


def run_eval(args: argparse.Namespace) -> None:
    """Score a model on held-out questions: exact matches, and with --base how far its talk is from its base's."""
    model = load_model(args.model, device=args.device)
    rows = Rows(
        load_tokenizer(args.tokenizer), model.config, "image", seqlen=model.config.tokens_per_tile + TEXT_TOKENS
    )
    where = places(args.data, photos=args.photos, text=args.text)
    photos = Photos(where.named["photos"], "val") if "photos" in where.named else None
    named = accepted(held_out_questions, where.named) | {"nlvr": nlvr_folder(where.text)}
    tasks = args.tasks.split(",") if args.tasks else None
    asked = held_out_questions(photos, count=args.count, tasks=tasks, **named)
    failure_count = args.failure_count if args.failures else 0
    scores, failures, readings = score(
        model, rows, asked, decode=args.decode, failure_count=failure_count, readings=True
    )
    report: dict[str, Any] = {
        "model": args.model,
        "kind": model.config.kind,
        "asked": args.count,
        "tasks": {task: asdict(found) for task, found in scores.items()},
    }
    brief: dict[str, Any] = {"model": args.model, "count": args.count}
    brief |= {task: found.exact_match for task, found in scores.items()}
    if args.decode:
        brief["right"] = {t: round((s.right or 0) / s.count, 4) for t, s in scores.items() if s.count}
    if readings:
        brief["printed_text_cer"] = round(printed_error_rate(readings), 4)
        report["printed_text_cer"] = {"rate": brief["printed_text_cer"], "count": len(readings)}
    if args.base:
        base = load_base(args.base).to(args.device).eval()
        moved = text_kl(model, base, rows.tokenizer, own_answers(where.text))
        brief["text_kl"] = round(moved.nats, 4)
        report["text_kl"] = moved._asdict()
    if args.out is not None:
        content = json.dumps(report, indent=1) + "\n"
        write_whole(args.out, lambda file: file.write(content.encode()))
    if args.failures:
        print(f"{len(failures)} failures in {write_failures(failures, args.failures)}")
    print(json.dumps(brief))


def run_table(args: argparse.Namespace) -> None:
    """Print scores that `eval --out` wrote side by side, in Markdown."""
    reports = {name: read_scores(path) for name, path in named_paths(args.scores).items()}
    print(scores_table(reports, args.measure), end="")


def run_card(args: argparse.Namespace) -> None:
    """Write scores, failures, GPU minutes and attribution into a model card, between the marks that it has for them."""
    given = {
        "scores": args.scores,
        "training": args.trained,
        "attribution": args.attribution,
        "failures": args.failures,
    }
    if not any(given.values()):
        raise ValueError("nothing to write into the card; pass --scores, --failures, --trained or --attribution")
    check_marks(args.card, [name for name, source in given.items() if source])
    parts = {}
    if args.scores:
        parts["scores"] = scores_part({name: read_scores(path) for name, path in named_paths(args.scores).items()})
    if args.trained:
        logs = {name: read_log(path) for name, path in named_paths(args.trained).items()}
        parts["training"] = training_part(logs, args.gpus)
    if args.attribution:
        parts["attribution"] = args.attribution.read_text(encoding="utf-8")
    if args.failures:
        parts["failures"] = failures_part(named_paths(args.failures), args.card)
    fill_card(args.card, parts)
    print(f"{', '.join(parts)}: {args.card}")


def run_bundle(args: argparse.Namespace) -> None:
    """Store teacher and students together in few bits."""
    models = {}
    for spec in args.models:
        name, _, path = spec.partition("=")
        models[name] = load_model(path)
    with writing_model(args.out):
        files = save_bundle(models, args.out, storage_spec)
    print(f"{len(files)} shards, {sum(f.stat().st_size for f in files) / 1e6:.1f} MB in {args.out}")


def _run(args: argparse.Namespace) -> Run:
    trains = hasattr(args, "log_file")
    recipe = Recipe.load(args.recipe)
    return Run(
        recipe=recipe.with_reference_objective() if getattr(args, "all_tokens", False) else recipe,
        device=torch.device(args.device if trains else "cpu"),
        tokenizer=args.tokenizer if trains else Path(),
        places=places(args.data, photos=args.photos, text=args.text) if trains else places([]),
        log_file=args.log_file if trains else Path(),
        processes=args.processes,
        workers=args.workers if trains else 0,
        eval_count=args.eval_count if trains else 0,
        compiled=trains and args.compile,
        graph=trains and args.graph,
        shard=trains and args.shard,
        tensorboard=args.tensorboard if trains else None,
        layers=getattr(args, "layers", "auto"),
    )


def _parser() -> argparse.ArgumentParser:
    """Names of options must not begin one of the launchers' own, or several of theirs: they look at ours too."""
    parser = argparse.ArgumentParser(prog="python -m distill", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(
        name: str, run: Callable[[argparse.Namespace], None], help: str | None = None
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help or run.__doc__, description=help or run.__doc__)
        sub.set_defaults(run=run)
        return sub

    _base(_training(_data(_student(command("teacher", run_teacher), teacher=False))))
    about = "to train it further: take the mixers of this student of the teacher (directory, hub id or bundled name)"
    _student(command("convert", run_convert)).add_argument("--student", metavar="MODEL", help=about)
    what = {
        "stage1": "what is new in a mixer, each layer against its attention",
        "stage2": "the same with V, K and Q",
        "stage3": "all mixers end to end, against the teacher's answers",
    }
    stages = {
        name: _training(
            _data(_student(command(name, run_stage, f"Train {what[name]}; goes on from the stage before it.")))
        )
        for name in STUDENT_STAGES
    }
    everything = _training(_data(_student(command("run", run_everything), needed=False)))
    _base(everything).add_argument(
        "--layers-from",
        type=Path,
        metavar="OUT",
        help="take stages 1 and 2 from this student of the same teacher: a linear one's serve a hybrid",
    )
    for sub in (stages["stage1"], stages["stage2"], everything):
        about = (
            "how layers of stages 1 and 2 run on an NVIDIA GPU: in fused kernels, by autograd, or (auto) in kernels "
        )
        about += "where these were measured (not with --graph) and agree with autograd"
        sub.add_argument("--layers", choices=get_args(Layers), default="auto", help=about)
    for sub in (stages["stage3"], everything):
        about = "stage 3 as the published code has it: the divergence summed over all tokens, not only answers"
        sub.add_argument("--all-tokens", action="store_true", help=about)
    exported = _student(command("export", run_export))
    exported.add_argument("--stage", help="after this stage, not the last finished one")
    about = "a training checkpoint of the published code, safetensors: export this one; no recipe is needed"
    exported.add_argument("--from-upstream", type=Path, metavar="FILE", help=about)
    about = "of a checkpoint with --from-upstream take over what is not the teacher's outside of the mixers, too"
    exported.add_argument("--allow-changed", action="store_true", help=about)
    _evaluation(_data(command("eval", run_eval)))
    table = command("table", run_table)
    table.add_argument("scores", nargs="+", metavar="NAME=FILE", help="a column each, the teacher's first")
    table.add_argument("--measure", choices=get_args(Measure), default="exact", help="right: needs eval --decode")
    card = command("card", run_card)
    card.add_argument("card", type=Path, metavar="CARD", help="the Markdown file")
    card.add_argument("--scores", nargs="+", metavar="NAME=FILE", help="of eval --out, the teacher's first")
    card.add_argument("--failures", nargs="+", metavar="NAME=DIR", help="of eval --failures; pictures are copied")
    card.add_argument("--trained", nargs="+", metavar="NAME=FILE", help="of the training runs' --log-file")
    card.add_argument("--gpus", type=int, default=1, metavar="N", help="cards that trained together")
    card.add_argument("--attribution", type=Path, metavar="FILE", help="ATTRIBUTION.md of distill.data.build")
    bundle = command("bundle", run_bundle)
    bundle.add_argument("out", type=Path)
    bundle.add_argument("models", nargs="+", metavar="NAME=DIR")
    return parser


def _evaluation(sub: argparse.ArgumentParser) -> argparse.ArgumentParser:
    sub.add_argument("model", help="directory, hub id or bundled name")
    sub.add_argument("--count", type=int, default=200, help="questions a task, where there are as many")
    sub.add_argument("--tasks", metavar="A,B", help="these alone; all that the data given allow without it")
    sub.add_argument("--decode", action="store_true", help="count replies that are right in other words too; slower")
    sub.add_argument("--base", help="language model that it grew from, for text_kl: hub id, directory or .gguf file")
    sub.add_argument("--out", type=Path, metavar="FILE", help="write the counts behind the scores there, as JSON")
    sub.add_argument("--failures", type=Path, metavar="DIR", help="write wrong replies there, with their pictures")
    sub.add_argument("--failure-count", type=int, default=3, metavar="N", help="of each task, at most")
    return sub


def _student(sub: argparse.ArgumentParser, *, teacher: bool = True, needed: bool = True) -> argparse.ArgumentParser:
    sub.add_argument("--recipe", default="nano-linear", help="name in distill/recipes, or a YAML file")
    sub.add_argument("--out", type=Path, required=True, help="folder of the result and of what leads to it")
    if teacher:
        about = "directory, hub id or bundled name" + ("" if needed else "; the recipe's own is trained without it")
        sub.add_argument("--teacher", required=needed, help=about)
    return sub


def _base(sub: argparse.ArgumentParser) -> argparse.ArgumentParser:
    sub.add_argument("--base", default=HUB_ID, help="language model of a new teacher: hub id, directory or .gguf file")
    sub.add_argument("--resume", metavar="DIR", help="start the teacher from the weights of this one")
    return sub


def _data(sub: argparse.ArgumentParser) -> argparse.ArgumentParser:
    sub.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    sub.add_argument("--tokenizer", type=Path, required=True, help="directory with the tokenizer of the teacher")
    sub.add_argument("--photos", type=Path, help="folder or tar of photo shards; short for --data photos=")
    sub.add_argument("--text", type=Path, nargs="*", default=[], help="folders with the recipe's conversations")
    sub.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="where something lies, or what to take for a source that the recipe names; may be repeated",
    )
    return sub


def _training(sub: argparse.ArgumentParser) -> argparse.ArgumentParser:
    sub.add_argument(
        "--log-file", type=Path, default=Path("runs/distill.jsonl"), help="gets a JSON line every 25 steps"
    )
    sub.add_argument("--tensorboard", type=Path, metavar="DIR", help="write curves for TensorBoard there")
    sub.add_argument("--workers", type=int, default=8, help="processes that make image batches for one card")
    sub.add_argument("--eval-count", type=int, default=200, help="held-out questions a task after each stage; 0: none")
    sub.add_argument("--no-compile", dest="compile", action="store_false")
    sub.add_argument("--graph", action="store_true", help="capture a step as a CUDA graph")
    sub.add_argument(
        "--shard",
        action="store_true",
        default=os.environ.get("ACCELERATE_USE_FSDP") == "true",
        help="spread weights and optimizer over the processes (FSDP), uncompiled; `accelerate launch --use_fsdp` too",
    )
    return sub


if __name__ == "__main__":
    end_process(cli())
