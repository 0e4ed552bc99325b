"""A folder of this process for files that the page makes or is given. It is gone with the process, however that ends:
what a process that was killed left behind is removed by the next one."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO

KEEP_S = 24 * 3600
PREFIX = "mmmamba-files-"  # not that of earlier versions, which had no lock
LOCK = "lock"  # held open, and locked where the system can, as long as the process lives
NEW_S = 60  # a folder this young may be about to get its lock


def own_folder(what: str) -> Path:
    """A new folder that stays until the process ends."""
    return Path(tempfile.mkdtemp(prefix=f"{what}-", dir=_root()))


def scratch_folder(what: str) -> Path:
    """A new folder for what a visitor will not miss after a day; those that were made longer ago are removed."""
    daily = _root() / "daily"
    daily.mkdir(exist_ok=True)
    for old in daily.iterdir():
        with suppress(FileNotFoundError):  # another thread was quicker
            if old.stat().st_mtime < time.time() - KEEP_S:
                shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{what}-", dir=daily))


def use_own_uploads() -> None:
    """Have Gradio keep what is uploaded in a folder of this process, unless GRADIO_TEMP_DIR names another; to be called
    before anything of Gradio is built.

    Files lie there under names made from their content, and a page that ends deletes those that it was given: of two
    pages that share a folder, as they do by default, the first to end takes the pictures of the other along.
    """
    if not os.environ.get("GRADIO_TEMP_DIR"):
        os.environ["GRADIO_TEMP_DIR"] = str(own_folder("uploads"))


def still_used(files: Iterable[str | Path]) -> None:
    """Keep files of a conversation that goes on for another day. Those that are not the page's own are left alone."""
    ours = [_root(), *(Path(named) for named in [os.environ.get("GRADIO_TEMP_DIR")] if named)]
    for file in map(Path, files):
        if any(file.is_relative_to(folder) for folder in ours):
            with suppress(OSError):  # gone already, or read-only
                os.utime(file)
                os.utime(file.parent)


@cache
def _root() -> Path:
    remove_left_behind()
    root = Path(tempfile.mkdtemp(prefix=PREFIX))
    lock = (root / LOCK).open("w")
    _try_lock(lock)
    atexit.register(_end, root, lock)
    return root


def _end(root: Path, lock: IO[str]) -> None:
    lock.close()  # first: Windows removes no file that is open
    shutil.rmtree(root, ignore_errors=True)


def remove_left_behind() -> None:
    """Remove folders of processes that ended without doing so themselves."""
    for root in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):  # another user's, or gone meanwhile
            if time.time() - root.stat().st_mtime > NEW_S and _is_left(root / LOCK):
                shutil.rmtree(root, ignore_errors=True)


def _is_left(path: Path) -> bool:
    """Whether nobody holds the lock any more."""
    try:
        with path.open("r+") as lock:
            if os.name != "nt":
                return _try_lock(lock)
        path.unlink()  # fails where a process has it open
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _try_lock(file: IO[str]) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows: that the file is open is its lock
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
