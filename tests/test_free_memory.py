"""What the machine says of its memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmmamba import memory


def test_free_memory_is_what_the_machine_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a file of our own: some virtual machines report the same whatever is taken."""
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path / "none")
    for available_kb in (5_000_000, 4_400_000):
        (tmp_path / "meminfo").write_text(f"MemTotal: 8000000 kB\nMemFree: 100 kB\nMemAvailable: {available_kb} kB\n")
        assert memory.free_memory_bytes() == available_kb * 1024


def test_a_container_may_have_less_than_its_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert memory.free_memory_bytes() == 600_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_memory_bytes() != 600_000
