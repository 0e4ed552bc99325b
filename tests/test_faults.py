"""What goes wrong in a run: each a clear message, nothing lost."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill.__main__ import main
from distill.checkpoints import Checkpoint, Checkpoints, rng_state, set_rng_state, write_whole
from distill.config import StageConfig
from distill.data.batches import Batch
from distill.export import export_student
from distill.faults import Interrupted, Interrupts
from distill.inputs import Inputs, prepare
from distill.kept import Kept, mixers
from distill.memory import StageMemory
from distill.monitor import Monitor
from distill.recompute import recompute_blocks_
from distill.stages import LayerStage, LogitsStage
from distill.trained import check_trained, trained_table
from distill.trainer import ONE_PROCESS, train
from mmmamba.model import Block
from tests.helpers import GOLDEN
from tests.test_trainer import Slope
from tests.training import batch, batches, run_step, student_of, student_stage, teacher_of

CONFIG = StageConfig(steps=6, lr=1e-2, image_batch=1, text_batch=0, save_steps=2)


def checkpoint(step: int, **changes: Any) -> Checkpoint:
    own = {
        "facts": {"recipe": "a", "lr": 0.1},
        "step": step,
        "elapsed_s": 1.5,
        "batches": step,
        "parameters": {"w": torch.full((300, 100), float(step))},
        "optimizers": [],
        "rng": [rng_state()],
    }
    return Checkpoint(**own | changes)


@pytest.fixture
def store(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "stage1", {"recipe": "a", "lr": 0.1})


def latest(store: Checkpoints) -> Checkpoint:
    found = store.latest(ONE_PROCESS)
    assert found is not None
    return found


# --- checkpoints ---


def test_the_last_two_are_kept(store: Checkpoints) -> None:
    assert store.latest(ONE_PROCESS) is None
    for step in (5, 10, 15):
        store.save(checkpoint(step))
    assert [path.name for path in store.paths()] == ["step-00000015.pt", "step-00000010.pt"]
    found = latest(store)
    assert (found.step, found.elapsed_s, found.batches) == (15, 1.5, 15)
    assert torch.equal(found.parameters["w"], torch.full((300, 100), 15.0))
    assert [found.start(world_size) for world_size in (1, 2, 4)] == [15, 8, 4], "a batch would be seen twice"
    store.clear()
    assert not store.folder.exists()


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "other"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    damage: str, store: Checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (5, 10):
        store.save(checkpoint(step))
    path = store.paths()[0]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes({"cut": content[:-500], "flipped": content, "empty": b"", "other": b"no checkpoint"}[damage])
    assert latest(store).step == 5
    assert "step-00000010.pt is damaged" in capsys.readouterr().err
    store.paths()[1].write_bytes(b"")
    with pytest.raises(ValueError, match=r"every checkpoint in .*stage1 is damaged; delete it to begin the stage anew"):
        store.latest(ONE_PROCESS)


def test_a_checkpoint_of_another_recipe_is_refused_by_name(store: Checkpoints) -> None:
    store.save(checkpoint(5))
    other = Checkpoints(store.folder, {"recipe": "b", "lr": 0.2})
    with pytest.raises(
        ValueError, match=r"step-00000005.pt was made by another recipe: lr is 0.2, was 0.1, recipe is 'b'"
    ):
        other.latest(ONE_PROCESS)


def test_a_checkpoint_of_other_shapes_is_refused_by_name(tmp_path: Path) -> None:
    given = checkpoint(1, parameters={"a.weight": torch.zeros(2, 3), "old": torch.zeros(1)})
    with pytest.raises(
        ValueError, match=r"2 tensors differ, such as a.weight \(\(2, 3\), now \(2, 2\)\), old \(\(1,\), now"
    ):
        train("t", Slope(a__weight=(2, 2)), CONFIG, batches("image"), None, tmp_path / "log", resume=given)


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_whole(path, lambda file: file.write(b"first"))

    def fails(file: Any) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, fails)
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond 100 kB: what a full disk does to a large file. No fixture: between the steps of a test
    pytest itself may write to a longer file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_older_checkpoint(store: Checkpoints) -> None:
    says = r"cannot be written .*what was there before is untouched. Make room"
    with full_disk():
        store.save(checkpoint(5, parameters={"w": torch.ones(10)}))
        with pytest.raises(OSError, match=says) as raised:
            store.save(checkpoint(10))
    assert raised.value.filename == str(store.folder / "step-00000010.pt")
    assert [path.name for path in store.folder.iterdir()] == ["step-00000005.pt"]
    assert latest(store).step == 5


def test_a_run_goes_on_when_a_save_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Full(Checkpoints):
        def save(self, checkpoint: Checkpoint) -> Path:
            tried.append(checkpoint.step)
            raise OSError(errno.ENOSPC, "No space left", "file")

    tried: list[int] = []
    stage = Slope(a__weight=(2, 2))
    train("t", stage, CONFIG, batches("image"), None, tmp_path / "log", store=Full(tmp_path, {}))
    assert tried == [2, 4, 6]
    assert len(stage.seen) == 6
    assert "No space left: 'file'; training goes on" in capsys.readouterr().err
    # What was asked for must be: there is no later.
    stopping = Stopping(3, a__weight=(2, 2))
    with pytest.raises(OSError, match="No space left"):
        train("t", stopping, CONFIG, batches("image"), None, tmp_path / "log", store=Full(tmp_path, {}))


def test_models_on_a_full_disk_are_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Students, teachers and bundles: the error of the library that writes them is no OSError."""
    teacher = teacher_of("post")
    says = r"student cannot be written \(.*too large.*make room and run the same command"
    with full_disk(), pytest.raises(OSError, match=says):
        export_student(student_of(teacher, "post"), tmp_path / "student")
    monkeypatch.setattr("distill.__main__.storage_spec", lambda name, tensor: None)  # too narrow for nano's groups
    with full_disk(), pytest.raises(OSError, match=r"bundle cannot be written \(.*too large"):
        main(["bundle", str(tmp_path / "bundle"), f"teacher={GOLDEN / 'post' / 'hovle'}"])
    assert not list(tmp_path.rglob("*.safetensors")), "half a model"


