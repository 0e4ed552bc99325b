"""Statements about three boxes of shapes, true or false: Cornell's NLVR (Suhr et al. 2017), drawn anew.

People wrote the statements, typing errors included. The pictures are drawn from the records, for training with other
colours, mirrored, or with the boxes in another order, wherever the statement stays as true or false as it was.
"""

from __future__ import annotations

import difflib
import gzip
import itertools
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from distill.data.sample import QA, Sample, Split, casual, check_split, rng_for, sentence, yes_no
from distill.data.scene import RGB
from distill.data.shapes import NUMBERS

FILES: dict[Split, tuple[str, ...]] = {"train": ("nlvr_dev", "nlvr_test"), "val": ("nlvr_hidden",)}
SIZE_PX = 224
_BOX = 100  # the side of a box in the records' units
_COLORS = {"yellow": (250, 230, 0), "#0099ff": (0, 150, 255), "black": (0, 0, 0)}
_NAMES = {"#0099ff": "blue"}
_PLURALS = {"square": "squares", "circle": "circles", "triangle": "triangles"}
# The first letter is lost in some of the files' sentences.
_CUT = (("ll ", "All "), ("tleast ", "At least "), ("t least ", "At least "))
# Words that look like a colour and are none; anything else that nearly is one was mistyped, and keeps its colours.
_NO_COLORS = frozenset(("block", "blocks", "blccks", "below", "bellow"))


@dataclass(frozen=True, order=True)
class Item:
    """One shape: "square", "circle" or "triangle", "yellow", "blue" or "black"; place (upper left) and size of 100."""

    kind: str
    color: str
    x: float
    y: float
    size: float


@dataclass(frozen=True)
class Statement:
    """text: as typed.  boxes: what lies in each of the three."""

    text: str
    truth: bool
    boxes: tuple[tuple[Item, ...], ...]

    @property
    def picture(self) -> tuple[tuple[Item, ...], ...]:
        """What the picture shows, whatever the order in which it was noted."""
        return tuple(sorted(tuple(sorted(box)) for box in self.boxes))


def read_statements(path: Path) -> list[Statement]:
    """All statements of one file.  Raises: ValueError for a file or a line (with its number) that cannot be read."""
    try:
        lines = (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).splitlines()
    except (OSError, EOFError) as error:
        raise ValueError(f"{path} cannot be read ({error}); fetch it again") from error
    statements = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            boxes = tuple(tuple(_item(item) for item in box) for box in record["boxes"])
            truth = {"true": True, "false": False}[record["label"].lower()]
            text = " ".join(record["sentence"].split())
            text = next((whole + text.removeprefix(cut) for cut, whole in _CUT if text.startswith(cut)), text)
            statements.append(Statement(text, truth, boxes))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}, line {number}: no statement of NLVR ({error!r}); fetch the file again"
            ) from error
    return statements


def _item(record: dict[str, Any]) -> Item:
    color = record["color"].lower()
    if color not in _COLORS or record["type"] not in _PLURALS:
        raise ValueError(f"a {record['color']} {record['type']} is not known")
    return Item(record["type"], _NAMES.get(color, color), record["x_loc"], record["y_loc"], record["size"])


# -- the same in another way -------------------------------------------------------------------------------------------


def recolored(statement: Statement, order: Sequence[str]) -> Statement:
    """Yellow, blue and black become the colours of `order`, in picture and text."""
    swap = dict(zip(("yellow", "blue", "black"), order, strict=True))
    text = re.sub(r"\b(yellow|blue|black)\b", lambda m: _as(m[0], swap[m[0].lower()]), statement.text, flags=re.I)
    boxes = tuple(tuple(replace(item, color=swap[item.color]) for item in box) for box in statement.boxes)
    return replace(statement, text=text, boxes=boxes)


def _as(model: str, word: str) -> str:
    return word.capitalize() if model[0].isupper() else word


