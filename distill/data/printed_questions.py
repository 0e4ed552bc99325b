"""Questions about a page of text.

What is read back is answered to the letter, without a full stop of our own; everything else is a short sentence. An
answer with text from the page is `Spelled`.
"""

from __future__ import annotations

import random
from decimal import Decimal

from distill.data.page import Page, PageKind
from distill.data.sample import QA, Spelled, join_words, sentence, yes_no
from distill.data.shapes import NUMBERS
from distill.data.words import Words, words_of

READABLE: tuple[PageKind, ...] = ("words", "lines", "sign")  # pages that are asked to be read from end to end
_PLACES = ("first", "second", "third", "fourth", "fifth")

# Each function below returns (question, answer), or None where the page does not allow such a question.


def ask_read(page: Page, rng: random.Random) -> QA | None:
    """All that is printed."""
    if page.kind not in (*READABLE, "name tag"):
        return None
    templates = [
        "What does it say?",
        "Read the text.",
        "What is written here?",
        "What does the text say?",
        "Can you read this?",
        "Read this to me.",
        "What's written in the picture?",
        "Transcribe the text.",
        "Please read out the text.",
        "Which words do you see?" if page.kind == "words" and " " in page.text else "What is the text in the image?",
        "Write down the text.",
        "What can you read?",
    ]
    if page.kind in ("sign", "name tag"):
        templates += [
            f"What does the {page.kind} say?",
            f"What is written on the {page.kind}?",
            f"Read the {page.kind}.",
        ]
    if page.kind == "words" and " " not in page.text and page.text.isalpha():
        templates += ["Which word is this?", "What word is shown?", "Read the word.", "What is the word?"]
    if page.kind == "lines":
        templates += ["Read the note.", "What do the lines say?", "Read all lines."]
    return rng.choice(templates), Spelled(page.text)


def ask_word(page: Page, rng: random.Random) -> QA | None:
    """The first or last word, or a line."""
    words = page.text.split()
    if page.kind not in READABLE or len(words) < 2:
        return None
    if len(page.lines) > 1 and (rng.random() < 0.45 or not _only_words(page)):
        number = rng.randrange(len(page.lines))
        place = "last" if number == len(page.lines) - 1 and rng.random() < 0.7 else _PLACES[number]
        if number == 0 and rng.random() < 0.3:
            place = "top"
        templates = [
            "What does the {} line say?",
            "Read the {} line.",
            "What is on the {} line?",
            "The {} line says what?",
        ]
        return rng.choice(templates).format(place), Spelled(page.lines[number])
    if not _only_words(page):
        return None
    place, word = rng.choice((("first", words[0]), ("last", words[-1])))
    templates = [
        "What is the {} word?",
        "Which word comes {}?",
        "What's the {} word in the picture?",
        "Read only the {} word.",
        "Tell me the {} word.",
    ]
    return rng.choice(templates).format(place), Spelled(word)


def ask_there(page: Page, rng: random.Random, words: Words) -> QA | None:
    """Whether a word is printed; as often yes as no."""
    if page.kind not in READABLE:
        return None
    printed = [word for word in page.text.split() if word.isalpha()]
    truth = rng.random() < 0.5
    if truth:
        if not printed:
            return None
        word = rng.choice(printed)
    else:
        word = rng.choice(words.plain)
        if set(words_of(word)) & set(words_of(page.text)):
            return None
    if rng.random() < 0.5:
        word = word.lower()
    templates = [
        'Is the word "{}" there?',
        'Is there the word "{}"?',
        "Does it say {}?",
        'Does the text contain "{}"?',
        "Can you see the word {}?",
        "Do you find the word {} in the picture?",
        'Is "{}" written here?',
    ]
    return rng.choice(templates).format(word), yes_no(truth)


