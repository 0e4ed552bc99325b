"""Small stand-ins for the files that pictures of text are made from: a pack of fonts, statements of NLVR, archives."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

from distill.data.fonts import builtin_font


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_fonts(path: Path, *, held_out: bool = True) -> Path:
    """Pillow's own font as four families: one of them in capitals, two of them held out (or none)."""
    families = (("Plain", "sans", False), ("Pen", "hand", False), ("Kept", "sans", True), ("Kept Pen", "hand", True))
    records = [
        {
            "family": family,
            "kind": kind,
            "held_out": held and held_out,
            "caps": family == "Pen",
            "x_height": 0.53,
            "file": "font.ttf",
        }
        for family, kind, held in families
    ]
    index = json.dumps({"fonts": records}).encode()
    return write_tar(path, {"fonts.json": index, "font.ttf": builtin_font().data})


def statement(number: int, *, text: str = "There is a yellow square.", truth: str = "true", x: int = 0) -> dict:
    """A record of NLVR: a square of 20 in each box, the middle one yellow, `number` and `x` only moving things."""
    boxes = [
        [{"type": "square", "color": color, "x_loc": x, "y_loc": 10 + number % 60, "size": 20}]
        for color in ("Black", "Yellow", "#0099ff")
    ]
    return {"id": f"made_{number}", "sentence": text, "label": truth, "boxes": boxes}


def write_nlvr(folder: Path) -> Path:
    """The three files of NLVR with ten statements each, half of them true."""
    folder.mkdir(exist_ok=True)
    texts = {"true": "There is a yellow square.", "false": "there is a circle left of a Blue square"}
    for start, name in ((0, "dev"), (10, "test"), (20, "hidden")):
        lines = [
            json.dumps(statement(start + i, text=texts[truth], truth=truth))
            for i, truth in enumerate(("true", "false") * 5)
        ]
        (folder / f"nlvr_{name}.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    return folder


def write_whole_font(path: Path) -> None:
    """Pillow's font with the two signs for money that it lacks."""
    from fontTools.ttLib import TTFont

    font = TTFont(io.BytesIO(builtin_font().data))
    for table in font["cmap"].tables:
        if table.isUnicode():
            table.cmap |= {ord(sign): table.cmap[ord("E")] for sign in "£€"}
    font.save(path)
