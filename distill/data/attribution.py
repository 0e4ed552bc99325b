"""Who made the data and under which licence, as Markdown, read from the files themselves."""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distill.data.fonts import INDEX
from distill.data.origins import texts

PAGE = "ATTRIBUTION.md"


def attribution(*, photos: Path | None, icons: Path | None, fonts: Path | None, text: Path | None) -> str:
    """A table a kind of data, for those that are given; photos and fonts whose authors ask for it are named one by one.

    Args:
        photos: folder of shards, or one pack.  icons, fonts: packs.  text: folder.
    Raises: ValueError, OSError if a file is not what it should be.
    """
    parts = []
    if photos is not None:
        records = [record for shard in _tars(photos) for record in _records(shard)]
        parts.append(_counted("photos", records))
        if named := sorted({record["attribution"] for record in records if record.get("attribution")}):
            parts.append("Photos whose authors are to be named:\n\n" + "\n".join(f"- {one}" for one in named) + "\n")
    if icons is not None:
        parts.append(_counted("icons and flags", list(_records(icons)), "attribution"))
    if fonts is not None:
        parts.append(_fonts(fonts))
    if text is not None:
        lines = ["| texts | lines | licence | from |", "| --- | ---: | --- | --- |"]
        for one in texts():
            if (text / f"{one.name}.jsonl.gz").is_file():
                lines.append(f"| `{one.name}` | {one.lines:,} | {one.licence} | {one.origin} |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _tars(photos: Path) -> list[Path]:
    return sorted(photos.glob("*.tar")) if photos.is_dir() else [photos]


def _records(path: Path) -> Iterator[dict[str, Any]]:
    with tarfile.open(path) as tar:
        for member in tar:
            if member.name.endswith(".json") and (file := tar.extractfile(member)) is not None:
                yield json.load(file)


def _counted(what: str, records: list[dict[str, Any]], *more: str) -> str:
    counts = Counter(tuple(record.get(key, "") for key in ("source", "license", *more)) for record in records)
    lines = [f"| {' | '.join((what, 'number', 'licence', *more))} |", f"| --- | ---: |{' --- |' * (1 + len(more))}"]
    for (source, licence, *others), number in sorted(counts.items()):
        lines.append(f"| {' | '.join((source, f'{number:,}', licence, *others))} |")
    return "\n".join(lines) + "\n"


def _fonts(path: Path) -> str:
    with tarfile.open(path) as tar:
        index = tar.extractfile(INDEX)
        assert index is not None, "the pack has been checked"
        faces = json.load(index)["fonts"]
    by_family = {face["family"]: face for face in faces}
    lines = ["| font | licence | copyright |", "| --- | --- | --- |"]
    for family, face in by_family.items():
        told = " ".join(face["copyright"].split()).replace("|", "\\|")
        lines.append(f"| {family} | {face['licence']} | {told} |")
    return "\n".join(lines) + "\n\nThe licences in full are in the file of fonts.\n"
