"""Training in several processes: equal to one process on all of their batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from distill.config import StageConfig
from distill.data.batches import Batch
from distill.distributed import FlatGradients, Processes
from distill.trainer import train
from tests.helpers import assert_near
from tests.launching import in_two_processes
from tests.training import batches, copies, student_of, student_stage, teacher_of

CONFIG = StageConfig(steps=4, lr=1e-3, image_batch=3, text_batch=3, warmup=0.25)


def take(stream: Iterator[Batch], rank: int, world_size: int) -> Iterator[Batch]:
    return itertools.islice(stream, rank, None, world_size)


def joined(*given: Batch) -> Batch:
    pixels = [b.pixels for b in given if b.pixels is not None]
    ids, mask = torch.cat([b.input_ids for b in given]), torch.cat([b.loss_mask for b in given])
    return Batch(ids, mask, torch.cat(pixels) if pixels else None, 0)


def pairs(kind: str) -> Iterator[Batch]:
    stream = batches(kind)
    while True:
        yield joined(next(stream), next(stream))


def trained(images: Iterator[Batch], text: Iterator[Batch], log: Path, processes: Processes) -> dict[str, Tensor]:
    teacher = teacher_of("post")
    student = student_of(teacher, "post")
    train("test", student_stage(3, teacher, student), CONFIG, images, text, log, processes=processes)
    return copies(student)


def work(rank: int, folder: str) -> None:
    processes = Processes.join()
    assert (processes.rank, processes.is_main) == (rank, rank == 0)
    assert processes.first(float(rank + 5)) == 5.0
    images, text = (take(batches(kind), rank, 2) for kind in ("image", "text"))
    torch.save(trained(images, text, Path(folder) / f"log{rank}", processes), Path(folder) / f"{rank}.pt")
    processes.wait()
    processes.leave()


def test_two_processes_train_as_one_with_both_batches(tmp_path: Path) -> None:
    in_two_processes(work, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    alone = trained(pairs("image"), pairs("text"), tmp_path / "log", Processes())
    start = copies(student_of(teacher_of("post"), "post"))
    for name in alone:
        assert torch.equal(first[name], second[name]), f"the processes disagree about {name}"
    # Over all tensors: bf16 products over other batch sizes round otherwise, and Adam magnifies small gradients.
    change, expected = (
        torch.cat([(after[name] - start[name]).flatten() for name in alone]) for after in (first, alone)
    )
    assert expected.any()
    assert_near("change", change, expected, 0.05)
    assert (tmp_path / "log0").is_file()
    assert not (tmp_path / "log1").exists(), "only the main process writes"


def test_flat_gradients_are_the_parameters_own() -> None:
    a, b = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.full((4,), 2.0))
    gradients = FlatGradients([a, b])
    ((a * 3).sum() + (b * b).sum()).backward()
    assert gradients.flat.tolist() == [3.0] * 6 + [4.0] * 4
    norm = (9 * 6 + 16 * 4) ** 0.5
    assert float(gradients.clip_(1.0)) == pytest.approx(norm)
    assert b.grad is not None
    assert b.grad.tolist() == pytest.approx([4 / norm] * 4)
    assert float(gradients.clip_(5.0)) == pytest.approx(1.0)
    assert b.grad.tolist() == pytest.approx([4 / norm] * 4), "a norm below the limit was scaled"
    gradients.zero_()
    assert b.grad.tolist() == [0.0] * 4
