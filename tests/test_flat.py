"""Tokens after short and long contexts, in turns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import decode, flat, machine
from mmmamba import ModelInputs, cost, prefill
from mmmamba.state import DecodeState
from tests.helpers import assert_same_state

CONTEXTS = [5, 20, 70]


@pytest.fixture(autouse=True)
def _small_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "BANDWIDTH_BYTES", 2**20)


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[str, dict[str, Any]]:
    assert flat.main([str(a) for a in argv]) == 0
    out = capsys.readouterr().out
    return out, json.loads(out.splitlines()[-1])


def side_of(directory: Path) -> decode.OurSide:
    given = {"random_weights": False, "batch": 1, "piece_size": 16}
    return decode.load_ours(str(directory), torch.device("cpu"), torch.float32, **given)


def test_records_and_states_that_are_read_once(
    capsys: pytest.CaptureFixture[str], golden: Path, tmp_path: Path
) -> None:
    argv = ("--model", golden / "post" / "linear", "--contexts", *CONTEXTS, "--turns", 3, "--out", tmp_path / "a.json")
    out, summary = run(capsys, *argv, "--states", tmp_path / "states")
    assert out.count(": read, ") == 3
    records = json.loads((tmp_path / "a.json").read_text())
    assert records == summary["records"]
    assert [r["context"] for r in records] == CONTEXTS
    config = side_of(golden / "post" / "linear").model.config
    for r in records:
        assert r["cache_bytes"] == cost.state_bytes(config)
        assert (r["what"], r["dtype"], r["weights"]) == ("post/linear", "float32", "checkpoint")
        assert 0 < r["p20_ms"] <= r["ms"] <= r["p80_ms"]
    assert len({(r["floor_ms"], r["peak_bytes"]) for r in records}) == 1
    assert summary["ratios"]["5"] == 1.0
    assert summary["ratios"]["70"] > 0

    again, _ = run(capsys, *argv, "--states", tmp_path / "states")
    assert ": read, " not in again
    assert again.count(": from post-linear-") == 3
    other, _ = run(capsys, "--model", golden / "pre_ntk" / "linear", *argv[2:], "--states", tmp_path / "states")
    assert other.count(": read, ") == 3, "states of other weights"


def test_states_have_seen_what_they_say(golden: Path, tmp_path: Path) -> None:
    side = side_of(golden / "post" / "linear")
    tokens = torch.randint(3, 128, (1, 70), generator=torch.Generator().manual_seed(1))
    states = flat.states_at(side, tokens, CONTEXTS, tmp_path)
    for context, state in zip(CONTEXTS, states, strict=True):
        whole = side.model.new_state()
        prefill(side.model, ModelInputs(tokens[:, :context]), whole)
        assert state.seqlen == context
        assert_same_state(state, whole, 1e-5)
        (file,) = tmp_path.glob(f"*-{context}.safetensors")
        assert_same_state(DecodeState.load(file, side.model.config), state)
    flat.measure(side, states, tokens[:, -1], 2)
    steps = 2 * (decode.WARM_UP_STEPS + 2)
    assert [state.seqlen for state in states] == [context + steps for context in CONTEXTS]


def test_ratios_are_those_of_one_turn() -> None:
    """A moment in which everything takes ten times as long changes nothing."""
    assert flat.ratios([[1.0, 10.0, 1.0], [1.1, 11.0, 1.1], [2.0, 20.0, 2.0]]) == [1.0, 1.1, 2.0]


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        (["--model", "{golden}/post/hovle"], "keeps a cache"),
        (["--contexts", "7", "7"], "--contexts [7, 7]"),
        (["--contexts", "0"], "--contexts [0]"),
        (["--turns", "1"], "--turns 1"),
    ],
)
def test_bad_flags_are_refused(capsys: pytest.CaptureFixture[str], golden: Path, argv: list[str], names: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        flat.main([a.format(golden=golden) for a in argv])
    assert stopped.value.code == 2
    assert names in capsys.readouterr().err
