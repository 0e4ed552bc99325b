"""Where states lie: budgets, the order of moving on, coming back, and nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from app.backend import StateMover
from app.states import Budget, Kept, StateStore
from mmmamba import ModelInputs, prefill
from tests.fakes import STATE_BYTES, FakeMover, FakeState
from tests.helpers import golden_model


def store_of(tmp_path: Path, device: int = 2, memory: int = 2, disk: int = 10**6) -> StateStore:
    """Room for so many states on the device and in memory, and bytes on disk."""
    return StateStore(Budget(device * STATE_BYTES, memory * STATE_BYTES, disk), tmp_path)


def keep(store: StateStore, mover: FakeMover, count: int) -> list[Kept]:
    return [store.keep(FakeState((f"chat{i}",)), mover) for i in range(count)]


def places(kept: list[Kept]) -> list[str]:
    return [k.place for k in kept]


def test_oldest_move_to_memory_then_to_disk(tmp_path: Path) -> None:
    store, mover = store_of(tmp_path), FakeMover("cuda")
    kept = keep(store, mover, 6)
    assert places(kept) == ["disk", "disk", "memory", "memory", "device", "device"]
    assert store.used_bytes("device") == store.used_bytes("memory") == 2 * STATE_BYTES
    assert len(list(tmp_path.iterdir())) == 2


def test_states_of_a_cpu_model_go_from_memory_to_disk(tmp_path: Path) -> None:
    kept = keep(store_of(tmp_path), FakeMover("cpu"), 3)
    assert places(kept) == ["disk", "memory", "memory"]


def test_what_is_asked_for_comes_back_and_pushes_out_the_oldest(tmp_path: Path) -> None:
    store, mover = store_of(tmp_path), FakeMover("cuda")
    kept = keep(store, mover, 6)
    state = store.take(kept[0])
    assert state is not None
    assert state.seen == ("chat0",), "the state came back as another"
    assert places(kept) == ["device", "disk", "disk", "memory", "memory", "device"]
    state.seen += ("more",)
    again = store.take(kept[0])
    assert again is not None
    assert again.seen == ("chat0",), "the snapshot was advanced"
    assert store.take(kept[3]) is not None
    assert "device" in mover.moved


def test_beyond_the_disk_the_oldest_is_let_go(tmp_path: Path) -> None:
    store, mover = store_of(tmp_path, memory=0, disk=30), FakeMover("cpu")
    kept = keep(store, mover, 4)
    assert kept[0].place == "gone"
    assert store.take(kept[0]) is None
    assert kept[3].place == "memory", "the newest is never moved"


def test_a_file_that_went_bad_is_no_crash(tmp_path: Path) -> None:
    store, mover = store_of(tmp_path, memory=0), FakeMover("cpu")
    kept = keep(store, mover, 2)
    assert kept[0].path is not None
    kept[0].path.write_text("not a state")
    assert store.take(kept[0]) is None
    assert not list(tmp_path.iterdir())


def test_release_frees_every_place(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    kept = keep(store, FakeMover("cuda"), 6)
    for k in kept:
        store.release(k)
        store.release(k)  # twice is once
    assert len(store) == 0
    assert not list(tmp_path.iterdir())
    assert [store.used_bytes(place) for place in ("device", "memory", "disk")] == [0, 0, 0]


def test_without_a_budget_a_share_of_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmmamba.memory.free_memory_bytes", lambda device="cpu": 8 * STATE_BYTES)
    store = StateStore(directory=tmp_path)
    assert places(keep(store, FakeMover("cpu"), 3)) == ["disk", "memory", "memory"], "a quarter of 8 is 2"


@pytest.mark.parametrize("kind", ["linear", "hybrid", "hovle"])
def test_real_states_survive_the_way_over_disk(tmp_path: Path, kind: str) -> None:
    model = golden_model("post", kind)
    mover = StateMover(model.config, "cpu", "float32")
    state = model.new_state()
    prefill(model, ModelInputs(torch.tensor([[5, 6, 7]])), state)
    expected = state.clone().tensors()
    store = StateStore(Budget(memory=0), tmp_path)
    kept = store.keep(state, mover)
    other = store.keep(model.new_state(), mover)
    assert kept.place == "disk"
    back = store.take(kept)
    assert back is not None
    for name, tensor in back.tensors().items():
        assert torch.equal(tensor, expected[name][:, :, :3] if "cache" in name else expected[name])
    store.release(other)


def test_turns_of_a_teacher_cost_one_cache(tmp_path: Path) -> None:
    """Ten snapshots of a growing cache: together as much as the last one, not as all of them."""
    model = golden_model("post", "hovle")
    mover, store = StateMover(model.config, "cpu", "float32"), StateStore(Budget(memory=1 << 40), tmp_path)
    kept, state = None, model.new_state()
    for _ in range(10):
        prefill(model, ModelInputs(torch.arange(3, 123)[None]), state)
        kept = store.keep(state, mover, kept)
        state = store.take(kept)
    assert kept is not None
    assert kept.state is not None
    assert store.used_bytes("memory") < 1.3 * sum(kept.state.storages().values())
