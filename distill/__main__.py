"""Train nano: `python -m distill teacher|student|eval|bundle --help`.

Several cards train together under a launcher: `torchrun --nproc-per-node 2 -m distill teacher ...`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from distill.base import HUB_ID, load_base
from distill.config import Recipe, StageConfig
from distill.convert import fuse_, make_student
from distill.data.batches import Batch, RowKind, Rows
from distill.data.mixture import Mixture, loader, open_sources
from distill.data.photos import Photos
from distill.data.sample import Source
from distill.distributed import Processes
from distill.evaluate import accuracy
from distill.nano import new_teacher
from distill.reading import printed_error_rate
from distill.rounding import storage_spec
from distill.stages import LayerStage, LogitsStage, Stage, TeacherStage
from distill.trainer import train
from mmmamba.bundle import save_bundle
from mmmamba.checkpoint import load_model, save_model
from mmmamba.model import MMMamba
from mmmamba.tokenizer import Tokenizer, load_tokenizer

OWN_TEXT = Path(__file__).parent / "data"  # self.jsonl.gz, drawn from the base model by distill.sample_text
STUDENT_STAGES = ("stage1", "stage2", "stage3")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; see the module's text."""
    args = _parser().parse_args(argv)
    torch.backends.cuda.matmul.allow_tf32 = True
    if torch.cuda.is_available():
        # What is left to the CPU is small, and the loaders need the cores: 32 threads took 20 times as long as one.
        torch.set_num_threads(1)
    args.processes = Processes.join()
    {"teacher": run_teacher, "student": run_student, "eval": run_eval, "bundle": run_bundle}[args.command](args)
    args.processes.leave()


def run_teacher(args: argparse.Namespace) -> None:
    """Train the teacher from the base language model and write it to OUT."""
    recipe = Recipe.load(args.recipe)
    model = new_teacher(load_base(args.base), seed=recipe.seed).to(args.device)
    data = _Data(args, recipe, model)
    stage = TeacherStage(model, compiled=args.compile)
    if args.resume:
        model.load_state_dict(load_model(args.resume, device=args.device).state_dict())
    _train(args, "teacher", stage, recipe, data, lambda: save_model(model, args.out))
    if args.processes.is_main:
        save_model(model.eval().requires_grad_(False), args.out)
        _report(args, model, "teacher", data)


def run_student(args: argparse.Namespace) -> None:
    """Seed a student from the teacher and train its stages; what each trained is kept in OUT/stages."""
    recipe = Recipe.load(args.recipe)
    teacher = load_model(args.teacher, device=args.device)
    student = make_student(teacher, *recipe.layer_types(teacher.config), seed=recipe.seed)
    data = _Data(args, recipe, teacher)
    stages = args.out / "stages"  # beside the checkpoint, not part of it
    stages.mkdir(parents=True, exist_ok=True)
    for name in STUDENT_STAGES:
        kept = stages / f"{name}.safetensors"
        stage = (
            LogitsStage(teacher, student, compiled=args.compile)
            if name == "stage3"
            else LayerStage(teacher, student, train_vkq=name == "stage2", compiled=args.compile)
        )
        if kept.is_file():
            print(f"{name}: taken from {kept}", flush=True)
            student.load_state_dict(load_file(kept, device=str(teacher.device)), strict=False)
            continue
        if name not in args.stages.split(","):
            break
        _train(args, name, stage, recipe, data, lambda: save_file(_mixers(student), stages / "unfinished.safetensors"))
        if args.processes.is_main:
            save_file(_mixers(student), kept)
            _report(args, student, name, data)
        args.processes.wait()
    if args.processes.is_main:
        save_model(fuse_(student).eval(), args.out)


def run_eval(args: argparse.Namespace) -> None:
    """Print exact-match accuracy on held-out questions."""
    model = load_model(args.model, device=args.device)
    rows = Rows(load_tokenizer(args.tokenizer), model.config, "image")
    photos = Photos(args.photos, "val") if args.photos else None
    scores = accuracy(model, rows, photos, count=args.count, icons=args.icons, fonts=args.fonts, nlvr=args.nlvr)
    if args.fonts:
        scores["printed_text_cer"] = round(
            printed_error_rate(model, rows.tokenizer, min(args.count, 200), fonts=args.fonts), 4
        )
    print(json.dumps({"model": args.model, "count": args.count} | scores))


def run_bundle(args: argparse.Namespace) -> None:
    """Store teacher and students together in few bits."""
    models = {}
    for spec in args.models:
        name, _, path = spec.partition("=")
        models[name] = load_model(path)
    files = save_bundle(models, args.out, storage_spec)
    print(f"{len(files)} shards, {sum(f.stat().st_size for f in files) / 1e6:.1f} MB in {args.out}")


def _train(
    args: argparse.Namespace, name: str, stage: Stage, recipe: Recipe, data: _Data, save: Callable[[], None]
) -> None:
    config = recipe.stages[name]
    images, text = data.batches("image", config), data.batches("text", config)
    assert images is not None, "shapes are always there"
    train(name, stage, config, images, text, _log(args), graph=args.graph, save=save, processes=args.processes)


