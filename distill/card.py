"""What is measured in a model card: parts between two marks are replaced, all else stays as somebody wrote it.

    <!-- begin scores -->
    <!-- end scores -->

are the marks of the part "scores"; no reader sees them. See `PARTS` for the others.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from distill.checkpoints import write_bytes_whole
from distill.failures import PAGE
from distill.tables import scores_table

PARTS = ("scores", "failures", "training", "attribution")
FOLDER = "failures"  # beside the card: pictures of what went wrong

# Tasks as people say them; one that is not here has its own name in the table.
LABELS = {
    "shapes_count": "shapes: count them",
    "shapes_color": "shapes: colour",
    "shapes_shape": "shapes: kind",
    "shapes_exist": "shapes: is there one?",
    "shapes_relation": "shapes: relations, places",
    "shapes_compare": "shapes: more of which?",
    "shapes_describe": "shapes: describe all",
    "photos_label": "photos: name what is shown",
    "photo_facts": "photos: colour, brightness, format",
    "unknown_photos": "photos of things never taught",
    "icons_style": "icons in styles never trained on",
    "flags": "flags, drawn otherwise than in training",
    "unknown_icons": "icons of things never taught",
    "unknown_shapes": "shapes: what the picture does not show",
    "printed_text": "printed text, up to 4 words, 16 px and up",
    "printed_long": "printed text, 5 words and more",
    "charts_bar_pie": "bar and pie charts",
    "digits": "numbers and sums",
    "nlvr": "statements, true or false (NLVR)",
}


class Trained(NamedTuple):
    """A stage as it was trained: its optimizer steps, and the minutes by the clock from its first to its last."""

    stage: str
    steps: int
    minutes: float


def check_marks(card: Path, names: Iterable[str]) -> None:
    """Raises: ValueError if the marks of a part are not in the card, each once and in order."""
    text = card.read_text(encoding="utf-8")
    for name in names:
        begin, end = _marks(name)
        if (text.count(begin), text.count(end)) != (1, 1) or text.index(begin) > text.index(end):
            raise ValueError(
                f"{card} has no place for {name}: put the lines {begin} and {end}, each once and in this order, where "
                "it belongs"
            )


def fill_card(card: Path, parts: Mapping[str, str]) -> None:
    """Put new text between the marks of each part, and leave the rest of the card as it is.

    Args:
        parts: Markdown by the name of the part, one of `PARTS`.
    Raises: ValueError as `check_marks`; OSError as writing does. The card is then as it was.
    """
    check_marks(card, parts)
    text = card.read_text(encoding="utf-8")
    for name, content in parts.items():
        begin, end = _marks(name)
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n{content.strip()}\n{end}{rest.partition(end)[2]}"
    write_bytes_whole(card, text.encode())


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- begin {name} -->", f"<!-- end {name} -->"


def scores_part(reports: Mapping[str, dict[str, Any]]) -> str:
    """Tables of what `eval --out` wrote, by the name of the model, the teacher first; a second one if all replies were
    decoded.  Raises: ValueError as `tables.scores_table`."""
    parts = [
        "Share of held-out questions answered to the letter, greedily, in %:",
        scores_table(reports, labels=LABELS),
    ]
    if all(found["right"] is not None for report in reports.values() for found in report["tasks"].values()):
        parts += ["Right in these or other words, in %:", scores_table(reports, "right", labels=LABELS)]
    return "\n\n".join(part.strip() for part in parts)


def failures_part(folders: Mapping[str, Path], card: Path) -> str:
    """Tables of what `eval --failures` wrote, by the name of the model; the pictures are copied to FOLDER beside the
    card, in place of those of the same models that are there.

    Raises: ValueError if a folder holds no such page, or lacks a picture of it.
    """
    pages = {name: _page(folder) for name, folder in folders.items()}
    parts = []
    for name, (table, pictures) in pages.items():
        kept = card.parent / FOLDER / name
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir(parents=True)
        for picture in pictures:
            shutil.copyfile(folders[name] / picture, kept / picture)
            table = table.replace(f"]({picture})", f"]({FOLDER}/{name}/{picture})")
        parts.append(f"`{name}`:\n\n{table}" if len(pages) > 1 else table)
    return "\n\n".join(part.strip() for part in parts)


def _page(folder: Path) -> tuple[str, list[str]]:
    """The table of a folder and the pictures that it shows."""
    try:
        table = (folder / PAGE).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{folder} holds no {PAGE}; write it with `python -m distill eval --failures`") from error
    pictures = [line.partition("](")[2].partition(")")[0] for line in table.splitlines() if line.startswith("| ![")]
    if lacking := [picture for picture in pictures if not (folder / picture).is_file()]:
        raise ValueError(
            f"{folder} lacks {', '.join(lacking)}; write it again with `python -m distill eval --failures`"
        )
    return table, pictures


def read_log(path: Path) -> list[Trained]:
    """The stages of a run's log in order; a stage that was trained twice (from step 1 on) comes twice, and one that was
    resumed once.  Raises: ValueError if the file holds no line of a stage."""
    found: list[Trained] = []
    try:
        for text in path.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            if "step" not in line:
                continue  # scores
            trained = Trained(line["stage"], int(line["step"]), line["seconds"] / 60)
            if found and found[-1].stage == trained.stage and trained.steps > 1:
                found[-1] = trained
            else:
                found.append(trained)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error!r}); pass what `--log-file` named in training") from error
    if not found:
        raise ValueError(f"{path} holds no line of a stage; pass what `--log-file` named in training")
    return found


def training_part(logs: Mapping[str, Iterable[Trained]], gpus: int) -> str:
    """A table of steps and GPU minutes, by the name of the model.

    Args:
        gpus: cards that trained at the same time.
    """
    lines = ["| | stage | steps | GPU minutes |", "| --- | --- | ---: | ---: |"]
    total = 0.0
    for name, stages in logs.items():
        for trained in stages:
            minutes = trained.minutes * gpus
            total += minutes
            lines.append(f"| {name} | {trained.stage} | {trained.steps:,} | {minutes:.1f} |")
    lines.append(f"| **sum** | | | **{total:.1f}** |")
    return "\n".join(lines)


def named_paths(entries: Sequence[str]) -> dict[str, Path]:
    """NAME=PATH entries by name; without a name that of the file, without its ending.

    Raises: ValueError for a name that comes twice.
    """
    found: dict[str, Path] = {}
    for entry in entries:
        name, sign, path = entry.partition("=")
        name, path = (name, path) if sign else (Path(entry).stem, entry)
        if name in found:
            raise ValueError(
                f"{name} is there twice, {found[name]} and {path}; give them names of their own, NAME=PATH"
            )
        found[name] = Path(path)
    return found
