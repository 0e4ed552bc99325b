"""Pages with rows: receipts, tables and forms."""

from __future__ import annotations

import random
from collections.abc import Callable
from decimal import Decimal

from distill.data.page import SIZE_PX, Page, Press, finished_page
from distill.data.sheet import LINE, baseline, blank_sheet, ink_on, pale, pick_size, room, strong
from distill.data.words import Words

# Each function below returns a page, or None where what it drew does not fit.


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
    return finished_page("receipt", sheet, rng, lines, fields=tuple(rows), title=shop, total=last[1])


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
    return finished_page("table", sheet, rng, [" ".join(row) for row in table], table=tuple(map(tuple, table)))


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
    return finished_page("form", sheet, rng, lines, fields=tuple(zip(labels, values, strict=True)), title=title)


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
