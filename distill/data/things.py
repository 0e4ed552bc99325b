"""The things that icons are taught as: which drawings count as one thing, what it is called, and what it is a kind of.

The things stand in things.txt, whose head says how to read it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

# What a group is called in a question: one of them, and several.
GROUPS = {
    "animal": "animals",
    "bird": "birds",
    "sea animal": "sea animals",
    "insect": "insects",
    "plant": "plants",
    "flower": "flowers",
    "fruit": "fruits",
    "vegetable": "vegetables",
    "food": "foods",
    "drink": "drinks",
    "vehicle": "vehicles",
    "building": "buildings",
    "ball": "balls",
    "musical instrument": "musical instruments",
    "piece of clothing": "pieces of clothing",
    "tool": "tools",
    "piece of furniture": "pieces of furniture",
    "body part": "body parts",
    "person": "people",
    "face": "faces",
}


_PLURALS = {
    "mouse": "mice",
    "computer mouse": "computer mice",
    "wolf": "wolves",
    "fish": "fish",
    "tropical fish": "tropical fish",
    "pufferfish": "pufferfish",
    "jellyfish": "jellyfish",
    "sheep": "sheep",
    "bison": "bison",
    "deer": "deer",
    "moose": "moose",
    "ox": "oxen",
    "goose": "geese",
    "shrimp": "shrimp",
    "squid": "squid",
    "octopus": "octopuses",
    "knife": "knives",
    "scarf": "scarves",
    "maple leaf": "maple leaves",
    "autumn leaf": "autumn leaves",
    "die": "dice",
    "tooth": "teeth",
    "foot": "feet",
    "chicken leg": "chicken legs",
    "cactus": "cactuses",
    "hibiscus": "hibiscuses",
    "piece of clothing": "pieces of clothing",
}


@dataclass(frozen=True, eq=False)
class Thing:
    """What an icon shows; there is one for each name, and it equals no other.

    name: as said ("ladybug"); the same for all drawings of it.
    noun: with its article, if it takes one: "a ladybug", "bread".
    plural: "ladybugs", or "" for what is never counted.
    groups: what it surely is a kind of, narrowest first; keys of `GROUPS`.
    maybe: what one might call it too.
    kin: number of its family; things of one family are easily confused.
    taught: False for things that no training sample may name.
    """

    name: str
    noun: str
    plural: str = ""
    groups: tuple[str, ...] = ()
    maybe: tuple[str, ...] = ()
    kin: int = 0
    taught: bool = True

    @cached_property
    def words(self) -> frozenset[str]:
        return frozenset(self.name.lower().split()) - {"of", "and", "on", "with", "a", "the"}


def with_article(name: str) -> str:
    """By sound as far as these names go: an umbrella, an SUV, a unicorn, an hourglass, a UFO."""
    vowel = name[0] in "aeioAEIO" or name.startswith(("umbrella", "hourglass", "underpants", "SUV"))
    return ("an " if vowel else "a ") + name


def plural(name: str) -> str:
    """Of countable names: "slices of cake", "boxes", "berries"."""
    if name in _PLURALS:
        return _PLURALS[name]
    head, of, rest = name.partition(" of ")
    if head.endswith(("s", "x", "ch", "sh")):
        head += "es"
    elif head.endswith("y") and head[-2] not in "aeiou":
        head = head[:-1] + "ies"
    else:
        head += "s"
    return head + of + rest


def things() -> dict[str, Thing]:
    """The thing that each emoji's label stands for."""
    found: dict[str, Thing] = {}
    families = [(line, section == "taught") for section in ("taught", "untaught") for line in _SECTIONS[section]]
    for kin, (line, taught) in enumerate(families):
        head, _, members = line.rpartition(":")
        sure, _, maybe = head.partition("?")
        for member in members.split(";"):
            name, _, labels = (part.strip() for part in member.partition("="))
            countable = not name.endswith("*")
            name = name.removesuffix("*")
            noun = with_article(name) if countable else name
            many = plural(name) if countable else ""
            thing = Thing(name, noun, many, _split(sure), _split(maybe), kin, taught)
            for label in _split(labels or name):
                found.setdefault(label, thing)
    return found


def alike(a: Thing, b: Thing) -> bool:
    """Whether the name of one could be said of a drawing of the other: the same, broader, or easily confused."""
    return (
        bool(a.words & b.words)
        or a.name in (*b.groups, *b.maybe)
        or b.name in (*a.groups, *a.maybe)
        or bool(_ALIKE.get(a.name, _NO_SETS) & _ALIKE.get(b.name, _NO_SETS))
    )


def _split(names: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in names.split(",") if name.strip())


def _sections() -> dict[str, list[str]]:
    """The lines of things.txt under each heading, comments left out and wrapped lines joined."""
    found: dict[str, list[str]] = {}
    for line in (Path(__file__).parent / "things.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            lines = found.setdefault(line.strip("[]"), [])
        elif line.startswith(" "):
            lines[-1] += line.rstrip().replace("    ", " ", 1)
        elif line and not line.startswith("#"):
            lines.append(line.rstrip())
    return found


_SECTIONS = _sections()
_NO_SETS: frozenset[int] = frozenset()
_ALIKE: dict[str, frozenset[int]] = {}  # numbers of the lines that name a thing
for _number, _line in enumerate(_SECTIONS["alike"]):
    for _name in _split(_line):
        _ALIKE[_name] = _ALIKE.get(_name, _NO_SETS) | {_number}

EVERYDAY = frozenset(name.lower() for line in _SECTIONS["everyday"] for name in _split(line))
