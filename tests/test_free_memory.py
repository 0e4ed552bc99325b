"""What the machine says of its memory."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from mmmamba import memory


def test_free_memory_falls_by_what_is_taken() -> None:
    falls = []
    for _ in range(5):  # what others give back meanwhile may hide it once
        before = memory.free_memory_bytes()
        if before is None:
            return  # this system does not tell
        with mmap.mmap(-1, 2**29) as held:  # new pages: an allocator would take what earlier tests gave back to it
            for page in range(0, len(held), mmap.PAGESIZE):
                held[page] = 1
            falls.append(before - memory.free_memory_bytes())
    assert max(falls) > 2**28


def test_a_container_may_have_less_than_its_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert memory.free_memory_bytes() == 600_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_memory_bytes() != 600_000