def mirrored(statement: Statement) -> Statement:
    """Left and right exchanged, in every box."""
    boxes = tuple(tuple(replace(i, x=_BOX - i.x - i.size) for i in box) for box in statement.boxes)
    return replace(statement, boxes=boxes)


def may_recolor(text: str) -> bool:
    """Whether every word for a colour is spelled so that it can be exchanged."""
    words = set(re.findall(r"[a-z]+", text.lower())) - {"yellow", "blue", "black"} - _NO_COLORS
    return not any(difflib.get_close_matches(word, ("yellow", "blue", "black"), n=1, cutoff=0.7) for word in words)


def may_mirror(text: str) -> bool:
    return not re.search(r"\b(left|right)", text, re.I)


# -- the source --------------------------------------------------------------------------------------------------------

_TRUE_FALSE = (
    "True or false: {}",
    "True or false? {}",
    "{} True or false?",
    "Is this true or false? {}",
    "{} Is that true or false?",
)
_YES_NO = (
    "Is this right? {}",
    "{} Is that right?",
    "Is the following correct? {}",
    "Is this statement true? {}",
    "Does this fit the picture? {}",
    "{} Right?",
    "Is it true? {}",
)


class Nlvr:
    """Statements with a picture each, true and false ones equally often; in training with a count or two. A `Source`.

    Held out is the file `nlvr_hidden`, and with it every picture of it, however it may come about.
    """

    name = "nlvr"

    def __init__(self, folders: str | Path | Sequence[str | Path], split: Split = "train") -> None:
        """
        Args:
            folders: where the files lie, or several folders to look through in order.
        Raises: ValueError for a missing or damaged file, or another split.
        """
        self.split = check_split(split)
        places = [Path(p) for p in ([folders] if isinstance(folders, str | Path) else folders)]
        hidden = [s for name in FILES["val"] for s in read_statements(_find(name, places))]
        self._hidden = {s.picture for s in hidden}
        if split == "train":
            read = [s for name in FILES[split] for s in read_statements(_find(name, places))]
            self.statements = [s for s in read if s.picture not in self._hidden]
        else:
            self.statements = hidden
        self._by_truth = [[s for s in self.statements if s.truth is truth] for truth in (False, True)]
        self._may_recolor = {s.text: may_recolor(s.text) for s in self.statements}
        if not all(self._by_truth):
            raise ValueError(f"{', '.join(map(str, places))}: the statements of NLVR lack true or false ones")

    def statement(self, seed: int, index: int, attempt: int = 0) -> tuple[Statement, Image.Image, tuple[QA, ...]]:
        """The statement, its picture and the questions behind `sample`."""
        rng = rng_for(self.name, self.split, seed, index, attempt)
        statement = rng.choice(self._by_truth[rng.random() < 0.5])
        turns = [ask(statement, rng)]
        if self.split == "train":
            changed = self._change(statement, rng)
            turns = [ask(changed, rng)]
            turns += [turn for _ in range(rng.choice((0, 1, 1, 2))) if (turn := ask_count(changed, rng)) is not None]
            statement = changed
            if rng.random() < 0.4:
                rng.shuffle(turns)
        image = draw_boxes(statement.boxes, rng)
        return statement, image, tuple((casual(rng, question), answer) for question, answer in dict(turns).items())

    def sample(self, seed: int, index: int, attempt: int = 0) -> Sample:
        _, image, turns = self.statement(seed, index, attempt)
        return Sample(image, turns, self.name)

    def question(self, number: int) -> tuple[Statement, Image.Image, QA]:
        """Statement `number`, from 0, as a question."""
        rng = rng_for(self.name, "question", number)
        statement = self.statements[number]
        question, answer = ask(statement, rng)
        return statement, draw_boxes(statement.boxes, rng), (casual(rng, question), answer)

    def _change(self, statement: Statement, rng: random.Random) -> Statement:
        """Another look of the same, never that of a held-out picture."""
        while True:
            changed = replace(statement, boxes=tuple(rng.sample(statement.boxes, len(statement.boxes))))
            if self._may_recolor[statement.text]:
                changed = recolored(changed, rng.choice(list(itertools.permutations(("yellow", "blue", "black")))))
            if may_mirror(statement.text) and rng.random() < 0.5:
                changed = mirrored(changed)
            if changed.picture not in self._hidden:
                return changed


