"""python -m quantize: what it writes and says, and what it refuses before the work."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from mmmamba import cli, load_model
from mmmamba.cost import weight_bytes
from quantize import quantize_, save_quantized
from quantize.__main__ import main
from tests.test_quantize import assert_same, made, metadata, raw


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    try:
        status = main([str(a) for a in argv])
    except SystemExit as stopped:
        status = stopped.code
    out, err = capsys.readouterr()
    return status, out, err


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_checkpoint_that_chats(
    scheme: str, capsys: pytest.CaptureFixture[str], tiny_dir: Path, tmp_path: Path
) -> None:
    status, out, err = run(capsys, tiny_dir, tmp_path / "out", "--scheme", scheme, "--group-size", 12)
    if scheme == "int8":
        assert (status, out) == (2, "")
        assert err == "quantize: group_size=12 does not apply to int8; leave it out, or use int4\n"
        status, out, err = run(capsys, tiny_dir, tmp_path / "out", "--scheme", scheme)
    assert (status, err) == (0, "")
    weights = tmp_path / "out" / "model.safetensors"
    assert re.search(rf"^{re.escape(str(weights))}: [\d.,]+ MB; in float32 the parameters take [\d.,]+ MB\n", out)
    assert re.search(r"relative error of a weight: [\d.]+% on average, [\d.]+% at most \(\S+\.weight\)\n$", out)
    assert metadata(weights)["source"] == tiny_dir.name
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    model = load_model(tmp_path / "out")
    assert model.scheme == scheme
    answer = ["chat", "--model", str(tmp_path / "out"), "--greedy", "--max-new-tokens", "3", "Hello"]
    assert cli.main(answer) == 0
    assert capsys.readouterr().err == ""


def test_a_model_that_was_trained_on_the_grid(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, out, err = run(capsys, "nano-linear", tmp_path, "--scheme", "int4")
    assert (status, err) == (0, "")
    assert out.endswith("nothing was rounded: every weight is stored on a grid of this scheme already\n")
    assert metadata(tmp_path / "model.safetensors")["source"] == "nano-linear"


def test_dtype_is_that_of_what_stays(capsys: pytest.CaptureFixture[str], tiny_dir: Path, tmp_path: Path) -> None:
    argv = (tiny_dir, tmp_path, "--scheme", "int8", "--dtype", "bfloat16")
    assert run(capsys, *argv)[0] == 0
    again = load_model(tmp_path, dtype=torch.bfloat16)
    assert_same(again, load_model(tiny_dir, dtype=torch.bfloat16, quantize="int8"))


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_info_counts_what_is_stored(scheme: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = made(raw(tied=True))
    quantize_(model, scheme)
    weights = save_quantized(model, tmp_path)
    assert cli.main(["info", str(tmp_path), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    held = weight_bytes(load_model(tmp_path))
    assert record["quantize"] == scheme
    assert record["weight_bytes"] == held.total < weights.stat().st_size
    assert record["weight_bytes_per_token"] == held.per_token
    assert cli.main(["info", str(tmp_path)]) == 0
    assert f" in {scheme}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        (["{tiny}", "{tiny}", "--scheme", "int8"], ["holds the model itself"]),
        (["{tiny}", "{tmp}/file", "--scheme", "int8"], ["is a file"]),
        (["no-such-model", "{tmp}/out", "--scheme", "int4"], ["no-such-model"]),
        (["{tiny}", "{tmp}/out", "--scheme", "int4", "--group-size", "30"], ["group_size=30"]),
        (["{tiny}", "{tmp}/out", "--scheme", "int2"], ["int2", "int4"]),
        (["{tiny}", "{tmp}/out"], ["--scheme"]),
    ],
)
def test_bad_input_is_said_and_nothing_written(
    capsys: pytest.CaptureFixture[str], tiny_dir: Path, tmp_path: Path, argv: list[str], names: list[str]
) -> None:
    (tmp_path / "file").write_text("")
    before = {f.name: f.read_bytes() for f in tiny_dir.iterdir()}
    status, out, err = run(capsys, *(a.format(tiny=tiny_dir, tmp=tmp_path) for a in argv))
    assert (status, out) == (2, "")
    for name in names:
        assert name in err
    assert not (tmp_path / "out").exists()
    assert {f.name: f.read_bytes() for f in tiny_dir.iterdir()} == before
