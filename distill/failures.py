"""Wrong replies as small pictures and a page of Markdown, for a model card."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from distill.data.sample import Spelled
from distill.scores import Failure
from distill.tasks import ALTERNATIVES

PAGE = "failures.md"
_QUALITY = 80  # of lossy WebP: 2 to 10 KB a picture of 224 px


def write_failures(failures: Sequence[Failure], folder: Path) -> Path:
    """Write `TASK-NUMBER.webp` for each and a page that shows them; returns the page.

    Raises: OSError if something cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    numbers: Counter[str] = Counter()
    names = []
    for failure in failures:
        numbers[failure.task] += 1
        names.append(f"{failure.task}-{numbers[failure.task]}.webp")
        failure.question.image.save(folder / names[-1], quality=_QUALITY, method=6)
    page = folder / PAGE
    page.write_text(failures_table(failures, names), encoding="utf-8")
    return page


def failures_table(failures: Sequence[Failure], pictures: Sequence[str]) -> str:
    """A table in Markdown, a line a failure.

    Args:
        pictures: the address of each picture, as the page that holds the table sees it.
    """
    lines = ["| picture | task | question | right | reply |", "| --- | --- | --- | --- | --- |"]
    for failure, picture in zip(failures, pictures, strict=True):
        asked = failure.question
        right = asked.answer if isinstance(asked.answer, Spelled) else asked.answer.replace(ALTERNATIVES, " / ")
        cells = [f"![{failure.task}]({picture})", failure.task, *map(_cell, (asked.question, right, failure.reply))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """Text as it stands: what Markdown or HTML would read as theirs is escaped."""
    for sign in "\\`*_[]|<>&":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())