def test_a_log_on_a_full_disk_stops_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """/dev/full takes no byte, as a disk without room."""
    stage = Slope(a__weight=(2, 2))
    store = Checkpoints(tmp_path / "kept", {})
    train("t", stage, CONFIG, batches("image"), None, Path("/dev/full"), store=store)
    assert len(stage.seen) == 6
    assert latest(store).step == 6
    assert "/dev/full: a line cannot be written (No space left on device); training goes on" in capsys.readouterr().err


def test_a_bad_loss_on_a_full_disk_is_still_said(tmp_path: Path) -> None:
    """The batch is larger than what the disk takes: nothing of it is left, and the message is about the loss."""

    def large() -> Iterator[Batch]:
        for given in batches("image"):
            assert given.pixels is not None
            yield given._replace(
                pixels=given.pixels.repeat(12, 2, 2, 1),
                input_ids=given.input_ids.repeat(12, 1),
                loss_mask=given.loss_mask.repeat(12, 1),
            )

    says = r"not finite at step 3: .*the batch could not be kept \("
    with full_disk(), pytest.raises(FloatingPointError, match=says):
        train("t", Breaking(float("nan")), CONFIG, large(), None, tmp_path / "log")
    assert not list(tmp_path.glob("*.batch.pt*"))


def test_generators_go_on_where_they_were() -> None:
    import random

    import numpy as np

    def draw() -> list[float]:
        return [random.random(), random.gauss(), np.random.rand(), np.random.randn(), float(torch.rand(()))]

    draw()
    state = rng_state()
    wanted = draw()
    draw()
    set_rng_state(state)
    assert draw() == wanted


# --- values that are not finite, memory, interruptions ---


class Stopping(Slope):
    """Gets SIGTERM in its step number `at`."""

    def __init__(self, at: int, **shapes: tuple[int, ...]) -> None:
        super().__init__(**shapes)
        self.at = at

    def compute(self, given: list[tuple[float, Inputs]]) -> dict[str, Tensor]:
        if len(self.seen) + 1 == self.at:
            signal.raise_signal(signal.SIGTERM)
        return super().compute(given)


class Breaking(Slope):
    """Gives a loss that is not finite, or no loss, in its third computation."""

    def __init__(self, fault: float | Exception) -> None:
        super().__init__(a__weight=(2, 2))
        self.fault = fault

    def compute(self, given: list[tuple[float, Inputs]]) -> dict[str, Tensor]:
        out = super().compute(given)
        if len(self.seen) == 3:
            if isinstance(self.fault, Exception):
                raise self.fault
            out["loss"] = torch.tensor(self.fault)
        return out


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_loss_stops_at_once_and_keeps_the_batch(value: float, tmp_path: Path) -> None:
    stage = Breaking(value)
    store = Checkpoints(tmp_path / "kept", {})
    with pytest.raises(
        FloatingPointError, match=r"test: not finite at step 3: \{'loss': (nan|inf), .*; the batch is in"
    ) as stop:
        train("test", stage, replace(CONFIG, save_steps=1), batches("image"), None, tmp_path / "log", store=store)
    path = tmp_path / "test-step3-process0.batch.pt"
    assert str(path) in str(stop.value)
    (kept,) = torch.load(path, weights_only=True)
    wanted = prepare(batch("image", 3), stage.model.config)
    assert kept[0]["weight"] == 1.0
    assert torch.equal(kept[0]["pixels"], wanted.pixels)
    assert torch.equal(kept[0]["layout"]["stack_ids"], wanted.layout.stack_ids)
    assert latest(store).step == 2, "weights that a bad batch had moved were kept"


