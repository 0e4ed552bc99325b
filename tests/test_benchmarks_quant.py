"""The benchmark of schemes end to end on nano, and its sums by hand."""

from __future__ import annotations

import ctypes
import importlib.machinery
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import llama_cpp, machine, quant, smollm2
from mmmamba import load_model


def test_end_to_end(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small = {"vocab_size": 160, "hidden_size": 36, "intermediate_size": 48, "num_hidden_layers": 2}
    monkeypatch.setattr(smollm2, "BASELINE_CONFIG", smollm2.BASELINE_CONFIG | small)
    monkeypatch.setattr(smollm2, "BASELINE", "nobody/SmolLM2-135M")
    monkeypatch.setattr(machine, "BANDWIDTH_BYTES", 2**20)
    argv = ["--scheme", "int4", "--questions", "1", "--texts", "1", "--steps", "2", "--contexts", "20", "10"]
    assert quant.main([*argv, "--out", str(tmp_path / "quant-here.json")]) == 0
    out = capsys.readouterr().out
    summary = json.loads(out.splitlines()[-1])
    rows = json.loads((tmp_path / "quant-here.json").read_text())
    assert rows == summary["records"]
    float32, bfloat16, int4 = rows
    assert [r["scheme"] for r in rows] == ["float32", "bfloat16", "int4"]
    assert (int4["group_size"], int4["context"], float32["questions"]) == (64, 10, len(quant.QUESTIONS))
    assert float32["weight_bytes"] == pytest.approx(2 * bfloat16["weight_bytes"], rel=1e-3)
    assert int4["weight_bytes"] < 0.2 * float32["weight_bytes"]
    assert int4["file_bytes"] < 0.25 * float32["file_bytes"]
    assert (float32["kl_answers"], float32["kl_text"], float32["changed"]) == (0, 0, 0)
    assert 0 <= int4["kl_text"] < bfloat16["kl_text"] < 0.1, "nano lies on the grids of int4"
    assert float32["right"] > 0
    for r in rows:
        assert 0 < r["p20_ms"] <= r["ms"] <= r["p80_ms"]
    speed = json.loads((tmp_path / "quant-here-speed.json").read_text())
    names = [f"nano-linear {scheme}" for scheme in ("float32", "bfloat16", "int4")] + ["transformers SmolLM2-135M"]
    assert [(r["what"], r["context"]) for r in speed] == [(name, c) for c in (10, 20) for name in names]
    assert out.index("at least") < out.index("| int4 |"), "the bill comes before the table"


def test_kl_is_of_the_first_to_the_second() -> None:
    class Head:
        def __init__(self, weight: list[list[float]]) -> None:
            self.language = nn.Module()
            self.language.output = nn.Linear(1, 2, bias=False)
            self.language.output.weight = nn.Parameter(torch.tensor(weight))

    # Probabilities (1/2, 1/2) and (1/4, 3/4); 100 tokens are more than are looked at together.
    even, other = Head([[0.0], [0.0]]), Head([[0.0], [math.log(3.0)]])
    hidden = [torch.ones(100, 1)]
    wanted = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert quant.mean_kl(even, hidden, other, hidden) == pytest.approx(wanted, rel=1e-6)
    assert quant.mean_kl(even, hidden, even, hidden) == 0


def test_answers_are_counted_whole() -> None:
    """As many as there are questions, and none right by a model that says nothing sensible."""
    model = load_model("nano-linear")
    asked = quant.questions(model, 1, 3)
    right = quant.ask(model, asked, []).right
    assert len(right) == len(quant.QUESTIONS)
    with torch.no_grad():
        model.language.norm.weight.neg_()
    assert not any(quant.ask(model, asked, []).right)


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        (["--questions", "0"], "--questions 0"),
        (["--contexts", "100", "120"], "--contexts [100, 120]"),
        (["--contexts", "3"], "--contexts [3]"),
        (["--scheme", "int3"], "int3"),
        (["--gguf", "nothing.gguf"], "nothing.gguf is not a file"),
    ],
)
def test_bad_flags_are_refused(capsys: pytest.CaptureFixture[str], argv: list[str], names: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        quant.main(argv)
    assert stopped.value.code == 2
    assert names in capsys.readouterr().err


# --- llama.cpp, by a package that only has its names ---


class FakeLlama:
    """Logits that are largest at the last token plus one."""

    def __init__(self, path: str, **options: Any) -> None:
        assert options["n_ctx"] == 32
        self.seen: list[int] = []
        self.ctx = self

    @property
    def n_tokens(self) -> int:
        return len(self.seen)

    def n_vocab(self) -> int:
        return 10

    def eval(self, tokens: list[int]) -> None:
        self.seen += tokens


def fake_logits(ctx: FakeLlama, index: int) -> Any:
    values = [float(i == (ctx.seen[index] + 1) % 10) for i in range(10)]
    return ctypes.cast((ctypes.c_float * 10)(*values), ctypes.POINTER(ctypes.c_float))


def test_llama_cpp_side(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gguf = tmp_path / "SmolLM2-135M.Q4_1.gguf"
    gguf.write_bytes(b"0" * 1000)
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.setattr(llama_cpp, "find_spec", lambda name: None)
    assert "pip install llama-cpp-python" in llama_cpp.fault(gguf)
    package = ModuleType("llama_cpp")
    package.__spec__ = importlib.machinery.ModuleSpec("llama_cpp", None)
    package.Llama, package.llama_get_logits_ith = FakeLlama, fake_logits
    monkeypatch.setitem(sys.modules, "llama_cpp", package)
    monkeypatch.setattr(llama_cpp, "find_spec", lambda name: package.__spec__)
    assert llama_cpp.fault(gguf) == ""
    side = llama_cpp.LlamaCppSide(gguf, 32, 8)
    side.read(torch.tensor([[1, 2, 3]]))
    assert side.step(torch.tensor([6])).tolist() == [7]
    assert side.cache_bytes() == 4 * side.KV_BYTES
    assert side.weight_bytes.per_token == 1000
