"""Samples of one picture each joined into a conversation about all of them, as people go on with the next picture."""

from __future__ import annotations

import random
from collections.abc import Sequence

from distill.data.sample import QA, Sample

_BACK = 0.3  # how often a later question goes back to the first picture
_AT_ONCE = 0.3  # how often all pictures come with the first question
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
MOST_PICTURES = len(_ORDINALS)
_USUAL_BEGINNINGS = frozenset(
    (
        "What",
        "What's",
        "Which",
        "Who",
        "Whose",
        "Where",
        "How",
        "Is",
        "Are",
        "Do",
        "Does",
        "Did",
        "Can",
        "Could",
        "Would",
        "Read",
        "Describe",
        "Count",
        "Name",
        "Tell",
        "List",
        "Look",
    )
)
# What a turn costs beside its characters: roles, ends, line breaks.
_TURN_CHARS = 30


def join(samples: Sequence[Sample], rng: random.Random, *, chars: int) -> Sample:
    """One conversation about the pictures of all samples, in order.

    Mostly one picture after the other, each with its own questions, and sometimes a question that names an earlier one;
    else all pictures first, and every question says which it is about.

    Args:
        samples: of one picture each.
        chars: characters that the questions and answers of a picture may have; its first turn is always kept.
    Raises: ValueError for a sample of several pictures, one with a system message, or too many samples.
    """
    if len(samples) > MOST_PICTURES:
        raise ValueError(f"{len(samples)} pictures in a conversation; at most {MOST_PICTURES} can be joined")
    for sample in samples:
        if len(sample.images) != 1 or sample.placed or sample.system is not None:
            raise ValueError(
                f"a sample of {sample.task} has {len(sample.images)} pictures, places for them or a system message, "
                "and cannot be joined with others; use one picture a row (pictures: 1)"
            )
    kept = [_first_turns(sample.turns, chars) for sample in samples]
    if rng.random() < _AT_ONCE:
        named = [_about(number, turn, rng) for number, turns in enumerate(kept) for turn in turns]
        rng.shuffle(named)
        turns, new_images = named, [len(samples), *[0] * (len(named) - 1)]
    else:
        back = kept[0].pop() if len(kept[0]) > 1 and rng.random() < _BACK else None
        turns = [turn for of_one in kept for turn in of_one]
        new_images = [int(i == 0) for of_one in kept for i in range(len(of_one))]
        if back is not None:
            turns.append(_about(0, back, rng))
            new_images.append(0)
    first, *others = (sample.image for sample in samples)
    more = tuple(image for image in others if image is not None)
    return Sample(first, tuple(turns), samples[-1].task, more, new_images=tuple(new_images))


def _first_turns(turns: Sequence[QA], chars: int) -> list[QA]:
    kept: list[QA] = []
    for question, answer in turns:
        chars -= len(question) + len(answer) + _TURN_CHARS
        if kept and chars < 0:
            break
        kept.append((question, answer))
    return kept


def _about(number: int, turn: QA, rng: random.Random) -> QA:
    """The turn with words that say which picture is meant, counted from 0."""
    question, answer = turn
    ordinal = _ORDINALS[number]
    # A question may also begin with a name, which keeps its capital.
    small = question[:1].lower() + question[1:] if question.split(" ")[0] in _USUAL_BEGINNINGS else question
    form = rng.choice(
        (
            f"Image-{number + 1}: {question}",
            f"In the {ordinal} picture: {small}",
            f"{ordinal.capitalize()} picture: {small}",
            f"About the {ordinal} image: {small}",
            f"Look at the {ordinal} picture. {question}",
        )
    )
    return form, answer
