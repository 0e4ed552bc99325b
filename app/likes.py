"""Thumbs up and down, kept in a file of the one who runs the server; only if that was switched on."""

from __future__ import annotations

import json
import threading
from datetime import UTC, datetime
from pathlib import Path

from app.backend import ModelInfo
from app.chat import Turn

KEPT = "Kept on this server: your thumb, the question and the answer, no picture."


class Likes:
    """Appends a JSON line for every thumb."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()

    def add(self, turn: Turn, liked: bool | None, info: ModelInfo | None) -> None:
        """`liked` None: it was taken back.  Raises: OSError if the file cannot be written."""
        record = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": None if info is None else info.name,
            "weights": None if info is None else info.weights,
            "liked": liked,
            "turn": len(turn.path),
            "question": turn.text,
            "images": len(turn.images),
            "answer": turn.reply,
        }
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
