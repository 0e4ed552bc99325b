"""The commands of `python -m distill`, end to end on a network small enough for seconds."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from distill.__main__ import _parser, cli, main
from distill.config import Recipe
from distill.convert import fuse_
from distill.data.batches import Batch
from distill.data.mixture import Mixture
from distill.distributed import Processes
from distill.losses import token_kl
from distill.streams import Data, places
from mmmamba import load_model
from mmmamba.checkpoint import BUNDLED_DIR, save_model
from mmmamba.model import MMMamba
from mmmamba.tokenizer import load_tokenizer
from tests.launching import free_port, launch, wait_for_hosts
from tests.training import save_tiny_base, save_tiny_teacher, tiny_config

ROOT = Path(__file__).parent.parent
STAGE = {
    "steps": 2,
    "lr": 1e-3,
    "image_batch": 2,
    "text_batch": 1,
    "image_answer_tokens": 20,
    "text_answer_tokens": 120,
}
COMMANDS = ("convert", "stage1", "stage2", "stage3", "run", "export", "eval", "table", "card", "teacher", "bundle")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_tiny_base(tmp_path / "base")


@pytest.fixture(autouse=True)
def exporter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `distill.export` is not part of the tree, something that does as it should."""

    def export_student(student: MMMamba, out: Path) -> Path:
        save_model(fuse_(student), out)
        return out

    if importlib.util.find_spec("distill.export") is None:
        monkeypatch.setitem(sys.modules, "distill.export", SimpleNamespace(export_student=export_student))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config()
    monkeypatch.setattr("distill.nano.nano_config", lambda: config)
    # What trains here is too narrow for nano's groups of 64 and 96, except in the embedding's table.
    monkeypatch.setattr("distill.rounding.storage_spec", lambda name, tensor: None)
    monkeypatch.setattr("distill.__main__.storage_spec", lambda name, tensor: None)


def tiny_recipe(tmp_path: Path, *, name: str = "tiny", stage: dict[str, Any] | None = None, **changes: Any) -> Path:
    names = ("teacher", "stage1", "stage2", "stage3")
    raw = {
        "image_seqlen": 96,
        "text_seqlen": 128,
        "text_sources": {"self": 1},
        "stages": {name: STAGE | (stage or {}) for name in names},
    }
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(raw | changes))
    return path


def common(tmp_path: Path, recipe: Path) -> list[str]:
    return [
        *["--recipe", str(recipe), "--tokenizer", str(BUNDLED_DIR), "--log-file", str(tmp_path / "log.jsonl")],
        *["--workers", "0", "--eval-count", "2", "--no-compile", "--device", "cpu"],
    ]


