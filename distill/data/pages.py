"""Pages of text: what is printed on them, and the printing. Seven kinds, from a single word to a form.

Every page fits the picture, and no letter is smaller than asked for. What a question may ask for stands in the page's
fields, so an answer never has to be read back from pixels.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from PIL import Image

from distill.data.fonts import Font
from distill.data.sheet import LINE, Box, Sheet, baseline, blank_sheet, ink_on, pale, pick_size, room, strong, worn
from distill.data.words import Words

PageKind = Literal["words", "lines", "sign", "name tag", "receipt", "table", "form"]
SIZE_PX = 224
_MARGIN = 6


@dataclass(frozen=True)
class Page:
    """What a picture shows.

    lines: all that is printed, from top to bottom; the cells of a row are joined by spaces.
    fields: of a receipt (item, price), of a form (label, value or "" where it was left blank), of a name tag ("name",
        name); prices with their sign, as printed.
    table: its rows, the header first. title: a receipt's shop. total: a receipt's sum.
    boxes: every text that was written, with the pixels that it covers.
    """

    kind: PageKind
    image: Image.Image
    lines: tuple[str, ...]
    boxes: tuple[tuple[str, Box], ...]
    fields: tuple[tuple[str, str], ...] = ()
    table: tuple[tuple[str, ...], ...] = ()
    title: str = ""
    total: str = ""

    @property
    def text(self) -> str:
        return " ".join(self.lines)


@dataclass(frozen=True)
class Press:
    """What pages are made with: words and faces of one split, and the smallest size of letters."""

    words: Words
    faces: list[Font]
    min_px: int

    def face(self, rng: random.Random, *kinds: str) -> Font:
        """A face, of these kinds if there are any."""
        fitting = [face for face in self.faces if face.kind in kinds]
        return rng.choice(fitting or self.faces)


# Each function below returns a page, or None where what it drew does not fit.


def make_words(rng: random.Random, press: Press) -> Page | None:
    """One to four words, in one to three lines, anywhere, sometimes at an angle."""
    font = press.face(rng)
    texts = [_cased(press.words.word(rng), rng) for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4)))]
    per_line = len(texts) if rng.random() < 0.4 else rng.randint(1, len(texts))
    lines = [" ".join(texts[i : i + per_line]) for i in range(0, len(texts), per_line)]
    return _print_block("words", rng, press, font, lines, angle=rng.uniform(-14, 14) if rng.random() < 0.15 else 0.0)


def make_lines(rng: random.Random, press: Press) -> Page | None:
    """Two to five lines of one to four words, as on a note."""
    font = press.face(rng)
    case: Callable[[str], str] = rng.choice((str, str, str.upper))
    lines = []
    for _ in range(rng.choice((2, 2, 3, 3, 4, 5))):
        lines.append(case(" ".join(press.words.word(rng) for _ in range(rng.choice((1, 2, 2, 3, 4))))))
        if rng.random() < 0.6:
            lines[-1] = lines[-1][0].upper() + lines[-1][1:]
    return _print_block("lines", rng, press, font, lines, largest=30)


def _print_block(
    kind: PageKind,
    rng: random.Random,
    press: Press,
    font: Font,
    lines: list[str],
    *,
    angle: float = 0.0,
    largest: int = 72,
) -> Page | None:
    lines = [line.upper() if font.caps else line for line in lines]
    inner = SIZE_PX - 2 * _MARGIN
    limit = min(largest, room(font, lines, inner, inner))
    if limit < press.min_px:
        return None
    face = font.at(pick_size(rng, press.min_px, limit))
    sheet, background = blank_sheet(rng, SIZE_PX)
    width, height = max(face.getlength(line) for line in lines), face.size * LINE * len(lines)
    if angle:
        left, top = (SIZE_PX - width) / 2, (SIZE_PX - height) / 2
    else:
        left, top = (rng.uniform(_MARGIN, max(_MARGIN, SIZE_PX - _MARGIN - extent)) for extent in (width, height))
    anchor = rng.choice(("ls", "ms", "ms", "rs"))
    x = left + {"l": 0.0, "m": width / 2, "r": width}[anchor[0]]
    ink = ink_on(background, rng)
    placed = [(line, x, baseline(top, face.size, i)) for i, line in enumerate(lines)]
    if angle:
        sheet.write_turned(placed, face, ink, anchor, angle)
    else:
        for line, line_x, y in placed:
            sheet.write(line, line_x, y, face, ink, anchor)
    return _page(kind, sheet, rng, lines)


def make_sign(rng: random.Random, press: Press) -> Page | None:
    """A panel in a strong colour with a few words, mostly capitals."""
    font = press.face(rng, "sans", "sans", "serif", "display")
    if rng.random() < min(0.6, len(press.words.signs) / 100):  # few are held out, and they would come all the time
        text = rng.choice(press.words.signs)
    else:
        text = " ".join(press.words.word(rng) for _ in range(rng.choice((1, 2, 2, 3))))
    text = text.title() if rng.random() < 0.2 else text.upper()
    words = text.split()
    per_line = rng.randint(1, len(words)) if len(words) < 4 else 2
    lines = [" ".join(words[i : i + per_line]) for i in range(0, len(words), per_line)]
    lines = [line.upper() if font.caps else line for line in lines]
    shape = rng.choice(("rectangle", "rounded", "rounded", "octagon", "circle"))
    width = rng.randint(150, 214) if shape in ("rectangle", "rounded") else rng.randint(180, 214)
    height = rng.randint(80, 200) if shape in ("rectangle", "rounded") else width
    inset = 0.88 if shape in ("rectangle", "rounded") else 0.68
    limit = room(font, lines, width * inset - 8, height * inset - 8)
    if limit < press.min_px:
        return None
    sheet, _ = blank_sheet(rng, SIZE_PX)
    color = strong(rng) if rng.random() < 0.75 else pale(rng)
    ink = ink_on(color, rng, plain=0.85)
    left, top = rng.uniform(4, 220 - width), rng.uniform(4, 220 - height)
    _panel(sheet, shape, (left, top, left + width, top + height), color, ink)
    face = font.at(pick_size(rng, max(press.min_px, limit // 2), limit))
    first = top + (height - face.size * LINE * len(lines)) / 2
    for i, line in enumerate(lines):
        sheet.write(line, left + width / 2, baseline(first, face.size, i), face, ink, "ms")
    return _page("sign", sheet, rng, lines)


def _panel(sheet: Sheet, shape: str, box: Box, color: tuple[int, int, int], line: tuple[int, int, int]) -> None:
    left, top, right, bottom = box
    inner = (left + 4, top + 4, right - 4, bottom - 4)
    if shape == "octagon":
        cut = (right - left) * 0.29
        corners = [(left + cut, top), (right - cut, top), (right, top + cut), (right, bottom - cut)]
        corners += [(right - cut, bottom), (left + cut, bottom), (left, bottom - cut), (left, top + cut)]
        sheet.draw.polygon(corners, fill=color, outline=line, width=2)
    elif shape == "circle":
        sheet.draw.ellipse(box, fill=color)
        sheet.draw.ellipse(inner, outline=line, width=3)
    else:
        radius = 14 if shape == "rounded" else 0
        sheet.draw.rounded_rectangle(box, radius, fill=color)
        sheet.draw.rounded_rectangle(inner, max(0, radius - 4), outline=line, width=2)


def make_name_tag(rng: random.Random, press: Press) -> Page | None:
    """A badge: a header, a name, often a job or a place."""
    name = press.words.name(rng)
    below = rng.choice(press.words.jobs).capitalize() if press.words.jobs and rng.random() < 0.35 else ""
    if not below and rng.random() < 0.25:
        below = rng.choice(press.words.cities)
    header = rng.choice((["HELLO", "my name is"], ["HELLO"], ["VISITOR"], ["GUEST"], ["STAFF"], ["SPEAKER"], []))
    head, body = press.face(rng, "sans"), press.face(rng, "hand", "hand", "sans", "serif")
    name_text = name.upper() if body.caps or rng.random() < 0.1 else name
    header = [line.upper() if head.caps else line for line in header]
    below = below.upper() if head.caps else below
    width, height = rng.randint(180, 216), rng.randint(110, 170)
    name_lines = name_text.split() if rng.random() < 0.5 else [name_text]
    header_size = max(press.min_px, rng.randint(14, 20))
    below_size = max(press.min_px, rng.randint(13, 17))
    header_height = head.at(header_size).size * LINE * len(header) + (8 if header else 0)
    below_height = head.at(below_size).size * LINE if below else 0.0
    limit = min(56, room(body, name_lines, width - 16, height - header_height - below_height - 12))
    if limit < press.min_px or room(head, [*header, below or "x"], width - 16, 500) < max(header_size, below_size):
        return None
    sheet, _ = blank_sheet(rng, SIZE_PX)
    left, top = rng.uniform(4, 220 - width), rng.uniform(4, 220 - height)
    paper, color = pale(rng), strong(rng)
    _panel(sheet, "rounded", (left, top, left + width, top + height), paper, color)
    middle = left + width / 2
    if header:
        sheet.draw.rounded_rectangle((left, top, left + width, top + header_height), 12, fill=color)
    for i, line in enumerate(header):
        face = head.at(header_size)
        sheet.write(line, middle, baseline(top + 3, face.size, i), face, ink_on(color, rng, plain=1), "ms")
    face = body.at(pick_size(rng, max(press.min_px, limit * 2 // 3), limit))
    free = height - header_height - below_height - face.size * LINE * len(name_lines)
    first = top + header_height + free / 2
    ink = ink_on(paper, rng)
    for i, line in enumerate(name_lines):
        sheet.write(line, middle, baseline(first, face.size, i), face, ink, "ms")
    if below:
        small = head.at(below_size)
        sheet.write(below, middle, baseline(top + height - below_height - 8, small.size), small, ink, "ms")
    lines = [*header, *name_lines, *([below] if below else [])]
    return _page("name tag", sheet, rng, lines, fields=(("name", name_text),), title=below)


def make_receipt(rng: random.Random, press: Press) -> Page | None:
    """A shop, two to five items with prices, and their sum."""
    font = press.face(rng, "mono", "mono", "sans")
    sign = rng.choice(("", "$", *font.currencies))
    shout = font.caps or rng.random() < 0.3
    case: Callable[[str], str] = str.upper if shout else str.capitalize
    items = [case(item) for item in rng.sample(press.words.goods, rng.randint(2, 5))]
    amounts = [Decimal(press.words.price(rng)) for _ in items]
    total = rng.choice(("Total", "TOTAL", "Total", "Sum", "Amount due"))
    rows = [(item, f"{sign}{amount}") for item, amount in zip(items, amounts, strict=True)]
    last = (total.upper() if shout else total, f"{sign}{sum(amounts)}")
    shop = press.words.shop(rng).upper() if shout or rng.random() < 0.5 else press.words.shop(rng).title()
    extra = press.words.date(rng) if rng.random() < 0.35 else ""
    extra = extra.upper() if font.caps else extra
    heads = [shop, *([extra] if extra else [])]
    width = rng.randint(170, 214)
    num_lines = len(heads) + len(rows) + 2.2
    joined = [f"{a}   {b}" for a, b in (*rows, last)]
    limit = min(22, room(font, [*heads, *joined], width - 16, 1e4), int(206 / num_lines / LINE))
    if limit < press.min_px:
        return None
    size = pick_size(rng, press.min_px, limit)
    face = font.at(size)
    height = face.size * LINE * num_lines + 10
    if height > 216:
        return None
    sheet, _ = blank_sheet(rng, SIZE_PX)
    left, top = rng.uniform(4, 220 - width), rng.uniform(4, 220 - height)
    paper = pale(rng)
    ink = ink_on(paper, rng, plain=0.9)
    sheet.draw.rectangle((left, top, left + width, top + height), fill=paper, outline=(190, 190, 190))
    y = top + 4
    for line in heads:
        sheet.write(line, left + width / 2, baseline(y, face.size), face, ink, "ms")
        y += face.size * LINE
    y += face.size * 0.3
    for label, price in (*rows, last):
        if label == last[0]:
            sheet.draw.line((left + 8, y + 2, left + width - 8, y + 2), fill=ink)
            y += face.size * 0.3
        sheet.write(label, left + 8, baseline(y, face.size), face, ink, "ls")
        sheet.write(price, left + width - 8, baseline(y, face.size), face, ink, "rs")
        y += face.size * LINE
    lines = [*heads, *(f"{label} {price}" for label, price in (*rows, last))]
    return _page("receipt", sheet, rng, lines, fields=tuple(rows), title=shop, total=last[1])


def make_table(rng: random.Random, press: Press) -> Page | None:
    """Two to four columns and two to four rows under a header; the first column names the rows."""
    font = press.face(rng, "sans", "sans", "serif", "mono")
    columns = rng.sample(list(_COLUMNS), rng.choice((1, 1, 2, 3)))
    names, pool = rng.choice(
        (("Name", press.words.first_names), ("Item", press.words.goods), ("City", press.words.cities))
    )
    if names == "City" and "City" in columns:
        return None
    rows = rng.sample(pool, rng.randint(2, 4))
    table = [[names, *columns]]
    table += [[row.capitalize(), *(_COLUMNS[column](press.words, rng) for column in columns)] for row in rows]
    if font.caps:
        table = [[cell.upper() for cell in row] for row in table]
    at_40 = font.at(40)
    widths = [max(at_40.getlength(row[c]) for row in table) for c in range(len(table[0]))]
    limit = int(40 * (212 - 14 * len(widths)) / sum(widths) * 0.97)
    limit = min(24, limit, int(206 / len(table) / 1.6 * font.at(40).size ** -1 * 40))
    if limit < press.min_px:
        return None
    face = font.at(pick_size(rng, press.min_px, limit))
    row_height = face.size * rng.uniform(1.35, 1.6)
    spare = rng.uniform(0, max(0.0, 212 - sum(widths) * face.size / at_40.size - 14 * len(widths))) / len(widths)
    cells = [w * face.size / at_40.size + 14 + spare for w in widths]
    sheet, _ = blank_sheet(rng, SIZE_PX)
    left, top = rng.uniform(4, 220 - sum(cells)), rng.uniform(4, 220 - row_height * len(table))
    paper, color = pale(rng), strong(rng) if rng.random() < 0.5 else pale(rng)
    ink = ink_on(paper, rng, plain=0.9)
    right, bottom = left + sum(cells), top + row_height * len(table)
    sheet.draw.rectangle((left, top, right, bottom), fill=paper)
    sheet.draw.rectangle((left, top, right, top + row_height), fill=color)
    grid = rng.random() < 0.7
    for r, row in enumerate(table):
        y, x = top + row_height * r, left
        sheet.draw.line((left, y, right, y), fill=ink)
        for c, cell in enumerate(row):
            if grid and r == 0:
                sheet.draw.line((x, top, x, bottom), fill=ink)
            place = baseline(y + (row_height - face.size * LINE) / 2, face.size)
            sheet.write(cell, x + 7, place, face, ink_on(color, rng, plain=1) if r == 0 else ink, "ls")
            x += cells[c]
    sheet.draw.rectangle((left, top, right, bottom), outline=ink)
    return _page("table", sheet, rng, [" ".join(row) for row in table], table=tuple(map(tuple, table)))


def make_form(rng: random.Random, press: Press) -> Page | None:
    """Two to five labelled fields, filled in by hand or by machine; now and then one is blank."""
    label_font, font = press.face(rng, "sans", "serif"), press.face(rng, "hand", "hand", "mono", "sans")
    labels = rng.sample(list(_FIELDS), rng.randint(2, 5))
    values = [_FIELDS[label](press.words, rng) for label in labels]
    if rng.random() < 0.2:
        values[rng.randrange(len(values))] = ""
    title = rng.choice(("", "", "REGISTRATION", "ORDER FORM", "APPLICATION", "MEMBERSHIP", "VISITOR FORM"))
    labels = [label.upper() if label_font.caps else label for label in labels]
    values = [value.upper() if font.caps else value for value in values]
    rows = len(labels) + bool(title)
    size = pick_size(rng, press.min_px, max(press.min_px, 20))
    label_face, face = label_font.at(size), font.at(size)
    pitch = max(label_face.size, face.size) * rng.uniform(1.45, 1.8)
    start = max(label_face.getlength(f"{label}:") for label in labels) + 8
    if start + max(face.getlength(value) for value in values) > 202 or pitch * rows > 210:
        return None
    sheet, _ = blank_sheet(rng, SIZE_PX)
    width, height = 216, pitch * rows + 8
    left, top = 4.0, rng.uniform(2, 222 - height)
    paper = pale(rng)
    ink = ink_on(paper, rng, plain=0.9)
    pen = rng.choice(((25, 40, 130), (20, 20, 25), (150, 25, 30)))
    sheet.draw.rectangle((left, top, left + width, top + height), fill=paper, outline=(150, 150, 150))
    boxed, y = rng.random() < 0.5, top + 4
    lines = []
    if title:
        if label_face.getlength(title) > 206:
            return None
        sheet.write(title, left + width / 2, y + pitch * 0.7, label_face, ink, "ms")
        lines.append(title)
        y += pitch
    for label, value in zip(labels, values, strict=True):
        line_y = y + pitch * 0.72
        sheet.write(f"{label}:", left + 6, line_y, label_face, ink, "ls")
        if boxed:
            sheet.draw.rectangle((left + start, y + 1, left + width - 5, y + pitch - 2), outline=(120, 120, 120))
        else:
            sheet.draw.line((left + start, line_y + 3, left + width - 6, line_y + 3), fill=(120, 120, 120))
        if value:
            sheet.write(value, left + start + 4, line_y, face, pen, "ls")
        lines.append(f"{label}: {value}".strip())
        y += pitch
    return _page("form", sheet, rng, lines, fields=tuple(zip(labels, values, strict=True)), title=title)


def _page(
    kind: PageKind,
    sheet: Sheet,
    rng: random.Random,
    lines: list[str],
    *,
    fields: tuple[tuple[str, str], ...] = (),
    table: tuple[tuple[str, ...], ...] = (),
    title: str = "",
    total: str = "",
) -> Page | None:
    if not sheet.fits:
        return None
    image = worn(sheet.image, rng)
    return Page(kind, image, tuple(lines), tuple(sheet.boxes), fields, table, title, total)


def _cased(text: str, rng: random.Random) -> str:
    return rng.choice((text, text, text[0].upper() + text[1:], text.upper()))


# Columns of a table and fields of a form, with how they are filled in. Their names are printed in both splits.
_COLUMNS: dict[str, Callable[[Words, random.Random], str]] = {
    "Price": Words.price,
    "Count": lambda words, rng: words.number(rng)[:2],
    "Code": Words.code,
    "Age": lambda _, rng: str(rng.randint(4, 95)),
    "Score": lambda _, rng: str(rng.randint(0, 100)),
    "City": lambda words, rng: rng.choice(words.cities),
    "Day": lambda _, rng: rng.choice(("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")),
    "Time": Words.time,
    "Room": lambda words, rng: words.number(rng)[:3],
    "Color": lambda _, rng: rng.choice(("red", "blue", "green", "black", "white", "pink", "gray")),
}
_FIELDS: dict[str, Callable[[Words, random.Random], str]] = {
    "Name": Words.name,
    "Date": Words.date,
    "City": lambda words, rng: rng.choice(words.cities),
    "Phone": Words.phone,
    "Job": lambda words, rng: rng.choice(words.jobs) if words.jobs else "none",
    "Age": lambda _, rng: str(rng.randint(18, 95)),
    "Room": lambda words, rng: words.number(rng)[:3],
    "Order": Words.code,
    "Item": lambda words, rng: rng.choice(words.goods),
    "Number": Words.number,
    "Time": Words.time,
}
MAKERS: dict[PageKind, Callable[[random.Random, Press], Page | None]] = {
    "words": make_words,
    "lines": make_lines,
    "sign": make_sign,
    "name tag": make_name_tag,
    "receipt": make_receipt,
    "table": make_table,
    "form": make_form,
}


def random_page(rng: random.Random, press: Press, kind: PageKind) -> Page:
    """A page of one kind; drawn again until it fits."""
    while True:
        page = MAKERS[kind](rng, press)
        if page is not None:
            return page
