"""The steps from a teacher to a student, one function each; what is finished is skipped, what is begun goes on."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from distill.base import load_base
from distill.checkpoints import Checkpoints, write_whole, writing_model
from distill.config import LAYER_STAGES, STUDENT_STAGES, Recipe
from distill.convert import load_mixers_, make_student
from distill.data.packed_stream import same_parts
from distill.distributed import Processes
from distill.evaluate import accuracy
from distill.kept import CONVERT, ORDER, Kept, whole_mixers
from distill.layer_step import Layers
from distill.memory import StageMemory, StudentStage, step_memory
from distill.monitor import append_line
from distill.nano import new_teacher
from distill.sharding import is_sharded, shard_, whole
from distill.stages import Stage, TeacherStage, student_stage
from distill.streams import Data, Places, accepted, nlvr_folder
from distill.trainer import Trained, train
from mmmamba.checkpoint import load_model, save_model
from mmmamba.model import MMMamba
from mmmamba.tokenizer import load_tokenizer


@dataclass(frozen=True, kw_only=True)
class Run:
    """How to run, whatever the stage; fields as the command line names them."""

    recipe: Recipe
    device: torch.device
    tokenizer: Path
    places: Places
    log_file: Path
    processes: Processes
    workers: int = 0
    eval_count: int = 200
    compiled: bool = True
    graph: bool = False
    shard: bool = False
    tensorboard: Path | None = None
    layers: Layers = "auto"  # how those of stages 1 and 2 run

    @property
    def loading_device(self) -> torch.device:
        """Where networks come up: those that no card holds whole are spread from the CPU."""
        return torch.device("cpu") if self.shard else self.device

    def data(self, model: MMMamba) -> Data:
        return Data(
            self.recipe,
            self.places,
            _tokenizer(self.tokenizer),
            model.config,
            workers=self.workers,
            processes=self.processes,
        )

    def say(self, text: str) -> None:
        """A line, from the main process."""
        if self.processes.is_main:
            print(text, flush=True)


def train_teacher(run: Run, base: str, out: Path, *, weights: str | None = None) -> None:
    """Train a teacher from a base language model and write it to `out`.

    Args:
        weights: directory of a teacher to start from, in place of a new embedding.
    Raises: ValueError if the recipe has no such stage.
    """
    _require(run.recipe, "teacher")
    finished = out / "stages" / "teacher.json"
    if finished.is_file():
        run.say(f"teacher: taken from {out}")
        return
    model = new_teacher(load_base(base), seed=run.recipe.seed).to(run.loading_device)
    stage = TeacherStage(model, compiled=run.compiled and not run.shard)
    if weights is not None:
        model.load_state_dict(load_model(weights, device=run.loading_device).state_dict())
    data = run.data(model)
    facts = run.recipe.facts("teacher") | {"stage": "teacher", "teacher": model.config.fingerprint()}
    store = Checkpoints(out / "stages" / "teacher", facts)
    trained = _train(run, "teacher", stage, data, store)
    model.eval().requires_grad_(False)
    written = model
    if is_sharded(model.parameters()):
        state = whole(dict(model.state_dict()))
        written = MMMamba(model.config)
        written.load_state_dict(state)
    if run.processes.is_main:
        with writing_model(out):
            save_model(written, out)
        note = json.dumps(trained._asdict() | {"recipe": run.recipe.name}) + "\n"
        write_whole(finished, lambda file: file.write(note.encode()))
        store.clear()
    _report(run, model, "teacher", data)
    run.processes.wait()


def convert(
    run: Run, teacher_dir: str, out: Path, *, layers_from: Path | None = None, trained: str | None = None
) -> None:
    """Seed a student's mixers from its teacher and keep them in `out`.

    Args:
        trained: directory, hub id or bundled name of a student of this teacher; its mixers are taken instead, to go on
            with its training.
        layers_from: folder of a student of the same teacher, whose stages 1 and 2 are taken instead of trained: there
            every layer learns by itself, so what was learned for a linear student is right for a hybrid too.
    Raises: ValueError if the teacher does not fit the recipe, or another student does not.
    """
    teacher = load_model(teacher_dir)
    types = run.recipe.layer_types(teacher.config)
    kept = _kept(run.recipe, teacher, out)
    if kept.is_finished(CONVERT):
        run.say(f"{CONVERT}: taken from {kept.path(CONVERT)}")
    elif run.processes.is_main:
        student = make_student(teacher, *types, seed=run.recipe.seed)
        if trained is not None:
            load_mixers_(student, load_model(trained))
        kept.write(CONVERT, whole_mixers(student))
        run.say(f"{CONVERT}: {student.config.kind} student kept in {kept.path(CONVERT)}")
        for name in LAYER_STAGES:
            if layers_from is not None and name in run.recipe.stages:
                kept.adopt(name, layers_from, student)
                run.say(f"{name}: taken from {layers_from}")
    run.processes.wait()


def train_stage(run: Run, name: str, teacher_dir: str, out: Path) -> None:
    """Train one stage of a student from what the stage before it left in `out`.

    Raises: ValueError if the teacher does not fit the recipe, or a stage before this one is missing.
    """
    _require(run.recipe, name)
    frozen = getattr(torch, run.recipe.frozen_dtype)
    teacher = load_model(teacher_dir, device=run.loading_device, dtype=frozen)
    types = run.recipe.layer_types(teacher.config)
    kept = _kept(run.recipe, teacher, out)
    if kept.is_finished(name):
        run.say(f"{name}: taken from {kept.path(name)}")
        return
    student = make_student(teacher, *types, seed=run.recipe.seed)
    kept.load_(_before(run.recipe, name, kept), student)
    config = run.recipe.stages[name]
    how: dict[str, Any] = {"compiled": run.compiled and not run.shard, "captured": run.graph, "layers": run.layers}
    stage = student_stage(name, teacher, student, config, **how)
    data = run.data(teacher)
    store = kept.checkpoints(name, run.recipe.facts(name))
    trained = _train(run, name, stage, data, store, _estimate(run, name, student))
    tensors = whole_mixers(student)
    if run.processes.is_main:
        kept.write(name, tensors)
        store.clear()
        run.say(f"{name}: {trained.steps} steps in {trained.seconds / 60:.1f} minutes, kept in {kept.path(name)}")
    _report(run, student, name, data)
    run.processes.wait()


def export(run: Run, teacher_dir: str, out: Path, *, stage: str | None = None) -> None:
    """Write a student in the published layout to `out`, after its last finished stage or another.

    Raises: ValueError if no stage is finished.
    """
    from distill.export import export_student

    if run.processes.is_main:
        teacher = load_model(teacher_dir)
        kept = _kept(run.recipe, teacher, out)
        stage = stage or kept.last()
        if stage is None or not kept.is_finished(stage):
            raise ValueError(
                f"{kept.folder} holds {'no finished stage' if stage is None else f'no finished {stage}'}; run "
                "`python -m distill convert` and the stages first"
            )
        student = make_student(teacher, *run.recipe.layer_types(teacher.config), seed=run.recipe.seed)
        kept.load_(stage, student)
        run.say(f"export: {student.config.kind} student after {stage}, in {export_student(student, out)}")
    run.processes.wait()


def export_upstream(run: Run, teacher_dir: str, path: Path, out: Path, *, allow_changed: bool = False) -> None:
    """Write a student that the published training code left in `path`, in the published inference layout.

    Raises: ValueError as `upstream.load_upstream_student`, if it does not fit the teacher or cannot be read.
    """
    from distill.export import export_student
    from distill.upstream import load_upstream_student

    if run.processes.is_main:
        student = load_upstream_student(load_model(teacher_dir), path, allow_changed=allow_changed)
        run.say(f"export: {student.config.kind} student of {path}, in {export_student(student, out)}")
    run.processes.wait()


def run_all(run: Run, teacher_dir: str, out: Path, *, layers_from: Path | None = None) -> None:
    """Everything that a recipe names after its teacher, in order; `layers_from` as in `convert`."""
    convert(run, teacher_dir, out, layers_from=layers_from)
    for name in run.recipe.stages:
        if name in STUDENT_STAGES:
            train_stage(run, name, teacher_dir, out)
            if run.device.type == "cuda":
                torch.cuda.empty_cache()  # what the last stage's graph held
    export(run, teacher_dir, out)


_tokenizer = functools.lru_cache(maxsize=1)(load_tokenizer)  # a second to read, the same for all stages


def _estimate(run: Run, name: str, student: MMMamba) -> StageMemory:
    """What a step of a student's stage needs; printed too."""
    estimate = step_memory(
        run.recipe,
        cast(StudentStage, name),
        student.config,
        scan="triton" if run.device.type == "cuda" else "chunked",
    )
    notes = []
    if run.device.type == "cuda":
        notes.append(f"; the card has {torch.cuda.get_device_properties(run.device).total_memory / 2**30:.1f} GiB")
    if run.shard:
        notes.append(f"; the first three are spread over {run.processes.world_size} cards, but for tables and vectors")
    run.say(f"{name}: a step needs {estimate}{''.join(notes)}")
    return estimate