def log_of(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("tiny")
def test_teacher_student_bundle_and_eval(
    tmp_path: Path, base: Path, font_pack: Path, nlvr_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = dict.fromkeys(("shapes", "printed", "charts", "digits", "nlvr"), 1)
    recipe = tiny_recipe(tmp_path, stage={"round_from": 0.5}, image_seqlen=160, image_sources=sources)
    options = [*common(tmp_path, recipe), "--data", f"fonts={font_pack}", "--data", f"text={nlvr_folder}"]

    main(["teacher", "--base", str(base), "--out", str(tmp_path / "teacher"), *options])
    teacher = load_model(tmp_path / "teacher")
    assert teacher.config.kind == "teacher"
    again = ["teacher", "--base", str(base), "--resume", str(tmp_path / "teacher")]
    main([*again, "--out", str(tmp_path / "more"), *options])
    first, resumed = (line["image_ce"] for line in log_of(tmp_path) if line.get("step"))
    assert resumed < first, "the same first batch, from the trained weights"

    # Step by step ...
    by_steps, teacher_at = tmp_path / "steps", ["--teacher", str(tmp_path / "teacher")]
    model_only = ["--recipe", str(recipe), *teacher_at, "--out", str(by_steps)]
    main(["convert", *model_only])
    assert load_model(by_steps).config.kind == "linear", "a seeded student can be loaded"
    for name in ("stage1", "stage2", "stage3"):
        capsys.readouterr()
        main([name, *teacher_at, "--out", str(by_steps), *options, "--eval-count", "0"])
        assert f"{name}: a step needs about 0." in capsys.readouterr().out
        assert (by_steps / "stages" / f"{name}.safetensors").is_file()
    main(["export", *model_only])
    # ... is the same as all at once, the teacher included, and a second time nothing is left to do.
    at_once = tmp_path / "linear"
    capsys.readouterr()
    main(["run", "--base", str(base), "--out", str(at_once), *options])
    assert "taken from" not in capsys.readouterr().out
    linear = load_model(at_once)
    stepwise = dict(load_model(by_steps).named_parameters())
    for name, tensor in linear.named_parameters():
        assert torch.equal(tensor, stepwise[name]), name
    trained_at = (at_once / "stages" / "stage1.safetensors").stat().st_mtime_ns
    main(["run", "--base", str(base), "--out", str(at_once), *options])
    said = capsys.readouterr().out
    for name in ("teacher", "convert", "stage1", "stage2", "stage3"):
        assert f"{name}: taken from" in said
    assert (at_once / "stages" / "stage1.safetensors").stat().st_mtime_ns == trained_at

    # A hybrid of the same teacher takes the layers that were trained for the linear one.
    hybrid = tiny_recipe(tmp_path, name="hybrid", softmax_layers=[0, 3], image_seqlen=160, image_sources=sources)
    mixed = ["run", *common(tmp_path, hybrid), *options[10:], "--layers-from", str(at_once)]
    main([*mixed, *teacher_at, "--out", str(tmp_path / "mixed")])
    assert "stage2: taken from" in capsys.readouterr().out
    assert load_model(tmp_path / "mixed").config.kind == "hybrid"
    taken, whole = (load_file(out / "stages" / "stage2.safetensors") for out in (tmp_path / "mixed", at_once))
    assert taken.keys() < whole.keys()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in taken.items())
    wide = tiny_config()
    wide = replace(wide, language=replace(wide.language, rope_theta=5.0))
    other = ["--teacher", str(save_tiny_teacher(tmp_path / "other", wide)), "--out", str(tmp_path / "no")]
    with pytest.raises(ValueError, match=r"stage1.safetensors is of another student's teacher"):
        main([*mixed, *other])

    assert linear.config.kind == "linear"
    assert torch.equal(linear.embedding.text.weight, teacher.embedding.text.weight)
    log = log_of(tmp_path)
    assert {line["stage"] for line in log} == {"teacher", "stage1", "stage2", "stage3"}
    assert all(0 <= score <= 1 for line in log for score in line.get("exact_match", {}).values())

    main(["bundle", str(tmp_path / "nano"), f"teacher={tmp_path / 'teacher'}", f"linear={at_once}"])
    for name, model in (("teacher", teacher), ("linear", linear)):
        bundled = load_model(tmp_path / "nano" / name)
        for ours, tensor in model.named_parameters():
            assert torch.allclose(bundled.get_parameter(ours), tensor, atol=1e-3), ours

    capsys.readouterr()
    evaluate = ["eval", str(tmp_path / "nano" / "linear"), "--tokenizer", str(BUNDLED_DIR), "--count", "2"]
    main(evaluate)
    scores = json.loads(capsys.readouterr().out)
    assert {"shapes_count", "charts_bar_pie"} <= scores.keys()
    assert "printed_text" not in scores, "it needs fonts"
    main([*evaluate, "--data", f"fonts={font_pack}", "--data", f"text={nlvr_folder}"])
    scores = json.loads(capsys.readouterr().out)
    assert {"printed_text", "nlvr", "digits"} <= scores.keys()
    assert scores["printed_text_cer"] > 0


@pytest.mark.usefixtures("tiny")
def test_all_tokens_sums_over_all_tokens(tmp_path: Path) -> None:
    teacher = save_tiny_teacher(tmp_path / "teacher")
    recipe = tiny_recipe(tmp_path, stages={"stage3": STAGE | {"steps": 1}})
    options = [
        *common(tmp_path, recipe),
        "--eval-count",
        "0",
        "--teacher",
        str(teacher),
        "--out",
        str(tmp_path / "out"),
    ]
    main(["convert", *options[:2], *options[-4:]])
    student = load_model(tmp_path / "out")
    main(["stage3", *options, "--all-tokens"])
    data = Data(
        Recipe.load(str(recipe)), places([]), load_tokenizer(BUNDLED_DIR), student.config, workers=0,
        processes=Processes(),
    )  # fmt: skip
    stream = data.batches("text", "stage3")
    assert stream is not None
    batch = next(stream)
    length = int(batch.loss_mask[0].nonzero().max()) + 1
    with torch.no_grad():
        logits = (model(batch.input_ids[:, :length]) for model in (student, load_model(teacher)))
        wanted = float(token_kl(*logits).sum())
    assert log_of(tmp_path)[0]["text_kl"] == pytest.approx(wanted, rel=0.02), "training computes in bf16"


@pytest.mark.usefixtures("tiny")
def test_what_the_steps_refuse(tmp_path: Path) -> None:
    teacher = save_tiny_teacher(tmp_path / "teacher")
    recipe = tiny_recipe(tmp_path)
    options = [*common(tmp_path, recipe), "--teacher", str(teacher), "--out", str(tmp_path / "out")]
    with pytest.raises(
        ValueError, match=r"stage2 starts from what stage1 leaves, and .*stage1.safetensors is not there"
    ):
        main(["stage2", *options])
    with pytest.raises(ValueError, match=r"stages holds no finished stage; run `python -m distill convert`"):
        main(["export", *options[:2], *options[-4:]])
    main(["convert", *options[:2], *options[-4:]])
    hybrid = tiny_recipe(tmp_path, name="other", softmax_layers=[0])
    with pytest.raises(
        ValueError, match=r"made by another recipe: recipe is 'other', was 'tiny', softmax_layers is \[0\]"
    ):
        main(["stage1", *common(tmp_path, hybrid), *options[-4:]])
    deeper = tiny_recipe(tmp_path, name="deeper", softmax_layers=[4])
    with pytest.raises(ValueError, match=r"softmax_layers \[4\] do not exist; the teacher has layers 0 to 3"):
        main(["convert", "--recipe", str(deeper), *options[-4:]])
    silent = tiny_recipe(tmp_path, name="tiny", text_sources={})
    with pytest.raises(
        ValueError, match=r"recipe tiny has no text_sources, and stage1 takes text_batch=1 rows of them"
    ):
        main(["stage1", *common(tmp_path, silent), *options[-4:]])
    tiny_recipe(tmp_path)
    large = tiny_recipe(tmp_path, name="large", shape={"num_layers": 32, "hidden_size": 32})
    with pytest.raises(ValueError, match=r"the teacher does not fit the recipe: it has num_layers=4, not 32; take"):
        main(["run", *common(tmp_path, large), *options[-4:]])
    short = tiny_recipe(tmp_path, name="short", stages={"stage1": STAGE})
    with pytest.raises(ValueError, match=r"recipe short has no teacher; it has stage1"):
        main(["teacher", *common(tmp_path, short), *options[-2:]])
    with pytest.raises(ValueError, match=r"recipe short trains no teacher; pass one with --teacher"):
        main(["run", *common(tmp_path, short), *options[-2:]])
    with pytest.raises(ValueError, match="--shard spreads the weights over several processes, and there is one"):
        main(["stage1", *options, "--shard"])
    with pytest.raises(ValueError, match='layers "written-out" cannot run on cpu'):
        main(["stage1", *options, "--layers", "written-out"])
    with pytest.raises(ValueError, match=r"the model is a linear student; pass its teacher"):
        main(["convert", "--recipe", str(recipe), "--teacher", str(tmp_path / "out"), "--out", str(tmp_path / "x")])


@pytest.mark.usefixtures("tiny")
def test_data_by_name(tmp_path: Path) -> None:
    teacher = save_tiny_teacher(tmp_path / "teacher")
    own = tmp_path / "my talk.jsonl"
    turns = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Good day."}]
    own.write_text(
        "".join(json.dumps({"messages": [turns[0] | {"content": f"{i}?"}, turns[1]]}) + "\n" for i in range(9))
    )
    recipe = tiny_recipe(tmp_path, text_sources={"talk": 1})
    options = [*common(tmp_path, recipe), "--teacher", str(teacher), "--out", str(tmp_path / "out")]
    main(["convert", *options[:2], *options[-4:]])
    with pytest.raises(ValueError, match='source "talk" is neither'):
        main(["stage1", *options])
    with pytest.raises(
        ValueError, match=r"--data names walk; it takes text, .*photos.*, or a source of recipe tiny: shapes, talk"
    ):
        main(["stage1", *options, "--data", f"walk={own}"])
    with pytest.raises(ValueError, match='--data "photos" is no NAME=PATH'):
        main(["stage1", *options, "--data", "photos"])
    main(["stage1", *options, "--data", f"talk={own}"])
    assert load_file(tmp_path / "out" / "stages" / "stage1.safetensors")


def test_every_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    for name in COMMANDS:
        with pytest.raises(SystemExit) as done:
            main([name, "--help"])
        assert done.value.code == 0
        said = capsys.readouterr().out
        assert f"python -m distill {name}" in said


def test_errors_are_sentences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        sys, "argv", ["distill", "convert", "--recipe", "nothing", "--teacher", "x", "--out", str(tmp_path)]
    )
    assert cli() == 1
    assert capsys.readouterr().err.startswith('distill: no recipe "nothing"; there are ')


