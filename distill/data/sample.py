"""What every source of training data yields, and the random numbers it is drawn with.

A source has a method `sample(seed, index, attempt=0)` that depends on nothing but its arguments: the same (seed, index)
gives the same sample in every process, so workers need no coordination and a resumed run can start at any index.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, cast, get_args

from PIL import Image

Split = Literal["train", "val"]
QA = tuple[str, str]  # question and answer
IMAGE_TAG = "<image>"  # where an image stands in a question, if the sample says so


class Spelled(str):
    """An answer read off the picture. It is learned, and then written, in single characters.

    What a letter looks like tells which token to write only if there is a token for it alone: a word's own tokens have
    nothing in common with those of a word one letter longer, and a word never seen has none that was ever learned. This
    is BPE-dropout (Provilkov et al., arXiv:1910.13267) at a rate of 1, for what has to be copied. The text is the same.
    """


@dataclass(frozen=True)
class Sample:
    """One conversation, about one picture, several or none.

    image: Pillow image in mode RGB, or None for text alone.
    turns: (question, answer) pairs, at least one, no empty strings.
    task: what is asked, such as "shapes" or "photos"; for logs and tests.
    more_images: those after the first, in order.
    placed: every "<image>" in the questions is the place of an image, in order; otherwise all stand before the first
        question, and the tag is text like any other.
    system: the system message; None takes the template's.
    new_images: how many images come with each turn, before its question; None: all with the first.
    """

    image: Image.Image | None
    turns: tuple[QA, ...]
    task: str
    more_images: tuple[Image.Image, ...] = ()
    placed: bool = False
    system: str | None = None
    new_images: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not self.turns or not all(question and answer for question, answer in self.turns):
            raise ValueError(f"a sample of {self.task} has turns {self.turns!r}; each needs a question and an answer")
        for image in self.images:
            if image.mode != "RGB":
                raise ValueError(f'a sample of {self.task} has an image in mode "{image.mode}"; convert it to "RGB"')
        if self.more_images and self.image is None:
            raise ValueError(f"a sample of {self.task} has more_images without an image; put the first into image")
        tags = sum(question.count(IMAGE_TAG) for question, _ in self.turns)
        if self.placed and tags != len(self.images):
            raise ValueError(f"a sample of {self.task} has {len(self.images)} images and {tags} places for them")
        new = self.new_images
        if new is not None and (self.placed or len(new) != len(self.turns) or sum(new) != len(self.images)):
            raise ValueError(
                f"a sample of {self.task} has {len(self.images)} images, {len(self.turns)} turns and new_images={new}; "
                "give a number for each turn that add up to all images, and placed=False"
            )

    @property
    def images(self) -> tuple[Image.Image, ...]:
        """All images, in order."""
        return () if self.image is None else (self.image, *self.more_images)


class Source(Protocol):
    """Where samples come from; see the module's docstring.

    `attempt` draws another sample for the same index, where the first could not be used.
    """

    name: str
    split: Split

    def sample(self, seed: int, index: int, attempt: int = 0) -> Sample: ...


def rng_for(*parts: int | str) -> random.Random:
    """A random generator that depends on `parts` alone. Text seeds are hashed, so nearby numbers do not correlate."""
    return random.Random("/".join(map(str, parts)))


def held_out(text: str, percent: int) -> bool:
    """True for about `percent` of all texts, for ever the same ones: the rule behind every held-out split made here."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 100 < percent


def check_split(split: str) -> Split:
    """Raises: ValueError if `split` is neither "train" nor "val"."""
    if split not in get_args(Split):
        raise ValueError(f'split "{split}" is not known; use "train" or "val"')
    return cast(Split, split)


def casual(rng: random.Random, question: str) -> str:
    """Sometimes type like people do: no capital at the start, no mark at the end, American and British spelling."""
    if rng.random() < 0.15:
        question = question[0].lower() + question[1:]
    if rng.random() < 0.15:
        question = question.rstrip("?.")
    if rng.random() < 0.3:
        question = question.replace("color", "colour").replace("Color", "Colour")
    return question


def with_article(noun: str) -> str:
    """With "a" or "an", by spelling ("an orange star"), so for words where spelling tells."""
    return ("an " if noun[0].lower() in "aeio" else "a ") + noun


def join_words(words: Sequence[str]) -> str:
    """One word, "a and b", or "a, b and c"."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def sentence(text: str) -> str:
    """Upper-case the first letter (`str.capitalize` would lower-case the rest) and end with a full stop."""
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def yes_no(truth: bool) -> str:
    return "Yes." if truth else "No."
