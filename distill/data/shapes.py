"""Generated pictures of coloured shapes, with questions that have one answer each.

A question is asked only where the scene leaves no doubt: "the red circle" names exactly one shape, "left of" is a clear
distance. Where the answer is yes or no, it is drawn before the question is made, so both come equally often.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from distill.data.groups import Group, absent_group, ends, groups
from distill.data.relations import ask_relation
from distill.data.sample import (
    QA,
    Sample,
    Split,
    casual,
    check_split,
    join_words,
    rng_for,
    sentence,
    with_article,
    yes_no,
)
from distill.data.scene import COLORS, KINDS, Scene, draw_scene, random_scene

NUMBERS = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight")

# Each function below returns (question, answer), or None where the scene does not allow such a question.


def ask_count(scene: Scene, rng: random.Random) -> QA | None:
    """How many shapes, of any kind, of one kind, of one colour, of both."""
    roll = rng.random()
    if roll < 0.3:
        templates = [
            "How many shapes are there?",
            "How many shapes are in the picture?",
            "How many shapes do you see?",
            "Count the shapes.",
            "How many objects are there?",
            "How many things are in this image?",
            "What is the total number of shapes?",
            "Count everything in the picture.",
            "How many shapes does this picture have in total?",
        ]
        return rng.choice(templates), sentence(NUMBERS[len(scene.shapes)])
    if roll < 0.37:
        group = absent_group(scene, rng)
    else:
        found = groups(scene)  # larger groups more often, or nearly all answers would be "one"
        group = rng.choices(found, [g.count(scene) for g in found])[0]
    templates = [
        "How many {} are there?",
        "How many {} are in the picture?",
        "How many {} do you see?",
        "How many {} can you count?",
        "Count the {}.",
        "What is the number of {}?",
        "How many {} does the image show?",
        "Can you tell me how many {} there are?",
        "Number of {}?",
    ]
    if group.kind is None and rng.random() < 0.3:
        question = rng.choice(("How many shapes are {}?", "How many of the shapes are {}?")).format(group.color)
    else:
        question = rng.choice(templates).format(group.plural)
    return question, sentence(NUMBERS[group.count(scene)])


def ask_color(scene: Scene, rng: random.Random) -> QA | None:
    """The colour of a shape that is named by its kind or its place, or of several that share it."""
    kinds = [kind for kind in KINDS if scene.count(kind)]
    colors = {kind: {s.color for s in scene.shapes if s.kind == kind} for kind in kinds}
    plain = [kind for kind in kinds if len(colors[kind]) == 1]
    at_ends = ends(scene)
    if at_ends and (not plain or rng.random() < 0.25):
        place, shape = rng.choice(at_ends)
        templates = [
            "What color is the {} shape?",
            "Which color does the {} shape have?",
            "The {} shape is what color?",
        ]
        return rng.choice(templates).format(place), sentence(shape.color)
    if not plain:
        return None
    kind = rng.choice(plain)
    answer = sentence(next(iter(colors[kind])))
    if scene.count(kind) > 1:
        templates = ["What color are the {}?", "What is the color of the {}?", "Which color do the {} have?"]
        return rng.choice(templates).format(Group(kind).plural), answer
    templates = [
        "What color is the {}?",
        "What is the color of the {}?",
        "Which color does the {} have?",
        "Tell me the color of the {}.",
        "What color is this {}?",
        "The {} is which color?",
    ]
    name = "shape" if len(scene.shapes) == 1 and rng.random() < 0.3 else kind
    return rng.choice(templates).format(name), answer


def ask_shape(scene: Scene, rng: random.Random) -> QA | None:
    """The kind of a shape that is named by its colour or its place."""
    single = [s for s in scene.shapes if scene.count(None, s.color) == 1]
    at_ends = ends(scene)
    if at_ends and (not single or rng.random() < 0.25):
        place, shape = rng.choice(at_ends)
        templates = ["What shape is the {} one?", "Which kind of shape is the {} one?", "What is the {} shape called?"]
        # Not "the leftmost shape", which asks for its colour too (see `relations.ask_end`).
        return rng.choice(templates).format(place), sentence(with_article(shape.kind))
    if not single:
        return None
    shape = rng.choice(single)
    if len(scene.shapes) == 1 and rng.random() < 0.5:
        templates = [
            "What shape is this?",
            "What kind of shape is shown?",
            "What kind of shape is this?",
            "Name the shape.",
        ]
        return rng.choice(templates), sentence(with_article(shape.kind))
    templates = [
        "What shape is {}?",
        "Which shape is {}?",
        "What is the {} shape?",
        "What kind of shape is the {} one?",
        "What shape is the {} object?",
        "The {} thing is which shape?",
    ]
    return rng.choice(templates).format(shape.color), sentence(with_article(shape.kind))


def ask_exist(scene: Scene, rng: random.Random) -> QA | None:
    """Whether something is in the picture; as often yes as no."""
    truth = rng.random() < 0.5
    group = rng.choice(groups(scene)) if truth else absent_group(scene, rng)
    if rng.random() < 0.5:
        templates = [
            "Is there {}?",
            "Is there {} in the picture?",
            "Do you see {}?",
            "Can you see {}?",
            "Does the image show {}?",
            "Does the picture contain {}?",
        ]
        return rng.choice(templates).format(with_article(group.singular)), yes_no(truth)
    templates = [
        "Are there any {}?",
        "Are there any {} in the picture?",
        "Do you see any {}?",
        "Can you find any {}?",
        "Any {} here?",
        "Does the picture have any {}?",
    ]
    return rng.choice(templates).format(group.plural), yes_no(truth)


def ask_compare(scene: Scene, rng: random.Random) -> QA | None:
    """Which of two groups has more members."""
    everything = [Group(kind=k) for k in KINDS] if rng.random() < 0.5 else [Group(color=c) for c in COLORS]
    present = [g for g in everything if g.count(scene)]
    absent = [g for g in everything if not g.count(scene)]
    equal = [(a, b) for a in present for b in present if a != b and a.count(scene) == b.count(scene)]
    unequal = [(a, b) for a in present for b in present if a.count(scene) > b.count(scene)]
    if absent and (not unequal or rng.random() < 0.15):
        unequal = [(a, b) for a in present for b in absent]
    if not unequal:  # one of every kind
        return None
    more, fewer = rng.choice(unequal)
    if rng.random() < 0.5:
        truth = rng.random() < 0.5
        if truth:
            a, b = more, fewer
        else:
            a, b = rng.choice(equal) if equal and rng.random() < 0.35 else (fewer, more)
        templates = [
            "Are there more {} than {}?",
            "Do you see more {} than {}?",
            "Does the picture have more {} than {}?",
        ]
        if rng.random() < 0.3:
            a, b = b, a
            templates = ["Are there fewer {} than {}?", "Do you see fewer {} than {}?"]
        return rng.choice(templates).format(a.plural, b.plural), yes_no(truth)
    if equal and rng.random() < 0.25:
        (a, b), answer = rng.choice(equal), "The same number."
    else:
        (a, b), answer = rng.sample((more, fewer), 2), sentence(more.plural)
    templates = [
        "Are there more {} or more {}?",
        "Which are there more of, {} or {}?",
        "What is there more of, {} or {}?",
        "More {} or {}?",
        "Which group is larger, the {} or the {}?",
    ]
    return rng.choice(templates).format(a.plural, b.plural), answer


def ask_describe(scene: Scene, rng: random.Random) -> QA | None:
    """Everything in the picture, by kind and then by colour."""
    counts = [(Group(kind, color), scene.count(kind, color)) for kind in KINDS for color in COLORS]
    parts = [with_article(g.singular) if n == 1 else f"{NUMBERS[n]} {g.plural}" for g, n in counts if n]
    templates = [
        "What do you see?",
        "What is in the picture?",
        "Describe the picture.",
        "Describe this image.",
        "What does the image show?",
        "What is shown here?",
        "What can you see in this picture?",
        "Which shapes are in the picture?",
        "List the shapes.",
        "What's in the image?",
        "Tell me what is in this picture.",
    ]
    return rng.choice(templates), sentence(join_words(parts))


QUESTIONS: dict[str, Callable[[Scene, random.Random], QA | None]] = {
    "shapes_count": ask_count,
    "shapes_color": ask_color,
    "shapes_shape": ask_shape,
    "shapes_exist": ask_exist,
    "shapes_relation": ask_relation,
    "shapes_compare": ask_compare,
    "shapes_describe": ask_describe,
}
_DESCRIBE_SHARE = 0.75
_WEIGHTS = (1.5, 1.0, 1.0, 1.0, 1.5, 1.0, 1.5)


class Shapes:
    """Endless pictures of shapes with one to six questions each. A `Source`."""

    name = "shapes"

    def __init__(self, split: Split = "train", *, size_px: int = 224) -> None:
        """Raises: ValueError if `split` is neither "train" (scenes not held out) nor "val" (held-out ones)."""
        self.split = check_split(split)
        self.size_px = size_px

    def scene(self, seed: int, index: int, attempt: int = 0) -> tuple[Scene, tuple[QA, ...]]:
        """The scene and the questions behind `sample`."""
        rng = rng_for(self.name, self.split, seed, index, attempt)
        scene = random_scene(rng, self.split)
        num_turns = rng.choice((0, 1, 3, 4, 5, 5))
        turns: list[QA] = []
        asks = [ask for ask in QUESTIONS.values() if ask is not ask_describe]
        weights = [w for ask, w in zip(QUESTIONS.values(), _WEIGHTS, strict=True) if ask is not ask_describe]
        # Many questions a picture, and mostly a description of all of it: a picture costs far more to read than the
        # text, and what is learned from describing it serves every other question. It gives all away, so it comes last.
        describe = not num_turns or rng.random() < _DESCRIBE_SHARE
        while len(turns) < num_turns + describe:
            ask = ask_describe if len(turns) == num_turns else rng.choices(asks, weights)[0]
            turn = ask(scene, rng)
            if turn is not None and turn not in turns:
                turns.append(turn)
        return scene, tuple((casual(rng, question), answer) for question, answer in turns)

    def sample(self, seed: int, index: int, attempt: int = 0) -> Sample:
        scene, turns = self.scene(seed, index, attempt)
        return Sample(draw_scene(scene, self.size_px), turns, self.name)


def question_for(task: str, seed: int, index: int, split: Split = "val") -> tuple[Scene, QA]:
    """One scene that allows a question of this task (a key of `QUESTIONS`), and that question.

    Raises: ValueError if the task is not known.
    """
    if task not in QUESTIONS:
        raise ValueError(f'task "{task}" is not known; use one of {", ".join(QUESTIONS)}')
    rng = rng_for(task, split, seed, index)
    while True:
        scene = random_scene(rng, split)
        turn = QUESTIONS[task](scene, rng)
        if turn is not None:
            return scene, (casual(rng, turn[0]), turn[1])
