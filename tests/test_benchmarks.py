from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import decode, kernels, machine, report, smollm2
from mmmamba import cost, load_model

CPU = torch.device("cpu")


@pytest.fixture
def small_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' side at the size of the golden models, and no look into this machine's cache of weights."""
    small = {"vocab_size": 160, "hidden_size": 36, "intermediate_size": 48, "num_hidden_layers": 2}
    monkeypatch.setattr(smollm2, "BASELINE_CONFIG", smollm2.BASELINE_CONFIG | small)
    monkeypatch.setattr(smollm2, "BASELINE", "nobody/SmolLM2-135M")
    monkeypatch.setattr(machine, "BANDWIDTH_BYTES", 2**20)


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[str, dict[str, object]]:
    assert decode.main([str(a) for a in argv]) == 0
    out = capsys.readouterr().out
    return out, json.loads(out.splitlines()[-1])


@pytest.mark.usefixtures("small_baseline")
def test_decode_end_to_end(capsys: pytest.CaptureFixture[str], golden: Path, tmp_path: Path) -> None:
    out_file = tmp_path / "decode.json"
    models = golden / "post" / "linear", golden / "post" / "hovle"
    argv = ("--model", *models, "--contexts", 40, 20, "--steps", 4, "--piece-size", 7, "--out", out_file)
    out, summary = run(capsys, *argv)
    records = json.loads(out_file.read_text())
    assert records == summary["records"]
    names = ("post/linear", "post/hovle", "transformers SmolLM2-135M")
    assert [(r["what"], r["context"]) for r in records] == [(n, c) for c in (20, 40) for n in names]
    assert out.index("at least") < out.index("ms a token"), "the bill comes before the times"
    by_name = {(r["what"], r["context"]): r for r in records}
    for r in records:
        assert 0 < r["p20_ms"] <= r["ms"] <= r["p80_ms"]
        assert r["tok_per_sec"] == pytest.approx(1e3 / r["ms"], rel=0.01)
        assert r["floor_ms"] > 0
        assert r["dtype"] == "float32"
    assert by_name["transformers SmolLM2-135M", 20]["weights"] == "random"

    linear, teacher, hf = ([by_name[name, c]["cache_bytes"] for c in (20, 40)] for name in names)
    config = load_model(models[0]).config
    assert linear == [cost.state_bytes(config)] * 2
    teacher_config = cost.teacher_config(config)
    assert teacher == [cost.kv_cache_bytes(teacher_config, num_text_tokens=c) for c in (20, 40)]
    # layers x (keys, values) x heads x head_dim x float32
    assert hf == [2 * 2 * 3 * 4 * 4 * c for c in (20, 40)]


@pytest.mark.usefixtures("small_baseline")
def test_long_contexts_are_for_those_who_do_not_grow(
    capsys: pytest.CaptureFixture[str], golden: Path, tmp_path: Path
) -> None:
    models = golden / "post" / "linear", golden / "post" / "hovle", golden / "post" / "hybrid"
    argv = ("--model", *models, "--contexts", 12, 40, "--steps", 4, "--longest-cache", 20, "--out", tmp_path / "a.json")
    _, summary = run(capsys, *argv)
    names = ("post/linear", "post/hovle", "post/hybrid", "transformers SmolLM2-135M")
    measured = [(r["what"], r["context"]) for r in summary["records"]]
    assert measured == [*((name, 12) for name in names), ("post/linear", 40)]
    first, *_, last = summary["records"]
    assert first["cache_bytes"] == last["cache_bytes"]
    assert first["floor_ms"] == last["floor_ms"]


@pytest.mark.usefixtures("small_baseline")
def test_batch_random_weights_and_bfloat16(capsys: pytest.CaptureFixture[str], golden: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((golden / "pre_ntk" / "linear" / "config.json").read_text())
    argv = ["--model", tmp_path, "--random-weights", "--no-baseline", "--contexts", 10, "--steps", 2]
    argv += ["--batch", 3, "--dtype", "float32", "bfloat16", "--out", tmp_path / "out.json"]
    _, summary = run(capsys, *argv)
    wide, narrow = summary["records"]
    assert (wide["batch"], wide["weights"], narrow["dtype"]) == (3, "random", "bfloat16")
    assert wide["weight_bytes"] == 2 * narrow["weight_bytes"]
    assert wide["tok_per_sec"] == pytest.approx(3e3 / wide["ms"], rel=0.01)
    config = load_model(golden / "pre_ntk" / "linear").config
    assert narrow["cache_bytes"] == cost.state_bytes(config, batch=3, element_bytes=2)


def test_both_sides_read_what_the_record_says(golden: Path) -> None:
    """Reading in pieces and stepping gives the tokens that one forward over the same ids gives."""
    ids = torch.randint(3, 128, (2, 23), generator=torch.Generator().manual_seed(1))
    ours = decode.load_ours(
        str(golden / "post" / "linear"), CPU, torch.float32, random_weights=False, batch=2, piece_size=8
    )
    torch.manual_seed(0)
    small = {"vocab_size": 160, "hidden_size": 36, "num_hidden_layers": 2, "intermediate_size": 48}
    llama = LlamaForCausalLM(LlamaConfig(**smollm2.BASELINE_CONFIG | small)).eval()
    theirs = smollm2.TransformersSide(llama, "llama", "random", 8)
    logits = ours.model(ids)
    logits[..., ours.model.config.embedding.img_context_token_id] = float("-inf")
    for side, expected in ((ours, logits), (theirs, llama(ids).logits)):
        side.read(ids[:, :20])
        for t in range(20, 23):
            assert torch.equal(side.step(ids[:, t]), expected[:, t].argmax(-1)), side.name


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_weight_bytes(tied: bool) -> None:
    small = {"vocab_size": 160, "hidden_size": 36, "num_hidden_layers": 1, "tie_word_embeddings": tied}
    model = LlamaForCausalLM(LlamaConfig(**smollm2.BASELINE_CONFIG | small))
    count = smollm2.transformers_weight_bytes(model)
    row, table = 36 * 4, 160 * 36 * 4
    layers = sum(p.nbytes for p in model.model.layers.parameters()) + model.model.norm.weight.nbytes
    assert count.total == layers + table * (1 if tied else 2)
    assert count.per_token == layers + table + row


def test_floor_counts_weights_once_and_state_twice(golden: Path) -> None:
    side = decode.load_ours(
        str(golden / "post" / "linear"), CPU, torch.float32, random_weights=False, batch=2, piece_size=8
    )
    tokens = torch.randint(3, 128, (2, 12))
    (record,) = decode.measure([side], tokens, [12], 2, bandwidth=1e6, dtype="float32")
    moved = side.weight_bytes.per_token + 2 * cost.state_bytes(side.model.config, batch=2)
    assert record.floor_ms == pytest.approx(1e3 * moved / 1e6, abs=1e-3)


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        (["--contexts", "100", "120", "--steps", "40"], "--contexts 120"),
        (["--contexts", "3"], "--contexts 3"),
        (["--steps", "1"], "--steps 1"),
        (["--batch", "0"], "--batch 0"),
        (["--dtype", "float8"], "float8"),
        (["--longest-cache", "99"], "--longest-cache 99"),
    ],
)
def test_bad_flags_are_refused(capsys: pytest.CaptureFixture[str], argv: list[str], names: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        decode.main(argv)
    assert stopped.value.code == 2
    assert names in capsys.readouterr().err


def test_spread_is_median_between_the_quintiles() -> None:
    assert report.spread([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == pytest.approx((2.0, 3.5, 5.0))


def record(**changes: object) -> report.Record:
    facts = {
        "what": "a",
        "batch": 1,
        "context": 100,
        "ms": 1.0,
        "p20_ms": 1.0,
        "p80_ms": 1.0,
        "floor_ms": 0.5,
        "tok_per_sec": 1000.0,
        "cache_bytes": 1,
        "weight_bytes": 1,
        "peak_bytes": 1,
        "dtype": "float32",
        "weights": "random",
        "device": "cpu",
        "date": "2026-01-01",
    }
    return report.Record(**facts | changes)


def test_saved_records_replace_older_answers_to_the_same_question(tmp_path: Path) -> None:
    path = tmp_path / "results" / "decode-cpu.json"
    report.save([record(), record(context=1000)], path)
    report.save([record(ms=2.0, date="2026-01-02"), record(dtype="bfloat16")], path)
    kept = [(r["context"], r["dtype"], r["ms"]) for r in json.loads(path.read_text())]
    assert kept == [(1000, "float32", 1.0), (100, "float32", 2.0), (100, "bfloat16", 1.0)]


def test_markdown_puts_equal_contexts_side_by_side() -> None:
    points = [record(context=1000), record(), record(what="b", batch=4), record(what="c", ms=2.5, cache_bytes=2**21)]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in report.markdown(points).splitlines()]
    assert {len(row) for row in rows} == {7}
    assert [row[0] for row in rows[2:]] == ["100", "100", "1,000", "100"]
    assert [row[1] for row in rows[2:]] == ["a, float32", "c, float32", "a, float32", "b, float32, batch 4"]
    assert rows[3][2:6] == ["2.5 (1.0 to 1.0)", "0.5", "1,000.0", "2.0"]


def test_bandwidth_is_that_of_memory() -> None:
    bandwidth = machine.memory_bandwidth(CPU, num_bytes=2**24, repeats=2)
    assert 1e8 < bandwidth < 1e13


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux lets a process reset its peak")
def test_peak_memory_sees_a_tensor_come_and_forgets_it_when_reset() -> None:
    machine.reset_peak_memory(CPU)
    before = machine.peak_memory_bytes(CPU)
    big = torch.ones(2**24)  # 64 MiB, touched
    grown = machine.peak_memory_bytes(CPU)
    assert grown >= before + 0.9 * big.nbytes
    del big
    machine.reset_peak_memory(CPU)
    assert machine.peak_memory_bytes(CPU) < grown - 2**25


def test_scans_are_timed_beside_their_floor(capsys: pytest.CaptureFixture[str]) -> None:
    kernels.main(["--shapes", "tiny", "--impls", "chunked,mamba_ssm", "--steps", "2", "--device", "cpu"])
    *_, last = capsys.readouterr().out.strip().splitlines()
    ran, skipped = json.loads(last)["records"]
    assert ran["forward_backward_ms"] > 0
    assert all(error < 1e-5 for error in ran["relative_rms_error"].values())
    assert "needs cuda" in skipped["skipped"]
    # 36 pairs of tokens; two products forward, six back.
    shape = kernels.Shape(1, 8, 1, 1, 16, 8)
    assert shape.flops() == (36 * 2 * 16 * 2, 36 * 2 * 16 * 6)
    assert shape.bytes(2) == (4 * 8 * 16 * 2 + 32, 7 * 8 * 16 * 2 + 64)
