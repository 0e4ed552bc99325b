"""Questions about where shapes are: against each other, at an end of the picture, or within it."""

from __future__ import annotations

import random

from distill.data.groups import CLEAR, ends, named, names, position, third
from distill.data.sample import QA, sentence, with_article, yes_no
from distill.data.scene import Scene

# Side as the question puts it, axis (0: x, 1: y), direction along it, and the answer.
_SIDES = (
    (("left of", "to the left of", "on the left side of"), 0, -1, "To the left."),
    (("right of", "to the right of", "on the right side of"), 0, 1, "To the right."),
    (("above", "higher than", "over"), 1, -1, "Above."),
    (("below", "lower than", "under"), 1, 1, "Below."),
)
_PLACES = (
    ("In the top left.", "At the top.", "In the top right."),
    ("On the left.", "In the middle.", "On the right."),
    ("In the bottom left.", "At the bottom.", "In the bottom right."),
)


def ask_relation(scene: Scene, rng: random.Random) -> QA | None:
    """One of the questions below, whichever the scene allows."""
    asks = [ask_side, ask_which_side, ask_end, ask_place]
    first = rng.choices(asks, (4, 2.5, 2, 1.5))[0]
    for ask in (first, *asks):
        turn = ask(scene, rng)
        if turn is not None:
            return turn
    return None


def ask_side(scene: Scene, rng: random.Random) -> QA | None:
    """Is A left of B? Yes or no."""
    words, axis, sign, _ = rng.choice(_SIDES)
    shapes = named(scene)
    pairs = [(a, b) for a in shapes for b in shapes if (position(a, axis) - position(b, axis)) * sign >= CLEAR]
    if not pairs:
        return None
    a, b = rng.choice(pairs)
    truth = rng.random() < 0.5
    if not truth:
        a, b = b, a
    name_a, name_b = rng.choice(names(scene, a)), rng.choice(names(scene, b))
    return f"Is the {name_a} {rng.choice(words)} the {name_b}?", yes_no(truth)


def ask_which_side(scene: Scene, rng: random.Random) -> QA | None:
    """Where is A compared to B? One of four answers, where one direction clearly outweighs the other."""
    shapes = named(scene)
    found = []
    for _, axis, sign, answer in _SIDES:
        for a in shapes:
            for b in shapes:
                along = (position(a, axis) - position(b, axis)) * sign
                across = abs(position(a, 1 - axis) - position(b, 1 - axis))
                if along >= CLEAR and along >= 2 * across:
                    found.append((a, b, axis, answer))
    if not found:
        return None
    a, b, axis, answer = rng.choice(found)
    templates = (
        "Where is the {} compared to the {}?",
        "Where is the {} relative to the {}?",
        "On which side of the {1} is the {0}?",
        "Where is the {} as seen from the {}?",
        ("Is the {} left or right of the {}?", "Is the {} above or below the {}?")[axis],
    )
    return rng.choice(templates).format(rng.choice(names(scene, a)), rng.choice(names(scene, b))), answer


def ask_end(scene: Scene, rng: random.Random) -> QA | None:
    """Which shape is leftmost?"""
    found = ends(scene)
    if not found:
        return None
    place, shape = rng.choice(found)
    templates = ("Which shape is {}?", "What is the {} shape?", "What is the {} thing?")
    return rng.choice(templates).format(place), sentence(with_article(f"{shape.color} {shape.kind}"))


def ask_place(scene: Scene, rng: random.Random) -> QA | None:
    """Where in the picture is A? One of nine places, where A is well inside one of them."""
    places = []
    for shape in named(scene):
        column, row = third(shape, 0), third(shape, 1)
        if column is not None and row is not None:
            places.append((shape, _PLACES[row][column]))
    if not places:
        return None
    shape, place = rng.choice(places)
    templates = ("Where is the {}?", "Where in the picture is the {}?", "In which part of the image is the {}?")
    return rng.choice(templates).format(rng.choice(names(scene, shape))), place
