"""Gather fonts in one small file, to take them to a training machine.

    python -m distill.data.fonts_pack OUT SRC...

SRC are folders that are looked through for font files, and for the licences that go with them: those of Debian's
font packages (/usr/share/fonts and /usr/share/doc) and node_modules with npm's @fontsource packages.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from distill.data.fonts import INDEX, FontKind

# What pages show; a face that lacks any of it is left out. The others are kept where they are there.
NEEDED = "".join(map(chr, range(32, 127))) + "£€"
CHARACTERS = NEEDED + "".join(map(chr, range(0xA1, 0x100))) + "ŒœŠšŽž–—‘’“”•…"

# A program that changes nothing, in bytecode: drop-out control as by default, a push and a pop.
_NO_HINTS = bytes((0xB8, 0x01, 0xFF, 0x85, 0xB0, 0x04, 0x8D, 0xB0, 0x00, 0x21))


class Family(NamedTuple):
    """files: names of the faces, without folder.

    package: of Debian, whose copyright file holds the licence; fonts from npm have theirs beside them.
    caps: small letters look like capitals.
    """

    name: str
    kind: FontKind
    licence: str
    package: str
    files: tuple[str, ...]
    held_out: bool = False
    caps: bool = False

    @property
    def npm(self) -> str:
        """The package of npm that holds it, or ""."""
        return "" if self.package else f"@fontsource/{_slug(self.name)}"


def _slug(name: str) -> str:
    return name.lower().replace(" ", "-")


def _npm(
    name: str,
    kind: FontKind,
    *weights: int,
    licence: str = "OFL-1.1",
    held_out: bool = False,
    caps: bool = False,
) -> Family:
    files = tuple(f"{_slug(name)}-latin-{weight}-normal.woff" for weight in weights or (400,))
    return Family(name, kind, licence, "", files, held_out, caps)


_OFL = "OFL-1.1"
FAMILIES = (
    Family("DejaVu Sans", "sans", "Bitstream-Vera", "fonts-dejavu-core", ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf")),
    Family(
        "Liberation Sans",
        "sans",
        _OFL,
        "fonts-liberation",
        ("LiberationSans-Regular.ttf", "LiberationSans-Bold.ttf", "LiberationSans-Italic.ttf"),
    ),
    Family("Noto Sans", "sans", _OFL, "fonts-noto-core", ("NotoSans-Regular.ttf", "NotoSans-Bold.ttf")),
    _npm("Roboto", "sans", 400, 700, licence=_OFL),
    _npm("Open Sans", "sans", 400, 700),
    Family("Lato", "sans", _OFL, "fonts-lato", ("Lato-Regular.ttf", "Lato-Black.ttf", "Lato-Light.ttf")),
    Family("Cantarell", "sans", _OFL, "fonts-cantarell", ("Cantarell-Regular.otf", "Cantarell-Bold.otf")),
    Family("Inter", "sans", _OFL, "fonts-inter", ("Inter-Regular.otf", "Inter-Bold.otf")),
    Family("Quicksand", "sans", _OFL, "fonts-quicksand", ("Quicksand-Regular.ttf", "Quicksand-Bold.ttf")),
    Family("Comfortaa", "sans", _OFL, "fonts-comfortaa", ("Comfortaa-Regular.ttf",)),
    Family("Dosis", "sans", _OFL, "fonts-dosis", ("Dosis-Medium.otf",)),
    Family("Cabin", "sans", _OFL, "fonts-cabin", ("Cabin-Regular.otf", "Cabin-Bold.otf"), True),
    Family("Carlito", "sans", _OFL, "fonts-crosextra-carlito", ("Carlito-Regular.ttf", "Carlito-Bold.ttf")),
    _npm("Montserrat", "sans", 400, 700, held_out=True),
    Family("League Spartan", "sans", _OFL, "fonts-league-spartan", ("LeagueSpartan-Bold.otf",)),
    Family("DejaVu Serif", "serif", "Bitstream-Vera", "fonts-dejavu-core", ("DejaVuSerif.ttf", "DejaVuSerif-Bold.ttf")),
    Family(
        "Liberation Serif",
        "serif",
        _OFL,
        "fonts-liberation",
        ("LiberationSerif-Regular.ttf", "LiberationSerif-Bold.ttf", "LiberationSerif-Italic.ttf"),
    ),
    Family("Noto Serif", "serif", _OFL, "fonts-noto-core", ("NotoSerif-Regular.ttf", "NotoSerif-Bold.ttf")),
    Family("Linux Libertine", "serif", _OFL, "fonts-linuxlibertine", ("LinLibertine_R.otf", "LinLibertine_RB.otf")),
    Family("EB Garamond", "serif", _OFL, "fonts-ebgaramond", ("EBGaramond12-Regular.otf",)),
    Family("Caladea", "serif", "Apache-2.0", "fonts-crosextra-caladea", ("Caladea-Regular.ttf", "Caladea-Bold.ttf")),
    Family("Vollkorn", "serif", _OFL, "fonts-vollkorn", ("Vollkorn-Regular.ttf", "Vollkorn-Bold.ttf"), True),
    Family("Gentium", "serif", _OFL, "fonts-sil-gentium", ("Gentium-R.ttf",)),
    Family("Roboto Slab", "serif", "Apache-2.0", "fonts-roboto-slab", ("RobotoSlab-Regular.otf",)),
    Family("STIX", "serif", _OFL, "fonts-stix", ("STIX-Regular.otf", "STIX-Bold.otf")),
    _npm("Merriweather", "serif", 400, 700),
    _npm("Playfair Display", "serif", 400, 700),
    Family("DejaVu Sans Mono", "mono", "Bitstream-Vera", "fonts-dejavu-core", ("DejaVuSansMono.ttf",)),
    Family("Liberation Mono", "mono", _OFL, "fonts-liberation", ("LiberationMono-Regular.ttf",)),
    _npm("Inconsolata", "mono", 400, 700),
    Family("JetBrains Mono", "mono", _OFL, "fonts-jetbrains-mono", ("JetBrainsMono-Regular.ttf",), True),
    _npm("Courier Prime", "mono", 400, 700),
    _npm("Bebas Neue", "display", caps=True),
    Family("Yanone Kaffeesatz", "display", _OFL, "fonts-yanone-kaffeesatz", ("YanoneKaffeesatz-Regular.otf",)),
    _npm("Oswald", "display", 400, 700, held_out=True),
    _npm("Anton", "display"),
    _npm("Abril Fatface", "display"),
    _npm("Righteous", "display"),
    _npm("Bangers", "display", caps=True),
    _npm("Press Start 2P", "display"),
    _npm("Special Elite", "display", licence="Apache-2.0"),
    _npm("Lobster", "display"),
    _npm("Dancing Script", "hand", 400, 700),
    Family("Comic Neue", "hand", _OFL, "fonts-comic-neue", ("ComicNeue-Regular.otf", "ComicNeue-Bold.otf")),
    Family("Kaushan Script", "hand", _OFL, "fonts-kaushanscript", ("KaushanScript-Regular.otf",)),
    _npm("Caveat", "hand", 400, 700),
    _npm("Indie Flower", "hand"),
    _npm("Pacifico", "hand"),
    _npm("Patrick Hand", "hand", held_out=True),
    _npm("Permanent Marker", "hand", licence="Apache-2.0", caps=True),
    _npm("Shadows Into Light", "hand"),
    _npm("Amatic SC", "hand", 700, caps=True),
    Family("Humor Sans", "hand", _OFL, "fonts-humor-sans", ("Humor-Sans.ttf",), caps=True),
)  # fmt: skip


def pack_fonts(out: Path, sources: Sequence[Path], *, max_mib: float | None = None) -> tuple[list[str], list[str]]:
    """Cut every known font down to Latin and write all, with their licences, to one file for `Fonts`.

    The file is a gzipped tar: fonts.json (family, kind, file, licence and copyright of each face), the faces as
    TrueType or OpenType files, and licences/NAME.txt. The same input gives the same bytes. Cutting a font down changes
    it, so before you publish a pack, mind the names that its licences reserve.

    Returns: the families that went in, and those of which no face or no licence was found.
    Raises: ValueError if fontTools is not installed, a folder is missing, nothing was found, or the file gets larger
        than `max_mib` (nothing is left behind then).
    """
    found = font_files(sources)
    members: dict[str, bytes] = {}
    records: list[dict[str, Any]] = []
    packed: list[str] = []
    for family in FAMILIES:
        slug = _slug(family.name)
        faces = [found[name] for name in family.files if name in found]
        licence = _licence(family, faces, found)
        if not faces or licence is None:
            continue
        for path in faces:
            data, facts = _cut(path)
            if facts is None:
                continue
            name = f"{slug}-{path.stem}{'.otf' if data[:4] == b'OTTO' else '.ttf'}"
            members[name] = data
            told = {"family": family.name, "kind": family.kind, "held_out": family.held_out, "caps": family.caps}
            records.append(told | {"file": name, "licence": family.licence} | facts)
        members[f"licences/{slug}.txt"] = licence
        packed.append(family.name)
    if not records:
        raise ValueError(f"none of the known fonts lies in {', '.join(map(str, sources))}; see distill/data/README.md")
    index = json.dumps({"fonts": records}, ensure_ascii=False, indent=1).encode()
    data = _tar({INDEX: index} | members)
    if max_mib is not None and len(data) > max_mib * 2**20:
        raise ValueError(f"the pack takes {len(data) / 2**20:.1f} MiB, more than {max_mib:g}; give fewer folders")
    out.write_bytes(data)
    return packed, [family.name for family in FAMILIES if family.name not in packed]


def font_files(sources: Sequence[Path]) -> dict[str, Path]:
    """Every font file by name, and every Debian copyright file as "PACKAGE/copyright"; what comes first stays."""
    found: dict[str, Path] = {}
    for folder in sources:
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder; give folders with fonts")
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() in (".ttf", ".otf", ".woff"):
                found.setdefault(path.name, path)
            elif path.name == "copyright":
                found.setdefault(f"{path.parent.name}/copyright", path)
    return found


def _licence(family: Family, faces: list[Path], found: dict[str, Path]) -> bytes | None:
    """The text of the licence: Debian's copyright file, or LICENSE in the npm package that holds the face."""
    places = [found.get(f"{family.package}/copyright")] if family.package else [f.parents[1] / "LICENSE" for f in faces]
    return next((place.read_bytes() for place in places if place is not None and place.is_file()), None)


