"""Words, names, numbers and dates to print, divided for ever into those that are trained on and those that are not.

Whether a word is held out depends on its lower-case form alone, wherever it comes from: "Rose" the name and "rose" the
flower are one. Numbers, prices, dates, times and codes are held out whole.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections import Counter
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from distill.data.sample import Split, check_split, held_out

HELD_OUT_PERCENT = 10
_MOST_LETTERS = 12
_TEXT = Path(__file__).parent / "self.jsonl.gz"  # ordinary words come from here, those that occur at least twice

MONTHS = re.findall(r"\w+", "January February March April May June July August September October November December")
_STARTS = re.findall(
    r"\w+", "b c d f g h j k l m n p qu r s t v w x y z bl br ch cl cr dr fl fr gl gr pl pr sh sk sl sp st tr"
)
_VOWELS = ("a", "e", "i", "o", "u", "ai", "ea", "ee", "oo", "ou")
_ENDS = ("", "", "n", "r", "l", "t", "s", "m", "k", "p", "ck", "nd", "st", "x")


@cache
def listed_words() -> dict[str, tuple[str, ...]]:
    """The sections of words.txt: "first names", "last names", "cities", "goods", "jobs", "shops", "signs", "unfit"."""
    sections: dict[str, tuple[str, ...]] = {}
    for section in (Path(__file__).parent / "words.txt").read_text(encoding="utf-8").split("\n[")[1:]:
        name, _, words = section.partition("]")
        sections[name] = tuple(" ".join(word.split()) for word in words.split(","))
    return sections


def words_of(text: str) -> list[str]:
    """The words of a text as the held-out rule sees them: lower case, no punctuation around them."""
    return [word for part in text.lower().split() if (word := part.strip(".,;:!?\"'()"))]


def may_print(text: str, split: Split) -> bool:
    """Whether every word of a text belongs to the split."""
    return all(held_out(word, HELD_OUT_PERCENT) == (split == "val") for word in words_of(text))


@cache
def ordinary_words() -> tuple[str, ...]:
    """Some 4,000 words of everyday text, lower case, in a fixed order."""
    counts: Counter[str] = Counter()
    for line in gzip.decompress(_TEXT.read_bytes()).decode().splitlines():
        for message in json.loads(line)["messages"]:
            counts.update(re.findall(r"(?<![\w'])[a-z]+(?![\w'])", message["content"]))
    unfit = listed_words()["unfit"]
    return tuple(sorted(w for w, n in counts.items() if n > 1 and 2 <= len(w) <= _MOST_LETTERS and w not in unfit))


class Words:
    """Everything that may be printed for one split, to be drawn from.

    Args: made_up: share of what `word` gives that are no words. The more, the less can be guessed instead of read.
    """

    def __init__(self, split: Split, *, made_up: float = 0.1) -> None:
        """Raises: ValueError if `split` is neither "train" (nothing held out) nor "val" (only what is held out)."""
        self.split = check_split(split)
        self.made_up = made_up
        listed = {name: self._allowed(words) for name, words in listed_words().items()}
        self.first_names, self.last_names, self.cities = (listed[n] for n in ("first names", "last names", "cities"))
        self.goods, self.jobs, self.shops, self.signs = (listed[n] for n in ("goods", "jobs", "shops", "signs"))
        own = {word.lower() for words in (self.first_names, self.last_names, self.cities, self.goods) for word in words}
        self.plain = sorted({*self._allowed(ordinary_words()), *own})

    def _allowed(self, texts: Iterable[str]) -> list[str]:
        return [text for text in texts if may_print(text, self.split)]

    def _whole(self, rng: random.Random, kind: str) -> str:
        """Drawn until the split may have it, as a whole."""
        while True:
            text = _STRINGS[kind](rng)
            if held_out(text.lower(), HELD_OUT_PERCENT) == (self.split == "val"):
                return text

    def number(self, rng: random.Random) -> str:
        """Two to six digits."""
        return self._whole(rng, "number")

    def price(self, rng: random.Random) -> str:
        """ "4.50"; without a sign, which the page puts in front of all its prices or none."""
        return self._whole(rng, "price")

    def date(self, rng: random.Random) -> str:
        return self._whole(rng, "date")

    def time(self, rng: random.Random) -> str:
        return self._whole(rng, "time")

    def phone(self, rng: random.Random) -> str:
        return self._whole(rng, "phone")

    def code(self, rng: random.Random) -> str:
        """Letters and digits that no language model could guess: "KX-204"."""
        return self._whole(rng, "code")

    def name(self, rng: random.Random) -> str:
        """A first name, mostly with a last name."""
        first = rng.choice(self.first_names)
        return first if rng.random() < 0.3 else f"{first} {rng.choice(self.last_names)}"

    def shop(self, rng: random.Random) -> str:
        words = [rng.choice(self.last_names if rng.random() < 0.5 else self.plain)]
        return " ".join(words + ([rng.choice(self.shops)] if self.shops else []))

    def word(self, rng: random.Random) -> str:
        """Mostly an ordinary word, lower case; now and then a name, a number, or a made-up word."""
        if rng.random() < self.made_up:
            return self._whole(rng, "made-up")
        roll = rng.random()
        if roll < 0.8:
            return rng.choice(self.plain)
        if roll < 0.91:
            return rng.choice(rng.choice((self.first_names, self.last_names, self.cities)))
        return self._whole(rng, rng.choice(("number", "number", "code", "time", "date", "price")))


def _made_up(rng: random.Random) -> str:
    """Pronounceable, mostly no word: to be read letter by letter."""
    parts = (rng.choice(_STARTS) + rng.choice(_VOWELS) + rng.choice(_ENDS) for _ in range(rng.choice((1, 2, 2, 3))))
    return "".join(parts)


def _number(rng: random.Random) -> str:
    digits = rng.choice((2, 2, 3, 3, 4, 5, 6))  # no single ones: each of the ten is needed in training
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def _price(rng: random.Random) -> str:
    whole = rng.randrange(1, 10) if rng.random() < 0.7 else rng.randrange(10, 60)
    return f"{whole}.{rng.choice((0, 50, 99, 95, 25, 75, rng.randrange(100), rng.randrange(100))):02d}"


def _date(rng: random.Random) -> str:
    day, month, year = rng.randint(1, 28), rng.randint(1, 12), rng.randint(1980, 2039)
    name = MONTHS[month - 1]
    forms = (f"{year}-{month:02d}-{day:02d}", f"{day:02d}.{month:02d}.{year}", f"{day} {name}", f"{name} {day}")
    return rng.choice((*forms, f"{month}/{day}/{year}", f"{day} {name[:3]} {year}"))


def _time(rng: random.Random) -> str:
    hour, minute = rng.randint(1, 12), rng.choice((0, 15, 30, 45, rng.randrange(60)))
    return rng.choice((f"{hour}:{minute:02d}", f"{hour + 8:02d}:{minute:02d}", f"{hour} {rng.choice(('am', 'pm'))}"))


def _phone(rng: random.Random) -> str:
    return rng.choice(("{0}-{1}", "{0} {1}", "0{2} {0}{1}")).format(
        rng.randint(200, 999), rng.randint(1000, 9999), rng.randint(20, 99)
    )


def _code(rng: random.Random) -> str:
    letters = "".join(rng.choice("ABCDEFGHJKLMNPRSTUVWXYZ") for _ in range(rng.randint(1, 3)))
    return letters + rng.choice(("", "-")) + str(rng.randint(2, 9999))


_STRINGS = {
    "number": _number,
    "price": _price,
    "date": _date,
    "time": _time,
    "phone": _phone,
    "code": _code,
    "made-up": _made_up,
}
