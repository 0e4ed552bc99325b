"""The snippets of docs/api.md, run as they stand there: only the address and the model's name are those of the test."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app.engine import Engine
from app.ui import PageOptions, build, launch_options

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:7860"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def url(tiny_dir: Path, tiny_teacher_dir: Path) -> Iterator[str]:
    engine = Engine(str(tiny_dir), "cpu", "float32")
    page = build(engine, PageOptions(teacher=str(tiny_teacher_dir)))
    page.launch(prevent_thread_lock=True, quiet=True, **launch_options(engine))
    yield page.local_url.rstrip("/")
    page.close(verbose=False)


@pytest.fixture
def at_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder that looks like the root of the repository and may be written to."""
    for name in ("app", "mmmamba", "quantize"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_python(url: str, at_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One after the other, as someone who reads the page would type them."""
    names: dict[str, object] = {}
    snippets = blocks("python")
    assert len(snippets) >= 5
    for snippet in snippets:
        assert "print(" in snippet
        exec(compile(snippet.replace(ADDRESS, url), "docs/api.md", "exec"), names)
        assert capsys.readouterr().out.strip(), f"printed nothing:\n{snippet}"
    assert names["again"]["metrics"]["resumed"]["turn"] == 1  # type: ignore[index]


def test_bash(url: str, at_root: Path, tiny_dir: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl")
    asked, answered = blocks("bash")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for snippet, model in ((asked, tiny_dir.name), (answered, str(tiny_dir))):
        script = snippet.replace(ADDRESS, url).replace("nano-linear", model)
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            env=os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        records = [json.loads(line) for line in done.stdout.splitlines()]
        assert all("error" not in record for record in records), done.stdout
    assert {record["id"] for record in records} == {"a", "b"}


def test_every_setting_and_field_is_described() -> None:
    from app.chat import Metrics
    from app.endpoints import SETTINGS
    from app.metrics import Figures
    from app.openai_request import SETTINGS as OPENAI
    from app.records import BenchmarkRecord, ChatRecord, CompareRecord, InfoRecord, SideRecord
    from mmmamba.sweep import Point

    names = {*SETTINGS, *OPENAI, *(f"metrics.{name}" for name in Metrics.__dataclass_fields__)}
    names |= {*Figures.__dataclass_fields__, *Point.__dataclass_fields__}
    for record in (BenchmarkRecord, ChatRecord, CompareRecord, InfoRecord, SideRecord):
        names |= set(record.__annotations__)
    missing = sorted(name for name in names - {"metrics"} if f"`{name}`" not in PAGE)
    assert not missing


def app_parser() -> tuple[argparse.ArgumentParser, Callable[[str], str]]:
    """The parser of app.py, and what it calls the variable of a flag."""
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("app_command", ROOT / "app.py")
    assert spec is not None
    assert spec.loader is not None
    command = module_from_spec(spec)
    spec.loader.exec_module(command)
    return command.parser(), command.variable


def test_variables_named_in_the_docs_exist() -> None:
    parser, variable = app_parser()
    known = {variable(action.dest) for action in parser._actions}
    named = set(re.findall(r"MMMAMBA_\w+", (ROOT / "docs" / "space.md").read_text(encoding="utf-8")))
    assert named
    assert named <= {name.replace("-", "_") for name in known}


def test_the_model_that_is_asked_is_the_one_that_answers() -> None:
    """The snippets are for a page that was started without a flag."""
    (asked,) = set(re.findall(r'"model": "([^"]+)"', "".join(blocks("bash"))))
    assert asked == app_parser()[0].get_default("model")
