"""Pages of text, drawn: seven kinds, from a single word to a form.

Every page fits the picture, and no letter is smaller than asked for. What a question may ask for stands in the page's
fields, so an answer never has to be read back from pixels.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from distill.data.fonts import Font
from distill.data.page import SIZE_PX, Page, PageKind, Press, finished_page
from distill.data.papers import make_form, make_receipt, make_table
from distill.data.sheet import LINE, Box, Sheet, baseline, blank_sheet, ink_on, pale, pick_size, room, strong

_MARGIN = 6

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
    return finished_page(kind, sheet, rng, lines)


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
    return finished_page("sign", sheet, rng, lines)


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
    return finished_page("name tag", sheet, rng, lines, fields=(("name", name_text),), title=below)


def _cased(text: str, rng: random.Random) -> str:
    return rng.choice((text, text, text[0].upper() + text[1:], text.upper()))


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
