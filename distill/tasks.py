"""Held-out questions for evaluation, and when an answer counts as right."""

from __future__ import annotations

import re
import string
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from distill.data.photos import Photos, label_question, squash
from distill.data.sample import casual, rng_for
from distill.data.scene import draw_scene
from distill.data.shapes import NUMBERS, QUESTIONS, question_for
from distill.reading import READING_TASKS, reading_questions, reads_right

TASKS = (*QUESTIONS, "photos_label", *READING_TASKS)
ALTERNATIVES = "|"  # separates right answers, the best first


class Question(NamedTuple):
    """image: RGB, 224 x 224.  answer: what is right; several right answers are separated by "|".

    The first is to the letter what training samples answer, so it can also be compared token by token.
    """

    image: Image.Image
    question: str
    answer: str


def held_out(
    task: str,
    count: int,
    seed: int = 0,
    *,
    photos: str | Path | Photos | None = None,
    fonts: str | Path | None = None,
    nlvr: str | Path | None = None,
) -> list[Question]:
    """`count` questions of one task that no training sample shares its scene or photo with; the same for the same seed.

    Args:
        task: one of `TASKS`. `shapes_*` draw their pictures; `photos_label` asks "What is this?" of the `val` split.
        count: how many; of photos at most as many as there are, each asked once.
        photos: for `photos_label`: the photos of split "val", or where they lie (see `distill.data.photos.Photos`).
        fonts, nlvr: for `distill.reading.READING_TASKS`: a pack of fonts, and the folder with the files of NLVR.
    Raises: ValueError for an unknown task, `photos_label` without photos, or photos of another split.
    """
    if task in QUESTIONS:
        found = (question_for(task, seed, index, "val") for index in range(count))
        return [Question(draw_scene(scene), question, answer) for scene, (question, answer) in found]
    if task in READING_TASKS:
        return [Question(*asked) for asked in reading_questions(task, count, seed, fonts=fonts, nlvr=nlvr)]
    if task != "photos_label":
        raise ValueError(f'task "{task}" is not known; use one of {", ".join(TASKS)}')
    if photos is None:
        raise ValueError("task photos_label needs photos; pass photos= with the folder or file that holds them")
    if not isinstance(photos, Photos):
        photos = Photos(photos, "val")
    if photos.split != "val":
        raise ValueError(f'the photos are of split "{photos.split}", which is trained on; read split "val"')
    named = [photo for photo in photos.photos if photo.name]
    rng = rng_for(task, seed)
    questions = []
    for photo in rng.sample(named, min(count, len(named))):
        question, answer = label_question(photo, rng)
        image = squash(photo.open(), photos.size_px)
        questions.append(Question(image, casual(rng, question), ALTERNATIVES.join((answer, *photo.accepted[1:]))))
    return questions


def is_right(task: str, predicted: str, answer: str) -> bool:
    """Whether `predicted` says the same as `answer`, apart from capitals, punctuation, articles and outer spaces.

    Beyond that:
    * shapes_count: digits are as good as words, and "none" is "zero".
    * shapes_describe: the parts may come in any order.
    * photos_label: any of the alternatives is right: the name, and the labels of the record that name one thing (so
      "apple" is right for a Granny Smith apple, "fruit" is not, nor is another variety). Only the first part of an
      apposition is needed ("a euphonium, a brass instrument"), and the owner will do for the part ("a cougar" for
      "a cougar's face", which is the same label).
    * printed_text, charts_bar_pie, digits, nlvr: see `distill.reading.reads_right`.

    Raises: ValueError for an unknown task.
    """
    if task not in TASKS:
        raise ValueError(f'task "{task}" is not known; use one of {", ".join(TASKS)}')
    if task in READING_TASKS:
        return reads_right(task, predicted, answer)
    if task == "shapes_describe":
        return sorted(_parts(predicted)) == sorted(_parts(answer))
    if task == "photos_label":
        right = {form for alternative in answer.split(ALTERNATIVES) for form in _name_forms(alternative)}
        return bool(_name_forms(predicted) & right)
    say = _number_words if task == "shapes_count" else _normalise
    return say(predicted) == say(answer)


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_DIGITS = {str(number): word for number, word in enumerate(NUMBERS)} | {"zero": NUMBERS[0]}


def _normalise(text: str) -> str:
    text = _ARTICLES.sub(" ", text.lower().replace("’", "'"))
    return " ".join(text.translate(_NO_PUNCTUATION).split())


_NO_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation, " "))


def _number_words(text: str) -> str:
    return " ".join(_DIGITS.get(word, word) for word in _normalise(text).split())


def _parts(description: str) -> list[str]:
    """["red circle", "two blue squares"] of "A red circle and two blue squares."; "one" is as good as "a"."""
    parts = (_number_words(part).removeprefix("one ") for part in re.split(r",|\band\b", description))
    return [part for part in parts if part]


def _name_forms(name: str) -> set[str]:
    """Ways to say the same name, normalised."""
    name = re.sub(r"^(this is|it is|it's)\b", "", name.strip().lower().replace("’", "'"))
    forms = (name, name.split(",")[0], re.split(r"'s\b", name)[0])
    plain = (_normalise(form).removeprefix("pair of ").removeprefix("piece of ") for form in forms)
    return {form for form in plain if form}
