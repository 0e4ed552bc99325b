"""Texts as their authors publish them, to lines of JSON as `Conversations` and `Nlvr` read them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

_CALCULATOR = re.compile(r"<<[^<>]*>>")
_RESULT = "\n#### "  # what follows is the result once more, for a script to compare
_TOPICAL_PARTS = ("valid_freq", "valid_rare", "test_freq", "test_rare")


def originals(name: str) -> tuple[str, ...]:
    """The published files that a text is made from, in order; the last may stand for several (`*`)."""
    if name == "topical_chat":
        return tuple(f"conversations/{part}.json" for part in _TOPICAL_PARTS)
    dataset, _, part = name.partition("_")
    return {
        "gsm8k": (f"data/{part}.jsonl",),
        "nlvr": (f"{part}/{part}.json",),
        "sgd": (f"{part}/dialogues_*.json",),
    }[dataset]


def find_originals(name: str, folders: Sequence[Path]) -> list[Path]:
    """The published files of a text, wherever they lie in the first of the folders that has all of them; else []."""
    for folder in folders:
        found = [sorted(folder.rglob(pattern)) for pattern in originals(name)]
        if all(found):
            return [path for of_one in found for path in of_one]
    return []


def lines(name: str, files: Sequence[Path], *, left_out: tuple[str, ...] = ()) -> bytes:
    """The lines of a text.

    Args:
        left_out: what to pass over, by the beginning of its published name.
    Raises: ValueError if a file is not what the authors publish."""
    dataset, _, part = name.partition("_")
    make: Callable[[str, Path], Iterator[dict[str, Any]]] = _MAKERS[dataset]
    try:
        records = [record for path in files for record in make(part, path)]
        prefix = f"{dataset}_{part}_"
        records = [r for r in records if not left_out or not r["id"].removeprefix(prefix).startswith(left_out)]
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise ValueError(f"{', '.join(map(str, files[:3]))}: not as published ({error!r}); get {name} again") from error
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def _gsm8k(part: str, path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        problem = json.loads(line)
        answer = _CALCULATOR.sub("", problem["answer"].partition(_RESULT)[0])
        yield {"id": f"gsm8k_{number}", "messages": _messages([problem["question"], answer])}


def _nlvr(part: str, path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        told = json.loads(line)
        yield {
            "id": f"nlvr_{part}_{told['identifier']}",
            "sentence": told["sentence"],
            "label": told["label"],
            "boxes": told["structured_rep"],
        }


def _sgd(part: str, path: Path) -> Iterator[dict[str, Any]]:
    for dialogue in json.loads(path.read_text(encoding="utf-8")):
        said = [turn["utterance"] for turn in dialogue["turns"]]
        yield {
            "id": f"sgd_{part}_{dialogue['dialogue_id']}",
            "messages": _messages(said),
            "services": dialogue["services"],
        }


def _topical(part: str, path: Path) -> Iterator[dict[str, Any]]:
    for key, chat in json.loads(path.read_text(encoding="utf-8")).items():
        said = [" ".join(turn["message"].split()) for turn in chat["content"]]
        yield {
            "id": f"topical_{path.stem}_{key.removeprefix('t_')}",
            "messages": _messages(said),
            "rating": chat["conversation_rating"],
        }


def _messages(said: Sequence[str]) -> list[dict[str, str]]:
    """Two who speak in turn; the second is the assistant."""
    return [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(said)]


_MAKERS = {"gsm8k": _gsm8k, "nlvr": _nlvr, "sgd": _sgd, "topical": _topical}