def _train(
    run: Run, name: str, stage: Stage, data: Data, store: Checkpoints, estimate: StageMemory | None = None
) -> Trained:
    if run.shard:
        shard_(stage, run.processes, run.device)
    checkpoint = store.latest(run.processes)
    start = checkpoint.start(run.processes.world_size) if checkpoint else 0
    if checkpoint and len(checkpoint.rng) != run.processes.world_size:
        run.say(
            f"{name}: the checkpoint is of {len(checkpoint.rng)} processes, now there are {run.processes.world_size}; "
            "a step has as many batches as there are processes, so the run is not what it would have been"
        )
    kept = checkpoint.streams if checkpoint else []
    if kept and not same_parts(kept, run.processes.world_size, data.parts):
        run.say(
            f"{name}: other numbers of processes or workers made the checkpoint's packed rows; no sample comes twice, "
            "but the run is not what it would have been"
        )
    images = data.batches("image", name, start=start, kept=kept)
    assert images is not None, "image_batch is above 0"
    return train(
        name,
        stage,
        run.recipe.stages[name],
        images,
        data.batches("text", name, start=start),
        run.log_file,
        graph=run.graph,
        store=store,
        resume=checkpoint,
        tensorboard=run.tensorboard,
        processes=run.processes,
        estimate=estimate,
    )