def ask_count(page: Page, rng: random.Random) -> QA | None:
    """How many words or lines, items or columns."""
    counted: list[tuple[str, int]] = []
    if page.kind in READABLE:
        counted = [("lines of text", len(page.lines))]
        if _only_words(page):
            counted.append(("words", len(page.text.split())))
    elif page.kind == "receipt":
        counted = [("items", len(page.fields)), ("things on the receipt", len(page.fields))]
    elif page.kind == "table":
        counted = [("columns", len(page.table[0]))]
    elif page.kind == "form":
        counted = [("fields", len(page.fields))]
    counted = [(name, number) for name, number in counted if number < len(NUMBERS)]
    if not counted:
        return None
    name, number = rng.choice(counted)
    templates = ["How many {} are there?", "How many {} do you see?", "Count the {}.", "Number of {}?"]
    question = rng.choice(templates).format(name)
    if name == "things on the receipt":
        question = rng.choice(("How many things were bought?", "How many items are on the receipt?"))
    return question, sentence(NUMBERS[number])


def ask_letter(page: Page, rng: random.Random) -> QA | None:
    """A single word's first or last letter, or its spelling."""
    if page.kind != "words" or not page.text.isalpha():
        return None
    roll = rng.random()
    if roll < 0.4:
        templates = ["Spell the word.", "How is the word spelled?", "Spell it letter by letter.", "Can you spell this?"]
        return rng.choice(templates), Spelled("-".join(page.text.upper()))
    place, letter = ("first", page.text[0]) if roll < 0.8 else ("last", page.text[-1])
    templates = ["What is the {} letter?", "Which letter comes {}?", "Tell me the {} letter of the word."]
    return rng.choice(templates).format(place), Spelled(letter.upper())


def ask_price(page: Page, rng: random.Random) -> QA | None:
    """What an item costs, what costs as much, the sum, the dearest."""
    if page.kind != "receipt":
        return None
    roll = rng.random()
    if roll < 0.25:
        templates = [
            "What is the total?",
            "How much is it in total?",
            "What's the total on the receipt?",
            "How much do I have to pay?",
            "What does everything cost together?",
            "What is the sum?",
            "Total?",
        ]
        return rng.choice(templates), Spelled(sentence(page.total))
    item, price = rng.choice(page.fields)
    name = item if rng.random() < 0.3 else item.lower()
    if roll < 0.7:
        templates = [
            f"How much {'are' if _is_plural(name) else 'is'} the {{}}?",
            "What is the price of the {}?",
            "How much for the {}?",
            "What does it say for {}?",
            "What's the price of {}?",
            "What did the {} cost?",
            "Price of the {}?",
        ]
        return rng.choice(templates).format(name), Spelled(sentence(price))
    if roll < 0.8:
        same = [other for other, amount in page.fields if amount == price]
        templates = ["Which item costs {}?", "What costs {}?", "What was bought for {}?", "Which thing is {}?"]
        return (rng.choice(templates).format(price), Spelled(sentence(item))) if len(same) == 1 else None
    if roll < 0.9:
        templates = [
            "Which shop is this from?",
            "What is the name of the shop?",
            "Where was this bought?",
            "Which store is it?",
        ]
        return rng.choice(templates), Spelled(sentence(page.title))
    ranked = sorted(page.fields, key=lambda field: _amount(field[1]))
    most = rng.random() < 0.6
    (best, price), (_, second) = (ranked[-1], ranked[-2]) if most else ranked[:2]
    if price == second:
        return None
    word = rng.choice(("most expensive", "dearest")) if most else "cheapest"
    return rng.choice(("What is the {} item?", "Which item is the {}?")).format(word), Spelled(sentence(best))


def ask_items(page: Page, rng: random.Random) -> QA | None:
    """Everything that was bought."""
    if page.kind != "receipt":
        return None
    templates = ["What was bought?", "List the items.", "Which items are on the receipt?", "What did they buy?"]
    return rng.choice(templates), Spelled(sentence(join_words([item for item, _ in page.fields])))


