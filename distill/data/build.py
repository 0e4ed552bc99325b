"""All training data that nano needs, from its public sources, in one folder: `python -m distill.data.build data`.

    data/photos/SPLIT-NNNN.tar  data/text/NAME.jsonl.gz  data/icons.tar.gz  data/fonts.tar.gz  data/ATTRIBUTION.md

Packages come from npm and Debian, by name and version, unless a folder given with --from has them. Photos and texts are
read from such folders, as their authors publish them, or as shards and lines that were made before. What is read is
held against the SHA-256 of what nano was made from (`origins.json`); what is missing is named, with the way to get it.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from distill.checkpoints import write_bytes_whole, write_whole
from distill.data import origins
from distill.data.attribution import PAGE, attribution
from distill.data.fetch import fetch_debian, fetch_npm
from distill.data.fonts_pack import FAMILIES, font_files, pack_fonts
from distill.data.icons_pack import pack_icons
from distill.data.photo_origins import SETS, find_photos, missing_photos, write_shards
from distill.data.text_origins import find_originals, lines, originals

ICONS, FONTS, PHOTOS, TEXT = PARTS = ("icons", "fonts", "photos", "text")
SOURCES = "sources"  # in the folder of the data: what was fetched, so that a second call fetches nothing
_ICONS_MIB = 24
_FONTS_MIB = 10


class Builder:
    """Builds the parts of the data, one at a time.

    Args:
        out: the folder of the data.
        given: folders to look through before anything is fetched.
        offline: fetch nothing.
        any_version: take what differs from what nano was made from, and say so, in place of refusing it.
    """

    def __init__(
        self,
        out: Path,
        given: Sequence[Path] = (),
        *,
        offline: bool = False,
        any_version: bool = False,
        say: Callable[[str], object] = print,
    ) -> None:
        for folder in given:
            if not folder.is_dir():
                raise ValueError(f"--from {folder} is no folder")
        self.out, self.given, self.offline, self.any_version, self.say = out, list(given), offline, any_version, say
        self.node_modules = out / SOURCES / "node_modules"
        self.debian = out / SOURCES / "debian"

    def build(self, part: str) -> None:
        """Build one of `PARTS`.

        Raises: ValueError if sources are missing, differ or cannot be read, with what to do; OSError as writing does.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        {ICONS: self._icons, FONTS: self._fonts, PHOTOS: self._photos, TEXT: self._text}[part]()

    def attribute(self) -> Path:
        """Write the page of licences and attributions for what is in the folder; returns it."""
        paths = {
            PHOTOS: self.out / "photos",
            ICONS: self.out / "icons.tar.gz",
            FONTS: self.out / "fonts.tar.gz",
            TEXT: self.out / "text",
        }
        page = attribution(**{name: path if path.exists() else None for name, path in paths.items()})
        write_bytes_whole(self.out / PAGE, page.encode())
        return self.out / PAGE

    # -- packages --

    def _icons(self) -> None:
        packages = origins.icon_packages()
        places = self._packages(packages)
        with tempfile.TemporaryDirectory() as folder:
            for package in packages:  # side by side, wherever they lie
                link = Path(folder) / package.name
                link.parent.mkdir(exist_ok=True)
                link.symlink_to(places[package.name].resolve(), target_is_directory=True)
            path = self.out / "icons.tar.gz"
            number = pack_icons(Path(folder), path, max_mib=_ICONS_MIB)
        self._wrote(path, f"{number} icons and flags")

    def _packages(self, packages: Sequence[origins.Package]) -> dict[str, Path]:
        """Where each lies, fetched if need be."""
        if missing := [package for package in packages if self._place(package) is None]:
            self._fetch("npm packages", [package.spec for package in missing])
            fetch_npm(missing, self.node_modules)
        places = {package.name: place for package in packages if (place := self._place(package)) is not None}
        for package in packages:
            if origins.tree_sha256(places[package.name]) != package.sha256:
                self._differs(f"{places[package.name]} is not {package.spec} as nano was made from it")
        return places

    def _place(self, package: origins.Package) -> Path | None:
        roots = [root for folder in self.given for root in (folder, folder / "node_modules")]
        found = (root / package.name for root in (*roots, self.node_modules))
        return next((path for path in found if (path / "package.json").is_file()), None)

    def _fonts(self) -> None:
        found = font_files(self._font_folders())
        lacking = [family for family in FAMILIES if any(name not in found for name in family.files)]
        debian = list(dict.fromkeys(family.package for family in lacking if family.package))
        npm = [package for package in origins.font_packages() if package.name in {family.npm for family in lacking}]
        if lacking:
            self._fetch("packages of fonts", [*debian, *(package.spec for package in npm)])
            fetch_debian(debian, self.debian)
            fetch_npm(npm, self.node_modules)
            found = font_files(self._font_folders())
        for name, sha256 in origins.faces().items():
            if name not in found:
                self._differs(f"the packages of fonts hold no {name}")
            elif origins.file_sha256(found[name]) != sha256:
                self._differs(f"{found[name]} is not the version that nano was made from")
        path = self.out / "fonts.tar.gz"
        packed, _ = pack_fonts(path, self._font_folders(), max_mib=_FONTS_MIB)
        self._wrote(path, f"{len(packed)} families of fonts")

    def _font_folders(self) -> list[Path]:
        return [*self.given, *(folder for folder in (self.debian, self.node_modules) if folder.is_dir())]

    def _fetch(self, what: str, names: Sequence[str]) -> None:
        if self.offline:
            raise ValueError(f"missing {what}: {' '.join(names)}; leave out --offline, or give a folder with --from")
        self.say(f"fetching {what}: {' '.join(names)}")

    # -- files --

    def _photos(self) -> None:
        out, pinned = self.out / "photos", origins.shards()
        for folder in [root for given in self.given for root in (given, given / "photos")]:
            if all((folder / name).is_file() for name in pinned):
                for name, sha256 in pinned.items():
                    if origins.file_sha256(folder / name) != sha256:
                        self._differs(f"{folder / name} is not the shard that nano was made from")
                    _copy(folder / name, out / name)
                self._wrote(out, f"{len(pinned)} shards of photos")
                return
        found = find_photos(self.given)
        if missing := missing_photos(found):
            told = [f"{number:,} of {SETS[name][0]} ({SETS[name][1]})" for name, number in missing.items()]
            raise ValueError(
                f"missing photos: {', '.join(told)}; get the sets from their authors, unpack them and give the folders "
                "with --from"
            )
        self._wrote(out, f"{write_shards(found, out):,} photos, made anew: the same pictures in other bytes")

    def _text(self) -> None:
        missing = []
        for text in origins.texts():
            content = self._lines(text)
            if content is None:
                missing.append(f"{text.name}, from {text.origin}: {' '.join(originals(text.name))}")
                continue
            if hashlib.sha256(content).hexdigest() != text.sha256:
                number = content.count(b"\n")
                self._differs(f"{text.name} has {number:,} lines and is not the text of {text.lines:,} that nano read")
            buffer = io.BytesIO()
            with gzip.GzipFile("", "wb", fileobj=buffer, mtime=0) as file:
                file.write(content)
            path = self.out / "text" / f"{text.name}.jsonl.gz"
            write_bytes_whole(path, buffer.getvalue())
            self._wrote(path, f"{content.count(10):,} lines")
        if missing:
            raise ValueError(
                f"missing texts: {'; '.join(missing)}; get them from their authors, and give the folders with --from"
            )

    def _lines(self, text: origins.Text) -> bytes | None:
        """A text that was made before, or is made from what its authors publish."""
        for folder in [root for given in self.given for root in (given, given / "text")]:
            if (path := folder / f"{text.name}.jsonl.gz").is_file():
                return gzip.decompress(path.read_bytes())
            if (path := folder / f"{text.name}.jsonl").is_file():
                return path.read_bytes()
        files = find_originals(text.name, self.given)
        return lines(text.name, files, left_out=text.left_out) if files else None

    def _differs(self, what: str) -> None:
        if not self.any_version:
            raise ValueError(f"{what}; get that one, or take this with --any-version")
        self.say(f"note: {what}")

    def _wrote(self, path: Path, what: str) -> None:
        size = sum(f.stat().st_size for f in path.rglob("*")) if path.is_dir() else path.stat().st_size
        self.say(f"{path}: {what}, {size / 2**20:.1f} MiB")


def _copy(source: Path, target: Path) -> None:
    """Raises: OSError naming the file; it is there whole, or as it was."""
    if target.exists() and target.samefile(source):
        return
    with source.open("rb") as file:
        write_whole(target, lambda out: shutil.copyfileobj(file, out))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m distill.data.build",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the data")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument(
        "--from", dest="given", type=Path, nargs="+", default=[], metavar="DIR", help="folders that hold sources"
    )
    parser.add_argument("--offline", action="store_true", help="fetch nothing; say what is missing")
    parser.add_argument("--any-version", action="store_true", help="take sources that differ from nano's, and say so")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    failed = 0
    try:
        builder = Builder(args.out, args.given, offline=args.offline, any_version=args.any_version)
        for part in args.only:
            try:
                builder.build(part)
            except ValueError as error:
                print(f"{part}: {error}", file=sys.stderr)
                failed += 1
        print(builder.attribute())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
