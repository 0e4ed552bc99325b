"""A run that goes on from a checkpoint equals one that was never interrupted, bit for bit."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.checkpoints import Checkpoint, Checkpoints
from distill.config import StageConfig
from distill.data.batches import Batch
from distill.distributed import Processes
from distill.faults import Interrupted
from distill.sharding import shard_, whole
from distill.stages import Stage, TeacherStage
from distill.trainer import ONE_PROCESS, train
from tests.helpers import assert_near
from tests.launching import in_two_processes
from tests.training import batch, student_of, student_stage, teacher_of

CONFIG = StageConfig(steps=7, lr=1e-3, image_batch=3, text_batch=3, warmup=0.25, save_steps=2)


class Killed(Exception):
    """Stands for a run that ends without a word."""


def new_stage(number: int) -> Stage:
    teacher = teacher_of("post")
    if number == 0:
        return TeacherStage(teacher, compiled=False)
    return student_stage(number, teacher, student_of(teacher, "post"))


def stream(
    kind: str, start: int, processes: Processes, last: int = 10**9, end: Callable[[], None] | None = None
) -> Iterator[Batch]:
    """As `Mixture` counts, batch `number` of each process is another; before giving batch `last`, `end` is called."""
    number = start
    while True:
        if number == last and end is not None:
            end()
        yield batch(kind, 1 + number * processes.world_size + processes.rank)
        number += 1


def run(
    config: StageConfig,
    number: int,
    folder: Path,
    *,
    last: int = 10**9,
    end: Callable[[], None] | None = None,
    processes: Processes = ONE_PROCESS,
    shard: bool = False,
) -> dict[str, Any]:
    """Train from the last checkpoint in `folder`, if there is one; returns what was trained and what was kept last."""
    stage = new_stage(number)
    if shard:
        shard_(stage, processes, torch.device("cpu"))
    store = Checkpoints(folder, {"stage": number})
    checkpoint = store.latest(processes)
    start = checkpoint.start(processes.world_size) if checkpoint else 0
    streams = (stream("image", start, processes, last, end), stream("text", start, processes))
    ends: list[Checkpoint] = []

    class Last(Checkpoints):
        def save(self, checkpoint: Checkpoint) -> Path:
            ends.append(checkpoint)
            return super().save(checkpoint)

    train(
        "test",
        stage,
        config,
        *streams,
        folder / "log",
        store=Last(folder, store.facts),
        resume=checkpoint,
        processes=processes,
    )
    return {"parameters": whole({n: p.data for n, p in stage.parameters().items()})} | (
        {"optimizers": ends[-1].optimizers, "step": ends[-1].step} if ends else {}
    )


def kill() -> None:
    raise Killed


def same(a: Any, b: Any, where: str = "") -> None:
    """Everything in two nested values is equal, to the last bit."""
    if isinstance(a, Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{where}/{i}")
    else:
        assert a == b, where


@pytest.mark.parametrize(
    ("number", "changes"),
    [
        (1, {}),
        (3, {"accumulate": 2, "steps": 4}),
        (0, {"muon": True, "lr_language": 1e-4, "text_batch": 0, "steps": 5}),
        (3, {"activation_checkpointing": True, "round_from": 0.5, "steps": 5, "text_batch": 0}),
    ],
)
def test_a_killed_run_goes_on_as_if_it_had_not_been(
    number: int, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill.rounding.storage_spec", lambda name, tensor: None)
    config = replace(CONFIG, **changes)
    unbroken = run(config, number, tmp_path / "unbroken")
    killed_at = 3
    with pytest.raises(Killed):
        run(config, number, tmp_path / "broken", last=killed_at * config.accumulate, end=kill)
    checkpoint = Checkpoints(tmp_path / "broken", {"stage": number}).latest(ONE_PROCESS)
    assert checkpoint is not None
    assert checkpoint.step == 2, "more than the interval was lost"
    assert checkpoint.batches == 2 * config.accumulate
    same(run(config, number, tmp_path / "broken"), unbroken)


def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(tmp_path: Path) -> None:
    config = replace(CONFIG, save_steps=0)
    unbroken = run(config, 1, tmp_path / "unbroken")
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=r"test stopped after step 4, kept in .*broken; the same command goes on"):
        run(config, 1, tmp_path / "broken", last=3, end=lambda: signal.raise_signal(signal.SIGINT))
    assert signal.getsignal(signal.SIGINT) is before
    assert [path.name for path in (tmp_path / "broken").glob("*.pt")] == ["step-00000004.pt"]
    same(run(config, 1, tmp_path / "broken"), unbroken)


def test_minutes_go_on_where_they_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("distill.clock.time", SimpleNamespace(perf_counter=lambda: now[0]))

    def wait(seconds: float) -> None:
        now[0] += seconds

    def last() -> Checkpoint:
        found = Checkpoints(tmp_path, {"stage": 1}).latest(ONE_PROCESS)
        assert found is not None
        return found

    config = replace(CONFIG, steps=1000, max_minutes=1.0, save_steps=1)
    with pytest.raises(Killed):
        run(config, 1, tmp_path, last=2, end=kill)
    assert (last().step, last().elapsed_s) == (2, 0.0)
    Checkpoints(tmp_path, {"stage": 1}).save(replace(last(), elapsed_s=59.0))
    now[0] = 5.0  # another process, whose clock began anew
    run(config, 1, tmp_path, last=2, end=lambda: wait(2.0))
    assert (last().step, last().elapsed_s) == (3, 61.0), "59 seconds had passed, and the next step took two"


def work(rank: int, folder: str) -> None:
    processes = Processes.join()
    assert processes.gather(rank) == [0, 1]
    assert processes.agree(0.25 + rank, save=rank == 1, stop=rank == 1) == (0.25, False, True)
    at = Path(folder)
    # A signal to one process stops all after the same step, and each goes on with batches of its own.
    config = replace(CONFIG, accumulate=2, steps=3, warmup=0.0, save_steps=1, text_batch=0)
    plain = run(config, 3, at / "unbroken", processes=processes)
    ask = (lambda: signal.raise_signal(signal.SIGINT)) if rank == 1 else None
    with pytest.raises(Interrupted, match="stopped after step 2"):
        run(replace(config, save_steps=0), 3, at / "asked", last=3, end=ask, processes=processes)
    same(run(config, 3, at / "asked", processes=processes), plain)
    # Spread weights give the same to rounding, and the same to the bit when they go on.
    for number, changes in ((3, {"activation_checkpointing": True, "steps": 2}), (1, {}), (0, {"accumulate": 1})):
        config = replace(config, **({"steps": 1} | changes))
        name = f"stage{number}"
        wanted = run(config, number, at / f"{name}-plain", processes=processes)
        spread = run(config, number, at / f"{name}-spread", processes=processes, shard=True)
        start = {n: p.detach().clone() for n, p in new_stage(number).parameters().items()}
        change, expected = (
            torch.cat([(end["parameters"][n] - start[n]).flatten() for n in start]) for end in (spread, wanted)
        )
        assert expected.any()
        assert_near(name, change, expected, 0.02)
        if number == 3:
            with pytest.raises(Killed):
                run(config, number, at / "spread", last=2, end=kill, processes=processes, shard=True)
            same(run(config, number, at / "spread", processes=processes, shard=True), spread)
    if processes.is_main:
        (at / "done").touch()
    processes.wait()
    processes.leave()


def test_two_processes_resume_and_spread(tmp_path: Path) -> None:
    in_two_processes(work, str(tmp_path))
    assert (tmp_path / "done").is_file()