def ask_cell(page: Page, rng: random.Random) -> QA | None:
    """A cell of a table by row and column, the row that has a value, or the columns."""
    if page.kind != "table":
        return None
    header, *rows = page.table
    roll = rng.random()
    if roll < 0.15:
        templates = ["What are the columns?", "Which columns does the table have?", "Read the header of the table."]
        return rng.choice(templates), Spelled(sentence(join_words(header)))
    if roll < 0.25:
        templates = ["Which rows are there?", "List the first column.", "What is in the column {}?"]
        return rng.choice(templates).format(header[0]), Spelled(sentence(join_words([row[0] for row in rows])))
    row, c = rng.choice(rows), rng.randrange(1, len(header))
    column, value = header[c], row[c]
    if roll < 0.4:
        if sum(other[c] == value for other in rows) > 1:
            return None
        templates = ["Which row has {1} {0}?", "In which row is the {1} {0}?", "Who or what has {1} {0}?"]
        return rng.choice(templates).format(value, column.lower()), Spelled(sentence(row[0]))
    if roll < 0.5:
        place, picked = rng.choice((("first", rows[0]), ("last", rows[-1])))
        templates = ["What is the {} entry in the column {}?", "What is the {} value of {}?"]
        return rng.choice(templates).format(place, column), Spelled(sentence(picked[c]))
    templates = [
        "What is in row {0}, column {1}?",
        "What is the {1} of {0}?",
        "What {1} does {0} have?",
        "Look up {0}: what is the {1}?",
        "{1} of {0}?",
        "What does the table say for {0} under {1}?",
        "Which {1} belongs to {0}?",
    ]
    column = column if rng.random() < 0.4 else column.lower()
    question = rng.choice(templates).format(row[0], column)
    return question[0].upper() + question[1:], Spelled(sentence(value))


def ask_field(page: Page, rng: random.Random) -> QA | None:
    """What stands in a field of a form, or the name on a tag."""
    if page.kind == "name tag":
        templates = [
            "What is the name?",
            "Who is this?",
            "What is the person's name?",
            "Whose name tag is it?",
            "What's the name on the tag?",
            "What is this person called?",
        ]
        return rng.choice(templates), Spelled(sentence(page.fields[0][1]))
    if page.kind != "form":
        return None
    if rng.random() < 0.12:
        templates = ["Which fields does the form have?", "What does the form ask for?", "List the fields."]
        return rng.choice(templates), Spelled(sentence(join_words([label for label, _ in page.fields])))
    label, value = rng.choice(page.fields)
    templates = [
        "What is the {}?",
        "Which {} is given?",
        "What does the form say under {}?",
        "What is written in the field {}?",
        "Read the {}.",
        "{}?",
        "What was filled in for {}?",
    ]
    question = rng.choice(templates).format(label if rng.random() < 0.3 else label.lower())
    return question[0].upper() + question[1:], Spelled(sentence(value)) if value else "It is left blank."


def ask_describe(page: Page, rng: random.Random) -> QA | None:
    """What kind of picture this is, and what it says in short."""
    templates = [
        "What do you see?",
        "What is this?",
        "What is in the picture?",
        "Describe the picture.",
        "What does the image show?",
        "What is shown here?",
    ]
    said = f'"{page.text}"'
    if page.kind == "words":
        answer = f"The {'word' if page.text.isalpha() else 'text' if len(page.text.split()) == 1 else 'words'} {said}."
    elif page.kind == "lines":
        answer = f"{NUMBERS[len(page.lines)]} lines of text: {said}."
    elif page.kind == "sign":
        answer = f"A sign that says {said}."
    elif page.kind == "name tag":
        answer = f"A name tag of {page.fields[0][1]}."
    elif page.kind == "receipt":
        answer = f"A receipt from {page.title} with {NUMBERS[len(page.fields)]} items and a total of {page.total}."
    elif page.kind == "table":
        answer = f"A table with the columns {join_words(page.table[0])}."
    else:
        answer = f"A form with the fields {join_words([label for label, _ in page.fields])}."
    return rng.choice(templates), Spelled(sentence(answer))


def _only_words(page: Page) -> bool:
    """Whether nobody would doubt what counts as a word: "4 pm" may be two, or one, or none."""
    return page.text.replace(" ", "").isalpha()


def _is_plural(item: str) -> bool:
    return item.lower().endswith("s") and item.lower() != "hummus"


def _amount(price: str) -> Decimal:
    return Decimal(price.lstrip("$£€"))