@pytest.mark.usefixtures("tiny")
def test_a_killed_command_goes_on_with_the_next_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = save_tiny_teacher(tmp_path / "teacher")
    recipe = tiny_recipe(tmp_path, stage={"steps": 3, "save_steps": 1, "accumulate": 2, "warmup": 0.0})
    options = [*common(tmp_path, recipe), "--eval-count", "0", "--teacher", str(teacher), "--out"]
    made = Mixture.batch
    numbers: list[int] = []

    def noted(self: Mixture, number: int) -> Batch:
        if fatal and number == 5:
            raise KeyError("killed")
        numbers.append(number)
        return made(self, number)

    monkeypatch.setattr(Mixture, "batch", noted)
    for out, fatal in (("unbroken", False), ("killed", True), ("killed", False)):
        main(["convert", "--recipe", str(recipe), "--teacher", str(teacher), "--out", str(tmp_path / out)])
        numbers.clear()
        if fatal:
            with pytest.raises(KeyError):
                main(["stage1", *options, str(tmp_path / out)])
        else:
            main(["stage1", *options, str(tmp_path / out)])
    assert numbers == [4, 4, 5, 5], "batches of the step that was lost, of pictures and of text, and no others"
    kept = [load_file(tmp_path / out / "stages" / "stage1.safetensors") for out in ("unbroken", "killed")]
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])
    assert not (tmp_path / "killed" / "stages" / "stage1").exists(), "checkpoints of a finished stage were left"