def _cut(path: Path) -> tuple[bytes, dict[str, Any] | None]:
    """The face with `CHARACTERS` alone, uncompressed, and what to know of it (None if `NEEDED` is not there)."""
    try:
        from fontTools import subset
        from fontTools.pens.boundsPen import BoundsPen
        from fontTools.ttLib import newTable
        from fontTools.ttLib.tables.ttProgram import Program
    except ImportError as error:
        raise ValueError("packing fonts needs fontTools; pip install -r requirements-distill.txt") from error
    options = subset.Options()
    options.name_IDs = [0, 1, 2, 13, 14]  # copyright, family, face, licence and where it stands
    options.layout_features = ["kern"]
    options.hinting = False
    options.desubroutinize = True
    options.notdef_outline = True
    options.drop_tables += ["FFTM"]
    font = subset.load_font(str(path), options)
    letters = font.getBestCmap()
    if not all(ord(character) in letters for character in NEEDED):
        return b"", None
    subsetter = subset.Subsetter(options)
    subsetter.populate(text=CHARACTERS)
    subsetter.subset(font)
    pen = BoundsPen(font.getGlyphSet())
    pen.glyphSet[letters[ord("x")]].draw(pen)
    x_height = round(pen.bounds[3] / font["head"].unitsPerEm, 3)
    copyright_text = font["name"].getDebugName(0) or ""
    font.flavor = None
    if "glyf" in font:  # without a program FreeType would hint by itself, which takes three times as long
        font["prep"] = newTable("prep")
        font["prep"].program = Program()
        font["prep"].program.fromBytecode(_NO_HINTS)
        font["maxp"].maxStackElements = max(1, font["maxp"].maxStackElements)
    buffer = io.BytesIO()
    font.save(buffer, reorderTables=True)
    return buffer.getvalue(), {"x_height": x_height, "copyright": copyright_text}


def _tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with gzip.GzipFile("", "wb", fileobj=buffer, mtime=0) as gzipped, tarfile.open(fileobj=gzipped, mode="w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m distill.data.fonts_pack", description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="file to write, .tar.gz")
    parser.add_argument("sources", type=Path, nargs="+", metavar="SRC", help="folders with fonts and licences")
    parser.add_argument("--max-mib", type=float, default=10, help="fail if the file gets larger than this (default 10)")
    args = parser.parse_args(argv)
    try:
        packed, missing = pack_fonts(args.out, args.sources, max_mib=args.max_mib)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{len(packed)} families, {args.out.stat().st_size / 2**20:.1f} MiB: {args.out}")
    if missing:
        print(f"not found, or without a licence: {', '.join(missing)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