def ask(statement: Statement, rng: random.Random) -> QA:
    """Is it true or false, is it right?"""
    said = sentence(statement.text)
    if rng.random() < 0.5:
        return rng.choice(_TRUE_FALSE).format(said), "True." if statement.truth else "False."
    return rng.choice(_YES_NO).format(said), yes_no(statement.truth)


def ask_count(statement: Statement, rng: random.Random) -> QA | None:
    """How many shapes of a kind, of a colour or of both are in the whole picture; None if there are too many."""
    kind = rng.choice((*_PLURALS, None))
    color = rng.choice(("yellow", "blue", "black", None) if kind else ("yellow", "blue", "black"))
    items = [item for box in statement.boxes for item in box]
    number = sum(kind in (None, item.kind) and color in (None, item.color) for item in items)
    if number >= len(NUMBERS):
        return None
    noun = " ".join(word for word in (color, _PLURALS[kind] if kind else "objects") if word)
    templates = ("How many {} are there in all three boxes?", "How many {} are there?", "Count the {}.", "How many {}?")
    return rng.choice(templates).format(noun), sentence(NUMBERS[number])


def _find(name: str, folders: Sequence[Path]) -> Path:
    for folder in folders:
        for ending in (".jsonl.gz", ".jsonl"):
            if (folder / f"{name}{ending}").is_file():
                return folder / f"{name}{ending}"
    places = ", ".join(map(str, folders)) or "no folder given"
    raise ValueError(f"{name}.jsonl.gz of NLVR is not in {places}; see distill/data/README.md")


# -- drawing -----------------------------------------------------------------------------------------------------------


def draw_boxes(boxes: tuple[tuple[Item, ...], ...], rng: random.Random) -> Image.Image:
    """The three boxes side by side, one above another, two over one, or side by side and drawn out to the square."""
    layout = rng.choice(("row", "row", "column", "corner", "corner", "stretched"))
    small, large, gap = 70, 106, 4
    if layout == "corner":
        places = [(gap, gap), (gap * 2 + large, gap), (gap if rng.random() < 0.5 else gap * 2 + large, gap * 2 + large)]
        wide = high = large
    else:
        offsets = [gap + i * (small + 3) for i in range(3)]
        across = rng.randint(gap, SIZE_PX - small - gap)
        places = [(across, o) if layout == "column" else (o, gap if layout == "stretched" else across) for o in offsets]
        wide, high = small, SIZE_PX - 2 * gap if layout == "stretched" else small
    paper: RGB = rng.choice(((255, 255, 255), (255, 255, 255), (245, 245, 240)))
    grey = rng.randint(196, 218)
    scale = 2  # drawn twice as large, for smooth edges
    image = Image.new("RGB", (SIZE_PX * scale, SIZE_PX * scale), paper)
    draw = ImageDraw.Draw(image)
    for (left, top), box in zip(places, boxes, strict=True):
        left, top, width, height = (v * scale for v in (left, top, wide, high))
        draw.rectangle((left, top, left + width, top + height), fill=(grey, grey, grey))
        for item in box:
            x, y = left + item.x * width / _BOX, top + item.y * height / _BOX
            corner = (x, y, x + item.size * width / _BOX, y + item.size * height / _BOX)
            _draw_item(draw, item, corner)
    return image.reduce(scale)


def _draw_item(draw: ImageDraw.ImageDraw, item: Item, box: tuple[float, float, float, float]) -> None:
    color = _COLORS["#0099ff" if item.color == "blue" else item.color]
    left, top, right, bottom = box
    if item.kind == "circle":
        draw.ellipse(box, fill=color)
    elif item.kind == "square":
        draw.rectangle(box, fill=color)
    else:
        draw.polygon(((left, bottom), ((left + right) / 2, top), (right, bottom)), fill=color)