class _Data:
    """The sources of a run and the streams of batches made from them."""

    def __init__(self, args: argparse.Namespace, recipe: Recipe, model: MMMamba) -> None:
        self.recipe = recipe
        self.workers = args.workers
        self.processes: Processes = args.processes
        self.tokenizer: Tokenizer = load_tokenizer(args.tokenizer)
        self.config = model.config
        self.seqlens: dict[RowKind, int] = {"image": recipe.image_seqlen, "text": recipe.text_seqlen}
        folders = [*args.text, OWN_TEXT]
        self.sources: dict[RowKind, list[tuple[Source, float]]] = {
            "image": open_sources(
                recipe.image_sources, photos=args.photos, icons=args.icons, fonts=args.fonts, text=folders
            ),
            "text": open_sources(recipe.text_sources, text=folders),
        }
        self.val_photos = Photos(args.photos, "val") if args.photos else None

    def rows(self, kind: RowKind) -> Rows:
        return Rows(self.tokenizer, self.config, kind, seqlen=self.seqlens[kind])

    def batches(self, kind: RowKind, config: StageConfig) -> Iterator[Batch] | None:
        """An endless stream; another seed a stage, since a stage need not see again what the last one saw."""
        size = config.image_batch if kind == "image" else config.text_batch
        if not self.sources[kind] or not size:
            return None
        seed = self.recipe.seed * 10 + list(self.recipe.stages.values()).index(config)
        mixture = Mixture(
            self.sources[kind],
            self.rows(kind),
            batch_size=size,
            seed=seed,
            rank=self.processes.rank,
            world_size=self.processes.world_size,
        )
        workers = self.workers if kind == "image" else min(1, self.workers)
        return iter(loader(mixture, num_workers=workers, prefetch=4))


def _mixers(student: MMMamba) -> dict[str, torch.Tensor]:
    return {n: t.detach().clone() for n, t in student.state_dict().items() if ".mixer." in n and "out_proj" not in n}


def _report(args: argparse.Namespace, model: MMMamba, name: str, data: _Data) -> None:
    nlvr = next((folder for folder in args.text if (folder / "nlvr_hidden.jsonl.gz").is_file()), None)
    scores = accuracy(
        model,
        data.rows("image"),
        data.val_photos,
        count=args.eval_count,
        icons=args.icons,
        fonts=args.fonts,
        nlvr=nlvr,
    )
    line = json.dumps({"stage": name, "eval_count": args.eval_count, "exact_match": scores})
    print(line, flush=True)
    with _log(args).open("a", encoding="utf-8") as log:
        log.write(line + "\n")


def _log(args: argparse.Namespace) -> Path:
    args.log.parent.mkdir(parents=True, exist_ok=True)
    return args.log


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m distill", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run: Any) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=run.__doc__, description=run.__doc__)

    shared = {"teacher": command("teacher", run_teacher), "student": command("student", run_student)}
    shared |= {"eval": command("eval", run_eval)}
    for sub in shared.values():
        sub.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        sub.add_argument("--tokenizer", type=Path, required=True, help="directory with nano's tokenizer.json")
        sub.add_argument("--photos", type=Path, help="folder or tar of photo shards")
        sub.add_argument("--icons", type=Path, help="file of icons and flags, made by distill.data.icons_pack")
        sub.add_argument("--fonts", type=Path, help="pack of fonts, made by distill.data.fonts_pack")
    for sub in (shared["teacher"], shared["student"]):
        sub.add_argument("--recipe", default="nano-linear", help="name in distill/recipes, or a YAML file")
        sub.add_argument("--text", type=Path, nargs="*", default=[], help="folders with the recipe's conversations")
        sub.add_argument("--out", type=Path, required=True)
        sub.add_argument("--log", type=Path, default=Path("runs/distill.jsonl"))
        sub.add_argument("--workers", type=int, default=8, help="processes that make image batches for one card")
        sub.add_argument("--eval-count", type=int, default=200, help="held-out questions a task after each stage")
        sub.add_argument("--no-compile", dest="compile", action="store_false")
        sub.add_argument("--graph", action="store_true", help="capture a step as a CUDA graph")
    shared["teacher"].add_argument("--base", default=HUB_ID, help="hub id, directory or .gguf file")
    shared["teacher"].add_argument("--resume", help="directory of a teacher to go on from")
    shared["student"].add_argument("--teacher", required=True)
    shared["student"].add_argument("--stages", default=",".join(STUDENT_STAGES), help="stages to run now")
    shared["eval"].add_argument("model")
    shared["eval"].add_argument("--count", type=int, default=200)
    shared["eval"].add_argument("--nlvr", type=Path, help="folder with nlvr_hidden.jsonl.gz and the other two")
    bundle = command("bundle", run_bundle)
    bundle.add_argument("out", type=Path)
    bundle.add_argument("models", nargs="+", metavar="NAME=DIR")
    return parser


if __name__ == "__main__":
    main()
