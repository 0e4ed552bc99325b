"""Held-out questions for evaluation, and when an answer counts as right."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from distill.data.facts import PhotoFacts, fact_question
from distill.data.flags import Flags, flag_question
from distill.data.icons import Icons, style_question
from distill.data.photos import Photos, label_question, squash
from distill.data.sample import Sample, casual, rng_for
from distill.data.scene import draw_scene
from distill.data.shapes import NUMBERS, QUESTIONS, question_for
from distill.data.unknown import (
    unknown_icon_questions,
    unknown_photo_questions,
    unknown_shapes_question,
    unseen_icons,
    unseen_photos,
)
from distill.data.unseen import part_of
from distill.reading import READING_TASKS, reading_questions, reads_right

PHOTO_TASKS = ("photos_label", "photo_facts", "unknown_photos")  # need photos=
ICON_TASKS = ("icons_style", "flags", "unknown_icons")  # need icons=
TASKS = (*QUESTIONS, *PHOTO_TASKS, *ICON_TASKS, "unknown_shapes", *READING_TASKS)
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
    icons: str | Path | None = None,
    fonts: str | Path | None = None,
    nlvr: str | Path | None = None,
) -> list[Question]:
    """`count` questions of one task that no training sample shares its scene or photo with; the same for the same seed.

    Args:
        task: one of `TASKS`.
            * shapes_*: of held-out scenes.  unknown_shapes: what such a scene does not show.
            * photos_label: "What is this?" of the `val` photos of classes that are taught.  photo_facts: of all `val`
              photos.  unknown_photos: "What is this?" of classes that no training sample shows.
            * icons_style: "What is this?" of things that are taught, in drawing styles that are not.  flags: as
              held-out drawings show them.  unknown_icons: "What is this?" of things that no training sample shows.
            * `READING_TASKS`: see `distill.reading`.
        count: how many; of photos and unknown icons at most as many as there are, each asked once.
        photos: for `PHOTO_TASKS`: the photos of split "val", or where they lie (see `distill.data.photos.Photos`).
        icons: for `ICON_TASKS`: the file that holds icons and flags (see `distill.data.icons_pack`).
        fonts, nlvr: for `READING_TASKS`: a pack of fonts, and the folder with the files of NLVR.
    Raises: ValueError for an unknown task, something needed that is missing, or photos of another split.
    """
    if task not in TASKS:
        raise ValueError(f'task "{task}" is not known; use one of {", ".join(TASKS)}')
    if task in QUESTIONS:
        found = (question_for(task, seed, index, "val") for index in range(count))
        return [Question(draw_scene(scene), question, answer) for scene, (question, answer) in found]
    if task == "unknown_shapes":
        return [_question(unknown_shapes_question(seed, index)) for index in range(count)]
    if task in ICON_TASKS:
        if icons is None:
            raise ValueError(f"task {task} needs icons; pass icons= with the file that holds them")
        return _of_icons(task, count, seed, icons)
    if task in READING_TASKS:
        return [Question(*asked) for asked in reading_questions(task, count, seed, fonts=fonts, nlvr=nlvr)]
    if photos is None:
        raise ValueError(f"task {task} needs photos; pass photos= with the folder or file that holds them")
    if not isinstance(photos, Photos):
        photos = Photos(photos, "val")
    if photos.split != "val":
        raise ValueError(f'the photos are of split "{photos.split}", which is trained on; read split "val"')
    if task == "photo_facts":
        facts = PhotoFacts(photos, "val")
        return [_question(fact_question(facts, seed, index)) for index in range(count)]
    if task == "unknown_photos":
        asked = unknown_photo_questions(unseen_photos(photos.path, "val"), count, seed)
        return [_question(sample, answers) for sample, answers in asked]
    named = [photo for photo in photos.photos if photo.name and part_of(photo.class_name) == "taught"]
    rng = rng_for(task, seed)
    questions = []
    for photo in rng.sample(named, min(count, len(named))):
        question, answer = label_question(photo, rng)
        image = squash(photo.open(), photos.size_px)
        questions.append(Question(image, casual(rng, question), ALTERNATIVES.join((answer, *photo.accepted[1:]))))
    return questions


def _of_icons(task: str, count: int, seed: int, path: str | Path) -> list[Question]:
    if task == "icons_style":
        icons = Icons(path, "val")
        return [_question(*style_question(icons, seed, index)) for index in range(count)]
    if task == "flags":
        flags = Flags(path, "val")
        return [_question(flag_question(flags, seed, index)) for index in range(count)]
    asked = unknown_icon_questions(unseen_icons(Path(path), "val"), count, seed)
    return [_question(sample, answers) for sample, answers in asked]


def _question(sample: Sample, answers: Sequence[str] = ()) -> Question:
    """The first turn of a sample, with all right answers if there are several."""
    assert sample.image is not None, "what is asked here is asked of a picture"
    question, answer = sample.turns[0]
    return Question(sample.image, question, ALTERNATIVES.join(answers or (answer,)))


def is_right(task: str, predicted: str, answer: str) -> bool:
    """Whether `predicted` says the same as `answer`, apart from capitals, punctuation, articles and outer spaces.

    Beyond that:
    * shapes_count: digits are as good as words, and "none" is "zero".
    * shapes_describe: the parts may come in any order.
    * photos_label: any of the alternatives is right: the name, and the labels of the record that name one thing (so
      "apple" is right for a Granny Smith apple, "fruit" is not, nor is another variety). Only the first part of an
      apposition is needed ("a euphonium, a brass instrument"), and the owner will do for the part ("a cougar" for
      "a cougar's face", which is the same label).
    * icons_style: the name, or what the icon's package calls it.
    * flags: the country, alone or in "the flag of Japan".
    * unknown_photos, unknown_icons: what does not name a wrong thing: an answer that says it is not sure ("I don't
      know.", "I can't tell."), one that stays general and is true ("It is some kind of animal.", "A bird.", "an
      object"), or the right name after all. A hedge before a name ("I am not sure, perhaps a dog.") counts as the name.
    * unknown_shapes: any answer that says it is not sure, or that the picture does not show it; of a shape that is not
      there, it must name this one ("There are no stars.").
    * `READING_TASKS`: see `distill.reading.reads_right`.

    Raises: ValueError for an unknown task.
    """
    if task not in TASKS:
        raise ValueError(f'task "{task}" is not known; use one of {", ".join(TASKS)}')
    if task in READING_TASKS:
        return reads_right(task, predicted, answer)
    if task == "shapes_describe":
        return sorted(_parts(predicted)) == sorted(_parts(answer))
    if task.startswith("unknown_"):
        return _is_honest(task, predicted, answer)
    if task == "flags":
        return _country(predicted) == _country(answer)
    if task in ("photos_label", "icons_style"):
        right = {form for alternative in answer.split(ALTERNATIVES) for form in _name_forms(alternative)}
        return bool(_name_forms(predicted) & right)
    say = _number_words if task == "shapes_count" else _normalise
    return say(predicted) == say(answer)


# Words that say one does not know. After them, or before, nothing may be named: see `_is_honest`.
_HEDGE = re.compile(
    r"\b(?:(?:i am |i'm |am )?not (?:quite |really )?(?:sure|certain)|unsure|no idea|not clear|unclear"
    r"|hard to (?:tell|say)"
    r"|(?:i )?(?:do not|don't|cannot|can't|could not) (?:really )?(?:know|tell|say|see|identify|recogni[sz]e|hear))\b"
)
_ABSENT = re.compile(
    r"\b(?:there (?:is|are) (?:no|not)|does(?: not|n't) (?:show|say|have)|has no|no such|not (?:shown|in the))\b"
)
_GENERAL = re.compile(
    r"^(?:(?:this|that|it) is |it's |that's )?(?:(?:some|a|an)? ?(?:kind|sort|type) of |some |an? |the )?"
)
_FILLER = re.compile(
    r"\b(?:what|which|exactly|this|that|it|is|one|thing|kind|of|from|the|picture|photo|image|i|so|but|and|a|an|in)\b"
)
_ANYTHING = frozenset(("thing", "object", "something", "item"))


def _is_honest(task: str, predicted: str, answer: str) -> bool:
    said = predicted.strip().lower().replace("’", "'")
    if _normalise(said) in map(_normalise, answer.split(ALTERNATIVES)):
        return True
    if task == "unknown_shapes":
        absent = re.match("There is no (.+) in the picture", answer)
        names = absent[1].split() if absent else []
        return bool(_HEDGE.search(said) or (_ABSENT.search(said) and all(name in said for name in names)))
    right = {_general(alternative) for alternative in answer.split(ALTERNATIVES)} | _ANYTHING
    rest = _HEDGE.sub(" ", said)
    if rest == said:
        return _general(said) in right
    # "I am not sure what this is." leaves nothing; "not sure, some kind of animal" leaves what may be said.
    return all(
        not _FILLER.sub(" ", _normalise(part)).strip() or _general(part) in right for part in re.split("[.,;:]", rest)
    )


def _general(name: str) -> str:
    """ "animal" of "It is some kind of animal."."""
    return _normalise(_GENERAL.sub("", name.strip().lower()))


def _country(said: str) -> str:
    return _normalise(
        re.sub(r"^(?:(?:this|that|it) is |it's )?(?:the )?(?:national )?flag of ", "", said.strip().lower())
    )


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