def test_ctrl_c_in_a_terminal_is_a_sentence_and_the_same_command_goes_on(tmp_path: Path) -> None:
    """As a terminal does it: the signal reaches the command and the processes that make its batches."""
    teacher = save_tiny_teacher(tmp_path / "teacher")
    stage = STAGE | {"steps": 60, "save_steps": 0}
    recipe = tiny_recipe(tmp_path, image_sources={"shapes": 1}, stages={"stage1": stage})
    main(["convert", "--recipe", str(recipe), "--teacher", str(teacher), "--out", str(tmp_path / "out")])
    options = [*common(tmp_path, recipe), "--eval-count", "0", "--teacher", str(teacher)]
    command = [sys.executable, "-m", "distill", "stage1", *options, "--workers", "1", "--out", str(tmp_path / "out")]
    # A shell has what it runs in the background ignore Ctrl-C, and so would what it starts.
    program = (
        "import os, signal, sys; signal.signal(2, signal.default_int_handler); os.execv(sys.argv[1], sys.argv[1:])"
    )
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    running = subprocess.Popen(
        [sys.executable, "-c", program, *command],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        log, deadline = tmp_path / "log.jsonl", time.monotonic() + 100
        while not log.is_file() and running.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        os.killpg(running.pid, signal.SIGINT)
        said, errors = running.communicate(timeout=100)
    finally:
        running.kill()
    assert running.returncode == 130, said + errors
    assert "Traceback" not in errors
    assert re.search(r"distill: stage1 stopped after step \d+, kept in .*; the same command goes on from there", errors)
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert "stage1: going on from step" in done.stdout
    assert (tmp_path / "out" / "stages" / "stage1.safetensors").is_file()


def options_of_ours() -> set[str]:
    commands = next(a for a in _parser()._actions if hasattr(a, "choices") and a.choices)
    assert isinstance(commands.choices, dict)
    return {
        o for sub in commands.choices.values() for a in sub._actions for o in a.option_strings if o.startswith("--")
    }


def test_launchers_do_not_stumble_over_our_options() -> None:
    """torchrun and accelerate parse a script's options too, and refuse what may be short for several of theirs."""
    from accelerate.commands.launch import launch_command_parser
    from torch.distributed.run import get_args_parser

    for launcher in (get_args_parser(), launch_command_parser()):
        theirs = {o: a for a in launcher._actions for o in a.option_strings}
        for option in options_of_ours():
            begun = {id(a) for o, a in theirs.items() if o.startswith(option)}
            assert option in theirs or len(begun) < 2, f"{launcher.prog} cannot tell what {option} means"


def test_under_accelerate(tmp_path: Path) -> None:
    """The command that docs/distill.md gives for large teachers, in its smallest form."""
    teacher = save_tiny_teacher(tmp_path / "teacher")
    recipe = tiny_recipe(tmp_path, image_sources={"shapes": 1}, stages={"stage1": STAGE | {"steps": 1}})
    main(["convert", "--recipe", str(recipe), "--teacher", str(teacher), "--out", str(tmp_path / "out")])
    words = "--use_fsdp --fsdp_version 2 --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    command = ["-m", "distill", "stage1", *common(tmp_path, recipe), "--teacher", str(teacher), "--eval-count", "0"]
    log, port = tmp_path / "launched.txt", ["--main_process_port", str(free_port())]
    codes = wait_for_hosts([launch([*words.split(), *port, *command, "--out", str(tmp_path / "out")], log)])
    assert codes == [0], log.read_text()[-5000:]
    assert (tmp_path / "out" / "stages" / "stage1.safetensors").is_file()
    assert len(log_of(tmp_path)) == 1, "the second process wrote too"