def _report(run: Run, model: MMMamba, name: str, data: Data) -> None:
    """Print and log exact matches on held-out questions; spread weights need all processes for it."""
    if not run.eval_count or not (run.processes.is_main or run.shard):
        return
    named = accepted(accuracy, data.places.named) | {"nlvr": nlvr_folder(data.places.text)}
    scores = accuracy(model, data.rows("image", pictures=1), data.val_photos, count=run.eval_count, **named)
    line = json.dumps({"stage": name, "eval_count": run.eval_count, "exact_match": scores})
    run.say(line)
    if run.processes.is_main:
        append_line(run.log_file, line)


def _kept(recipe: Recipe, teacher: MMMamba, out: Path) -> Kept:
    facts = {
        "recipe": recipe.name,
        "softmax_layers": list(recipe.softmax_layers),
        "seed": recipe.seed,
        "teacher": teacher.config.fingerprint(),
    }
    return Kept(out, facts)


def _before(recipe: Recipe, name: str, kept: Kept) -> str:
    """The stage that must have left something for `name`."""
    before = [stage for stage in ORDER[: ORDER.index(name)] if stage == CONVERT or stage in recipe.stages][-1]
    if not kept.is_finished(before):
        raise ValueError(
            f"{name} starts from what {before} leaves, and {kept.path(before)} is not there; run `python -m distill "
            f"{before}` with the same --out first, or `run` for everything in order"
        )
    return before


def _require(recipe: Recipe, stage: str) -> None:
    if stage not in recipe.stages:
        raise ValueError(f"recipe {recipe.name} has no {stage}; it has {', '.join(recipe.stages)}")