def test_bad_gradients_stop_too(tmp_path: Path) -> None:
    class Steep(Slope):
        def compute(self, given: list[tuple[float, Inputs]]) -> dict[str, Tensor]:
            out = super().compute(given)
            if len(self.seen) == 2:
                for weight in self.weights.values():
                    assert weight.grad is not None
                    weight.grad.fill_(float("inf"))
            return out

    with pytest.raises(FloatingPointError, match=r"not finite at step 2: \{'loss': 1.0, 'grad_norm': inf\}"):
        train("test", Steep(a__weight=(2, 2)), CONFIG, batches("image"), None, tmp_path / "log")


def test_out_of_memory_says_what_to_lower(tmp_path: Path) -> None:
    config = replace(CONFIG, accumulate=2, text_batch=2)
    stage = Breaking(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore lines."))
    wanted = (
        r"test: out of memory \(CUDA out of memory. Tried to allocate 2 GiB.\). Lower image_batch=3 of 16 tokens and "
        r"text_batch=3 of 16 tokens, and raise accumulate=2 .* image_seqlen .* activation_checkpointing \(now False\)"
    )
    with pytest.raises(MemoryError, match=wanted):
        train("test", stage, config, batches("image"), batches("text"), tmp_path / "log")
    estimate = StageMemory(2**30, 2**29, 2**30, 0, 2**28, 2**28)
    stage = Breaking(torch.OutOfMemoryError("CUDA out of memory."))
    with pytest.raises(MemoryError, match=r"A step was estimated at about 3.0 GiB: weights 1.00, gradients 0.50"):
        train("test", stage, config, batches("image"), batches("text"), tmp_path / "log", estimate=estimate)
    with pytest.raises(RuntimeError, match=r"^something else$"):
        train("test", Breaking(RuntimeError("something else")), CONFIG, batches("image"), None, tmp_path / "log")


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Python's own answer to Ctrl-C: a shell has what it runs in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_a_signal_stops_after_the_step_and_a_second_at_once(tmp_path: Path) -> None:
    stage = Stopping(3, a__weight=(2, 2))
    store = Checkpoints(tmp_path / "kept", {})
    with pytest.raises(Interrupted, match="t stopped after step 3, kept in "):
        train("t", stage, CONFIG, batches("image"), None, tmp_path / "log", store=store)
    assert len(stage.seen) == 3
    assert latest(store).step == 3
    with pytest.raises(Interrupted, match="nothing was kept, as no folder"):
        train("t", Stopping(1, a__weight=(2, 2)), CONFIG, batches("image"), None, tmp_path / "log")
    with Interrupts() as interrupts:
        signal.raise_signal(signal.SIGINT)
        assert interrupts.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


# --- what trains ---


def test_what_trains_is_listed_and_held_against_the_declaration() -> None:
    teacher = teacher_of("post")
    stage = student_stage(1, teacher, student_of(teacher, "post"))
    table = trained_table("stage1", stage, check_trained("stage1", stage))
    assert table.splitlines()[0].startswith("stage1: 15,600 parameters in 72 tensors train, ")
    assert [line.split()[:2] for line in table.splitlines()[1:]] == [
        ["mixer.A_log", "12"],
        ["mixer.conv.bias", "12"],
        ["mixer.conv.weight", "12"],
        ["mixer.dt_bias", "12"],
        ["mixer.in_proj.gate_dt", "12"],
        ["mixer.norm.weight", "12"],
    ]
    assert isinstance(stage, LayerStage)
    mixer: Any = stage.paired[0].mixer
    mixer.in_proj.vkq.requires_grad_(True)
    with pytest.raises(AssertionError, match=r"they differ in \['mixer.in_proj.vkq'\]"):
        check_trained("stage1", stage)


def test_what_would_train_unnoticed_is_found() -> None:
    teacher = teacher_of("post")
    stage = student_stage(3, teacher, student_of(teacher, "post"))
    assert isinstance(stage, LogitsStage)
    stage.teacher.get_parameter("language.layers.0.mixer.in_proj.weight").requires_grad_(True)
    with pytest.raises(AssertionError, match=r"stage3: language.layers.0.mixer.in_proj.weight would get gradients"):
        check_trained("stage3", stage)


def test_finished_stages_are_of_one_student(tmp_path: Path) -> None:
    teacher = teacher_of("post")
    linear, hybrid = (student_of(teacher, "post", kind) for kind in ("linear", "hybrid"))
    kept = Kept(tmp_path, {"recipe": "a"})
    kept.write("stage1", {name: t + 1 for name, t in mixers(linear).items()})
    before = {name: t.clone() for name, t in mixers(linear).items()}
    kept.load_("stage1", linear)
    assert all(torch.equal(t, before[name] + 1) for name, t in mixers(linear).items())
    with pytest.raises(ValueError, match="made by another recipe: recipe is 'b', was 'a'"):
        Kept(tmp_path, {"recipe": "b"}).load_("stage1", linear)
    with pytest.raises(ValueError, match=r"stage1.safetensors is of another student: embedding.layers.0"):
        kept.load_("stage1", hybrid)
    assert not any("layers.0.mixer" in name for name in mixers(hybrid) if name.startswith("embedding"))
    kept.path("stage1").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"stage1.safetensors cannot be read \(.*; delete it to run stage1 again"):
        kept.load_("stage1", linear)


