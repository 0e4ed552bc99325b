"""Which things are never taught, whatever the picture: what honest answers are learned from, and tested with.

Some 12 % of all names are taken out of every source that teaches names, photos and icons alike, by hash of the name;
but no everyday thing (listed in things.txt), and none whose name ends in one: who knows chairs is not unsure of a
Windsor chair. Half of them are shown in training with answers that name nothing ("I am not sure what this is."); the
other half is not shown in training at all, and asked about in evaluation. A model that only learned the first half by
heart fails on the second.

Of photos' classes that leaves eight a half, and eight are learned by heart: a model trained with them named a wrong
thing for 99 % of the others. So 28 more classes, which would be taught, are shown without a name.
"""

from __future__ import annotations

from typing import Literal

from distill.data.sample import held_out
from distill.data.things import EVERYDAY

UNSEEN_PERCENT = 15  # of the names that are not everyday; of all, some 12

# Drawn once, by `held_out(f"unnamed photo: {name}", 30)` from photos' taught classes, everyday things left out.
UNNAMED_PHOTOS = frozenset((
    "aubergine", "avocado", "beaver", "chandelier", "cougar", "grand piano", "headphones", "human brain", "leopard",
    "llama", "lobster", "mandolin", "minaret", "oat milk", "oatghurt", "pear", "pepper", "pigeon", "platypus", "plum",
    "pomegranate", "pyramid", "red beet", "rhino", "scorpion", "starfish", "wrench", "yin-yang symbol",
))  # fmt: skip

Part = Literal["taught", "train", "val"]


def part_of(name: str, *, taught: bool = True) -> Part:
    """ "taught", or else the split in which things of this name are asked about without being known.

    Args:
        name: of the thing or class; capitals do not matter. No name is taught: there is nothing to hold out.
        taught: False if it would not be taught anyway.
    """
    name = name.lower()
    if name in UNNAMED_PHOTOS:
        return "train"
    everyday = name in EVERYDAY or name.split(" ")[-1] in EVERYDAY
    if taught and (not name or everyday or not held_out(f"never named: {name}", UNSEEN_PERCENT)):
        return "taught"
    return "val" if held_out(f"never shown: {name}", 50) else "train"
