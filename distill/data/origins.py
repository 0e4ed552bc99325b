"""Where data comes from: sources by public name and version, with the SHA-256 of what nano's files were made from."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from distill.data.fonts_pack import FAMILIES
from distill.data.icons_pack import NAMES_PACKAGE, STYLES

_FILE = Path(__file__).with_name("origins.json")
_CHUNK_BYTES = 2**20


class Package(NamedTuple):
    """A package of npm. version: that nano's files were made from.  sha256: of its files, see `tree_sha256`."""

    name: str
    version: str
    sha256: str

    @property
    def spec(self) -> str:
        return f"{self.name}@{self.version}"


class Text(NamedTuple):
    """A file of texts.

    sha256: of its lines, unpacked.  origin: who made it.
    left_out: beginnings of names, as published, of what was not in the copy that nano's file was made from.
    """

    name: str
    sha256: str
    lines: int
    licence: str
    origin: str
    left_out: tuple[str, ...] = ()


@cache
def _pins() -> dict[str, Any]:
    return json.loads(_FILE.read_text(encoding="utf-8"))


def icon_packages() -> list[Package]:
    """What `icons_pack` draws from."""
    names = [style.folder for style in STYLES.values()]
    return [_package(name) for name in (*names, NAMES_PACKAGE)]


def font_packages() -> list[Package]:
    """What `fonts_pack` takes from npm."""
    return [_package(family.npm) for family in FAMILIES if family.npm]


def _package(name: str) -> Package:
    return Package(name, *_pins()["npm"][name])


def debian_packages() -> list[str]:
    """What `fonts_pack` takes from Debian."""
    return list(dict.fromkeys(family.package for family in FAMILIES if family.package))


def faces() -> dict[str, str]:
    """SHA-256 of every font file, by name."""
    return _pins()["faces"]


def shards() -> dict[str, str]:
    """SHA-256 of every shard of photos, by name."""
    return _pins()["shards"]


def texts() -> list[Text]:
    return [
        Text(name, **facts | {"left_out": tuple(facts.get("left_out", ()))}) for name, facts in _pins()["texts"].items()
    ]


def file_sha256(path: Path) -> str:
    """Raises: OSError as reading does."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def tree_sha256(folder: Path) -> str:
    """Of the names and contents of all files in a folder, nested packages apart: the same wherever it was unpacked."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*"), key=lambda path: path.relative_to(folder).as_posix()):
        name = path.relative_to(folder)
        if path.is_file() and "node_modules" not in name.parts:
            digest.update(f"{name.as_posix()}\0{file_sha256(path)}\n".encode())
    return digest.hexdigest()