# --- a step's cost ---


@pytest.mark.parametrize("number", [1, 3])
def test_recomputed_activations_change_no_gradient(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    forward = Block.forward

    def counted(self: Block, *args: Any, **others: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return forward(self, *args, **others)

    monkeypatch.setattr(Block, "forward", counted)
    given: list[tuple[float, Batch]] = [(1.0, batch("image")), (0.5, batch("text"))]
    found = []
    for recompute in (False, True):
        teacher = teacher_of("post")
        stage = student_stage(number, teacher, student_of(teacher, "post"))
        if recompute:
            recompute_blocks_(stage.networks())
        calls = 0
        run_step(stage, given)
        found.append(({n: p.grad for n, p in stage.parameters().items()}, calls))
    (plain, few), (again, more) = found
    # Stage 1 takes its gradients inside a block at once: there is nothing to keep.
    assert more == (few if number == 1 else few + 2 * 12)
    for name, gradient in plain.items():
        assert torch.equal(gradient, again[name]), name


def test_accumulated_batches_weigh_as_one(tmp_path: Path) -> None:
    stage = Slope(a__weight=(2, 2))
    train("t", stage, replace(CONFIG, steps=2, accumulate=3), batches("image"), None, tmp_path / "log")
    assert len(stage.given) == 6
    assert [weight for given in stage.given for weight, _ in given] == [1 / 3] * 6
    last = json.loads((tmp_path / "log").read_text().splitlines()[-1])
    assert last["loss"] == 1.0, "the logged loss is the mean"


# --- what a run says ---


def test_a_bar_on_a_terminal_and_lines_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    train("stage2", Slope(a__weight=(2, 2)), replace(CONFIG, steps=30), batches("image"), None, tmp_path / "log")
    said = capsys.readouterr()
    assert "stage2 100%" in said.err.replace("|", " ")
    assert "step=25" in said.err
    assert "rows_per_s=" in said.err
    assert '"step"' not in said.out, "the bar says it"
    assert len((tmp_path / "log").read_text().splitlines()) == 2


def test_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch.utils.tensorboard", None)
        with pytest.raises(
            ValueError, match="--tensorboard needs the package tensorboard, which is not installed; install"
        ):
            Monitor("stage1", CONFIG, tmp_path / "log", tensorboard=tmp_path)
    pytest.importorskip("tensorboard")
    train(
        "stage1", Slope(a__weight=(2, 2)), CONFIG, batches("image"), None, tmp_path / "log", tensorboard=tmp_path / "tb"
    )
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tb" / "stage1")).Reload()
    assert events.Tags()["scalars"]
    assert [(e.step, e.value) for e in events.Scalars("stage1/loss")] == [(1, 1.0)]


def test_frozen_and_trained_do_not_share_memory() -> None:
    """What trains must not move what is frozen through a view of it."""
    teacher = teacher_of("post")
    for number in (1, 2, 3):
        stage = student_stage(number, teacher, student_of(teacher, "post"))
        trained = {p.untyped_storage().data_ptr() for p in stage.parameters().values()}
        frozen = {
            p.untyped_storage().data_ptr() for net in stage.networks() for p in net.parameters() if not p.requires_grad
        }
        assert not trained & frozen
        assert all(isinstance(p, nn.Parameter) for p in stage.parameters().values())


def test_signals_reach_only_the_main_process() -> None:
    from distill.faults import ignore_interrupts

    before = signal.getsignal(signal.SIGINT)
    try:
        ignore_interrupts(0)
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
