"""Files of the page: each process has its own, they go with it, and those of a process that was killed go later."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import httpx
import pytest
from gradio.route_utils import delete_files_created_by_app
from gradio_client import Client, handle_file

from app import scratch
from app.engine import Engine
from app.ui import EXAMPLES_DIR, PageOptions, build
from tests.fakes import FakeLoader
from tests.pages import app_process

SHAPES = EXAMPLES_DIR / "shapes.png"


def icons(url: str) -> list[str]:
    """Addresses of the pictures on the buttons."""
    parts = httpx.get(f"{url}/config").json()["components"]
    return [icon["url"] for part in parts if (icon := part["props"].get("icon")) and part["type"] == "button"]


def uploaded(url: str) -> str:
    """Upload a picture as a browser does, and have it shown; its address."""
    with SHAPES.open("rb") as file:
        (path,) = httpx.post(f"{url}/gradio_api/upload", files={"files": ("shapes.png", file)}).json()
    return f"{url}/gradio_api/file={path}"


def folders(tmp: Path) -> set[Path]:
    return set(tmp.glob(f"{scratch.PREFIX}*"))


def made_long_ago(folder: Path) -> None:
    os.utime(folder, (time.time() - 2 * scratch.NEW_S,) * 2)


def test_of_two_pages_the_first_to_end_leaves_the_other_its_pictures(tmp_path: Path, tiny_dir: Path) -> None:
    env = {"TMPDIR": str(tmp_path), "MMMAMBA_MODEL": str(tiny_dir), "MMMAMBA_NO_TEACHER": "1"}
    with app_process(**env) as stays:
        (mine,) = folders(tmp_path)
        shown = [*icons(stays.url), uploaded(stays.url)]
        assert len(shown) > 4
        with app_process(**env) as ends:
            (theirs,) = folders(tmp_path) - {mine}
            assert httpx.get(uploaded(ends.url)).status_code == 200
            client = Client(ends.url, download_files=False, verbose=False)
            question = {"text": "What is it?", "files": [handle_file(str(SHAPES))]}
            assert client.predict(question, api_name="/chat", max_new_tokens=4)["finish_reason"]
            assert ends.end(signal.SIGTERM) == 0, "what a container is stopped with is no fault"
        assert not theirs.exists()
        assert [httpx.get(address).status_code for address in shown] == [200] * len(shown)
        with app_process(**env) as killed:
            (left,) = folders(tmp_path) - {mine}
            killed.end(signal.SIGKILL)
        assert left.exists()
        made_long_ago(left)
        made_long_ago(mine)
        with app_process(**env):
            assert not left.exists(), "what a killed process left is removed by the next one"
            assert mine.exists()
        assert [httpx.get(address).status_code for address in shown] == [200] * len(shown)
    assert not folders(tmp_path)


def test_a_folder_that_the_user_names_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    scratch.use_own_uploads()
    assert os.environ["GRADIO_TEMP_DIR"] == str(tmp_path)
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    scratch.use_own_uploads()
    assert Path(os.environ["GRADIO_TEMP_DIR"]).is_dir()


def test_scratch_is_kept_a_day_and_longer_while_it_is_used() -> None:
    day_ago = (time.time() - scratch.KEEP_S - 60,) * 2
    unused, used, stays = scratch.scratch_folder("unused"), scratch.scratch_folder("used"), scratch.own_folder("stays")
    (used / "picture.png").touch()
    for path in (unused, used / "picture.png", used, stays):
        os.utime(path, day_ago)
    scratch.still_used([used / "picture.png"])
    scratch.scratch_folder("next")
    assert not unused.exists()
    assert (used / "picture.png").stat().st_mtime > day_ago[0] + 60
    assert stays.exists()


def test_files_of_others_are_not_touched(tmp_path: Path) -> None:
    file = tmp_path / "mine.png"
    file.touch()
    os.utime(file, (1e9, 1e9))
    scratch.still_used([file, tmp_path / "gone.png"])
    assert file.stat().st_mtime == 1e9


def test_pictures_on_buttons_outlive_a_day() -> None:
    """Gradio's sweep takes what is older than a day; here all that it may take."""
    demo = build(Engine("fake", loader=FakeLoader()), PageOptions(teacher="fake-teacher"))
    shown = [Path(icon["path"]) for block in demo.blocks.values() if (icon := getattr(block, "icon", None))]
    assert len(shown) > 4
    delete_files_created_by_app(demo, age=None)
    assert all(path.is_file() for path in shown)
