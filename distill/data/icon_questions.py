"""Questions about a picture of icons: what there is, of which kind, how many, and where.

Asked only where no one could argue: nothing is denied that looks like what is there (`things.alike`), no group is
counted while something belongs to it only perhaps. Every function returns (question, answer), or None where the scene
does not allow such a question.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence

from distill.data.icon_scene import IconScene, Placed
from distill.data.sample import QA, join_words, sentence, yes_no
from distill.data.shapes import NUMBERS
from distill.data.things import GROUPS, Thing, alike, with_article

_CLEAR = 0.17  # of the picture's side: what counts as clearly left of, right of, above or below

NAME_QUESTIONS = (
    "What is this?",
    "What is in the picture?",
    "What does the image show?",
    "What do you see?",
    "What is shown here?",
    "Name the thing in the picture.",
    "Can you tell me what this is?",
    "What am I looking at?",
    "What's in the image?",
    "What's this?",
    "Which thing is drawn here?",
    "What does this icon show?",
    "What is this a drawing of?",
    "Identify the object.",
)
_LIST = (
    "What do you see?",
    "What is in the picture?",
    "Describe the picture.",
    "Describe this image.",
    "What does the image show?",
    "List what you see.",
    "Which things are in the picture?",
    "Name everything in the image.",
    "What can you see here?",
    "Tell me what is in this picture.",
    "What's in the image?",
)


def ask_name(scene: IconScene, pool: Sequence[Thing], rng: random.Random) -> QA | None:
    """What is this?  Of a single icon."""
    if len(scene.placed) > 1:
        return None
    return rng.choice(NAME_QUESTIONS), sentence(scene.things[0].noun)


def ask_list(scene: IconScene, pool: Sequence[Thing], rng: random.Random) -> QA | None:
    """Everything in the picture, from left to right; equal things where the first of them is."""
    return rng.choice(_LIST), list_answer(scene.things)


def list_answer(things: Sequence[Thing]) -> str:
    counts = Counter(things)  # keeps the order
    parts = [thing.noun if number == 1 else f"{NUMBERS[number]} {thing.plural}" for thing, number in counts.items()]
    return sentence(join_words(parts))


def ask_exist(scene: IconScene, pool: Sequence[Thing], rng: random.Random) -> QA | None:
    """Whether a thing is there; as often yes as no, and no mostly of the family of what is there."""
    present = scene.things
    truth = rng.random() < 0.5
    if truth:
        thing = rng.choice(present)
    else:
        found = _absent(present, pool, rng)
        if found is None:
            return None
        thing = found
    templates = ["Do you see {}?", "Can you see {}?", "Does the picture show {}?", "Does the image contain {}?"]
    if thing.plural:
        templates += ["Is there {}?", "Is there {} in the picture?", "Is there {} here?", "Is {} in the image?"]
        if len(present) == 1:
            templates += ["Is this {}?", "Is it {}?", "Is this a picture of {}?"]
    return rng.choice(templates).format(thing.noun), yes_no(truth)


def _absent(present: Sequence[Thing], pool: Sequence[Thing], rng: random.Random) -> Thing | None:
    """A thing that surely is not there: of the family or the group of one that is, or any."""
    like = rng.choice(present)
    family = [thing for thing in pool if thing.kin == like.kin]
    group = [thing for thing in pool if set(thing.groups) & set(like.groups)] if like.groups else family
    near = rng.choices((family, group, pool), (4, 3, 3))[0]
    for candidates in (near, pool):
        for thing in rng.sample(candidates, min(len(candidates), 8)):
            if not any(alike(thing, there) for there in present):
                return thing
    return None


def ask_count(scene: IconScene, pool: Sequence[Thing], rng: random.Random) -> QA | None:
    """How many there are: of all, of a thing, of a group."""
    present = scene.things
    if len(present) == 1 and rng.random() < 0.75:  # or nearly all answers would be "one"
        return None
    roll = rng.random()
    if roll < 0.3:
        if not all(thing.plural for thing in present):  # are grapes one thing?
            return None
        templates = ["How many {} are there?", "How many {} do you see?", "Count the {}.", "How many {} are shown?"]
        noun = rng.choice(("things", "things", "objects", "icons", "items"))
        return rng.choice(templates).format(noun), sentence(NUMBERS[len(present)])
    templates = [
        "How many {} are there?",
        "How many {} are in the picture?",
        "How many {} do you see?",
        "Count the {}.",
        "How many {} does the image show?",
        "What is the number of {}?",
    ]
    if roll < 0.38:
        absent = _absent(present, [thing for thing in pool if thing.plural], rng)
        return None if absent is None else (rng.choice(templates).format(absent.plural), sentence(NUMBERS[0]))
    # Larger numbers more often, for the same reason.
    if roll < 0.7:
        clear = [t for t in present if t.plural and all(t == other or not alike(t, other) for other in present)]
        if not clear:
            return None
        thing = rng.choices(clear, [present.count(t) for t in clear])[0]
        return rng.choice(templates).format(thing.plural), sentence(NUMBERS[present.count(thing)])
    groups = [group for group in _sure_groups(scene) if all(t.plural for t in present if group in t.groups)]
    if not groups:
        return None
    numbers = [sum(group in thing.groups for thing in present) for group in groups]
    group, number = rng.choices(list(zip(groups, numbers, strict=True)), [number**2 for number in numbers])[0]
    return rng.choice(templates).format(GROUPS[group]), sentence(NUMBERS[number])


def ask_group(scene: IconScene, pool: Sequence[Thing], rng: random.Random) -> QA | None:
    """Which animal is it?  What kind of thing is it?  Is there a vehicle?"""
    groups = _sure_groups(scene)
    roll = rng.random()
    single = [group for group in groups if sum(group in thing.groups for thing in scene.things) == 1]
    if roll < 0.45:
        if not single:
            return None
        group = rng.choice(single)
        thing = next(thing for thing in scene.things if group in thing.groups)
        if len(scene.placed) == 1:
            templates = ["Which {} is this?", "What {} is this?", "What kind of {} is it?", "What {} do you see?"]
        else:
            templates = [
                "Which {} is in the picture?",
                "What {} do you see?",
                "Which {} is there?",
                "Which of the things is {a}?",
                "What {} does the image show?",
            ]
        return rng.choice(templates).format(group, a=with_article(group)), sentence(thing.noun)
    if roll < 0.6 and len(scene.placed) == 1:
        thing = scene.things[0]
        if not thing.groups or thing.name == thing.groups[0]:
            return None
        templates = ["What kind of thing is this?", "What sort of thing is it?", "What is this in general?"]
        return rng.choice(templates), sentence(_group_noun(thing.groups[0]))
    return ask_is_group(scene, rng)


def ask_is_group(scene: IconScene, rng: random.Random) -> QA | None:
    """Is there a vehicle?  As often yes as no."""
    groups = _sure_groups(scene)
    if not groups:
        return None
    truth = rng.random() < 0.5
    if truth:
        group = rng.choice(groups)
    else:
        touched = {group for thing in scene.things for group in (*thing.groups, *thing.maybe)}
        group = rng.choice([group for group in GROUPS if group not in touched])
    templates = ["Is there {} in the picture?", "Do you see {}?", "Is there {}?", "Does the image show {}?"]
    if len(scene.placed) == 1:
        templates += ["Is this {}?", "Is it {}?", "Is that {}?"]
    return rng.choice(templates).format(_group_noun(group)), yes_no(truth)


def ask_side(scene: IconScene, pool: Sequence[Thing], rng: random.Random) -> QA | None:
    """What is on the left?  Is the dog left of the car?"""
    if len(scene.placed) < 2:
        return None
    return _ask_end(scene, rng) if rng.random() < 0.5 else _ask_relation(scene, rng)


# End of the picture, axis (0: x, 1: y), direction along it, and words for it with two icons and with more.
_ENDS = (
    (0, -1, ("on the left", "on the left side"), ("furthest to the left", "on the far left", "leftmost")),
    (0, 1, ("on the right", "on the right side"), ("furthest to the right", "on the far right", "rightmost")),
    (1, -1, ("at the top", "in the upper half"), ("at the very top", "topmost", "highest up")),
    (1, 1, ("at the bottom", "in the lower half"), ("at the very bottom", "lowest down")),
)
_SIDES = (
    (0, -1, ("to the left of", "left of", "on the left side of")),
    (0, 1, ("to the right of", "right of", "on the right side of")),
    (1, -1, ("above", "higher than")),
    (1, 1, ("below", "lower than")),
)


def _position(placed: Placed, axis: int) -> float:
    return (placed.x, placed.y)[axis]


def _ask_end(scene: IconScene, rng: random.Random) -> QA | None:
    found = []
    for axis, sign, of_two, of_more in _ENDS:
        far, near = sorted(scene.placed, key=lambda p: -_position(p, axis) * sign)[:2]
        # Of two, each must lie in its own half; of more, the next one must lie clearly further in.
        halves = (_position(far, axis) - 0.5) * sign > 0.07 and (_position(near, axis) - 0.5) * sign < -0.07
        if len(scene.placed) == 2 and halves:
            found.append((rng.choice(of_two), far))
        elif len(scene.placed) > 2 and (_position(far, axis) - _position(near, axis)) * sign >= _CLEAR:
            found.append((rng.choice(of_more), far))
    if not found:
        return None
    place, placed = rng.choice(found)
    templates = ("What is {}?", "What do you see {}?", "Which thing is {}?", "Name the thing {}.")
    if place in ("leftmost", "rightmost", "topmost"):
        templates = ("What is the {} thing?", "Which thing is {}?", "What is the {} object?", "Name the {} thing.")
    return rng.choice(templates).format(place), sentence(placed.icon.thing.noun)


def _ask_relation(scene: IconScene, rng: random.Random) -> QA | None:
    present = scene.things
    alone = [
        p for p in scene.placed if p.icon.thing.plural and sum(alike(p.icon.thing, other) for other in present) == 1
    ]
    axis, sign, words = rng.choice(_SIDES)
    pairs = [(a, b) for a in alone for b in alone if (_position(a, axis) - _position(b, axis)) * sign >= _CLEAR]
    if not pairs:
        return None
    a, b = rng.choice(pairs)
    truth = rng.random() < 0.5
    if not truth:
        a, b = b, a
    return f"Is the {a.icon.thing.name} {rng.choice(words)} the {b.icon.thing.name}?", yes_no(truth)


def _sure_groups(scene: IconScene) -> list[str]:
    """Groups with members in the picture, of which nothing else is a member perhaps."""
    sure = {group for thing in scene.things for group in thing.groups}
    doubtful = {group for thing in scene.things for group in thing.maybe}
    return [group for group in GROUPS if group in sure - doubtful]


def _group_noun(group: str) -> str:
    return "food" if group == "food" else with_article(group)


ASKS: tuple[Callable[[IconScene, Sequence[Thing], random.Random], QA | None], ...] = (
    ask_exist,
    ask_count,
    ask_group,
    ask_side,
)
