"""Every command that the pages on distillation give: launchers and commands know all of its options, and it can run."""

from __future__ import annotations

import re
import shlex
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.distill import build_parser as bench_parser
from distill.__main__ import _parser, main
from distill.config import Recipe
from distill.data.build import build_parser as data_parser
from distill.data.fonts_pack import main as fonts_main
from distill.data.icons_pack import main as icons_main
from distill.data.photos_pack import main as photos_main
from distill.sample_text import build_parser as sample_parser
from mmmamba.cli import build_parser as chat_parser
from tests.launching import WORKERS_DONE, free_port, launch, wait_for_hosts
from tests.test_distill_cli import STAGE, common, log_of, tiny_recipe
from tests.training import save_tiny_teacher

ROOT = Path(__file__).parents[1]
PAGES = ("docs/distill.md", "distill/data/README.md", "checkpoints/nano/README.md")
PARSERS: dict[str, Any] = {
    "distill": _parser,
    "distill.data.build": data_parser,
    "distill.sample_text": sample_parser,
    "benchmarks.distill": bench_parser,
    "mmmamba": chat_parser,
}
PACKERS = {"icons": icons_main, "fonts": fonts_main, "photos": photos_main}
# Options that every command of a page takes for granted where it says "...".
REST = ["--tokenizer", "TEACHER"]


def commands(page: str) -> list[list[str]]:
    """Commands of a page, in blocks and in the text, as lists of words."""
    text = (ROOT / page).read_text(encoding="utf-8")
    fenced = [body for language, body in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S) if not language]
    indented = re.findall(r"(?:^    .*\n)+", text, re.MULTILINE)
    blocks = [block for block in (*fenced, *indented) if not block.lstrip().startswith("{")]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    lines += [" ".join(found.split()) for found in re.findall(r"`([^`]+)`", prose)]
    starts = ("python -m ", "accelerate launch ", "torchrun ")
    return [shlex.split(line) for line in lines if line.strip().startswith(starts)]


def script_of(words: list[str]) -> tuple[Namespace | None, str, list[str]]:
    """What the launcher understood (None without one), the module that it starts, and the module's own words."""
    if words[:2] == ["python", "-m"]:
        return None, words[2], words[3:]
    if words[0] == "accelerate":
        from accelerate.commands.launch import launch_command_parser as parser
    else:
        from torch.distributed.run import get_args_parser as parser
    args = parser().parse_args(words[2:] if words[0] == "accelerate" else words[1:])
    return args, args.training_script, args.training_script_args


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_understood(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [words for words in commands(page) if "-m" in words]
    assert len(found) >= {"docs/distill.md": 12, "distill/data/README.md": 4, "checkpoints/nano/README.md": 1}[page]
    packers = {f"distill.data.{name}_pack": main for name, main in PACKERS.items()}
    for words in found:
        launcher, module, own = script_of(words)
        if launcher is not None:
            assert launcher.module, f"{words}: starts a file"
        if own == []:  # named, not given
            assert module in {"distill", *PARSERS, *packers} or Path(ROOT, module).exists(), words
        elif module in packers:
            # These parse and work at once: nothing is where the page says, which they tell in a sentence of their own.
            monkeypatch.chdir(tmp_path)
            assert packers[module](own) == 1, words
        else:
            given = ["FOLDER" if word == "FOLDER..." else word for word in own if word != "..."]
            needs = _needs(module, own)
            PARSERS[module]().parse_args([*given, *needs])


def _needs(module: str, own: list[str]) -> list[str]:
    """What a command needs that a page leaves out: after "...", or where it only names the command."""
    if module != "distill" or ("..." not in own and own != ["eval"]):
        return []
    if own[0] == "eval":
        return ["MODEL", *REST]
    return [word for option in ("--out", "--tokenizer") if option not in own for word in (option, "FOLDER")]


def test_launchers_agree_to_what_the_page_asks() -> None:
    """`accelerate` holds its options against each other only when it starts; here for every kind of machine."""
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils import prepare_multi_gpu_env

    launched = [words for words in commands("docs/distill.md") if words[0] == "accelerate"]
    kinds = set()
    for words in launched:
        args = launch_command_parser().parse_args(words[2:])
        assert not (args.multi_gpu and args.use_fsdp)
        assert (args.mixed_precision, args.dynamo_backend) == ("no", "no"), "left open, the launcher asks or warns"
        assert args.num_processes % args.num_machines == 0
        kinds.add((args.num_processes > 1, args.num_machines > 1, args.use_fsdp))
        if args.num_processes > 1:
            env = prepare_multi_gpu_env(args)
            assert env["ACCELERATE_MIXED_PRECISION"] == "no"
            assert (env.get("ACCELERATE_USE_FSDP") == "true") == args.use_fsdp
        if args.num_machines > 1:
            assert args.main_process_ip
            assert args.main_process_port
    assert kinds >= {
        (False, False, False),
        (True, False, False),
        (True, True, False),
        (True, False, True),
        (True, True, True),
    }


def test_the_recipe_of_the_page_can_be_read(tmp_path: Path) -> None:
    text = (ROOT / "docs/distill.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    path = tmp_path / "mine.yaml"
    path.write_text(block)
    recipe = Recipe.load(str(path))
    assert recipe.stages["stage1"].steps == 20_000
    assert yaml.safe_load(block)["softmax_layers"] == list(range(0, 32, 4)) == list(recipe.softmax_layers)


@pytest.mark.parametrize("spread", [False, True], ids=["whole", "fsdp"])
def test_several_hosts(spread: bool, tmp_path: Path) -> None:
    """The page's commands for two hosts, each with a rank of its own, here two on one machine without GPUs."""
    teacher = save_tiny_teacher(tmp_path / "teacher")
    recipe = tiny_recipe(tmp_path, image_sources={"shapes": 1}, stages={"stage1": STAGE | {"steps": 1}})
    main(["convert", "--recipe", str(recipe), "--teacher", str(teacher), "--out", str(tmp_path / "out")])
    launched = [w for w in commands("docs/distill.md") if w[0] == "accelerate" and "--num_machines 2" in " ".join(w)]
    (words,) = [w for w in launched if ("--use_fsdp" in w) == spread]
    port, started = str(free_port()), []
    logs = [tmp_path / f"host-{rank}.txt" for rank in range(2)]
    for rank, log in enumerate(logs):
        changed = {"--num_processes": "2", "--machine_rank": str(rank), "--main_process_ip": "127.0.0.1"}
        changed["--main_process_port"] = port
        own = words[2 : words.index("-m")]
        own = [changed.get(before, word) for before, word in zip(["", *own], own, strict=False)]
        command = ["-m", "distill", "stage1", *common(tmp_path, recipe), "--teacher", str(teacher)]
        started.append(launch([*own, *command, "--out", str(tmp_path / "out"), "--eval-count", "0"], log))
    codes = wait_for_hosts(started)
    said = [log.read_text() for log in logs]
    assert 0 in codes, "\n".join(text[-3000:] for text in said)
    for code, text in zip(codes, said, strict=True):
        assert code == 0 or (code is None and WORKERS_DONE in text), f"{code}\n{text[-5000:]}"
    assert (tmp_path / "out" / "stages" / "stage1.safetensors").is_file()
    assert len(log_of(tmp_path)) == 1, "the second host wrote too"
