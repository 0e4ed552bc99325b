"""Folders for files that the page makes (frames, opened pictures, downloads): gone after a day, or with the process."""

from __future__ import annotations

import atexit
import shutil
import tempfile
import time
from functools import cache
from pathlib import Path

KEEP_S = 24 * 3600


@cache
def _root() -> Path:
    root = Path(tempfile.mkdtemp(prefix="mmmamba-page-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root


def scratch_folder(what: str) -> Path:
    """A new folder; those that were made more than a day ago are removed."""
    for old in _root().iterdir():
        if old.stat().st_mtime < time.time() - KEEP_S:
            shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{what}-", dir=_root()))
