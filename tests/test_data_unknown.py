"""Honest answers: true of the picture, and never about things whose names are taught or that only evaluation shows."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from distill.data.icons import Icons
from distill.data.mixture import open_sources
from distill.data.photos import Photo, Photos, read_photos
from distill.data.sample import rng_for
from distill.data.scene import COLORS, KINDS, random_scene
from distill.data.unknown import NOT_SURE, Unknown, ask_absent, ask_unanswerable, unseen_icons, unseen_photos
from distill.data.unseen import part_of
from distill.tasks import held_out, is_right
from tests import drawings
from tests.test_data import photo_record, write_shard

# Of each part: taught, shown without a name in training, only in evaluation.
LABELS = {"taught": ["sunflower", "panda", "pizza"], "train": ["hedgehog", "octopus"], "val": ["ferry", "crayfish"]}


@pytest.fixture(scope="module")
def icons(tmp_path_factory) -> Path:
    return drawings.write_icons(tmp_path_factory.mktemp("icons") / "icons.tar.gz")


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unknown") / "photos"
    folder.mkdir()
    for split in ("train", "val"):
        records = {f"{split}-{label}": photo_record(label) for labels in LABELS.values() for label in labels}
        records[f"{split}-lime"] = photo_record("Lime", "fruit") | {"labels": ["Lime", "lime", "fruit"]}
        write_shard(folder / f"{split}-0000.tar", records)
    return folder


def test_classes_have_the_parts_that_these_tests_use():
    assert {part: [name for name in names if part_of(name) == part] for part, names in LABELS.items()} == LABELS
    assert part_of("lime") == "val"


@pytest.mark.parametrize(
    ("labels", "human", "class_name"),
    [
        (("Granny Smith apple", "apple", "fruit"), False, "apple"),
        (("Dalmatian dog",), False, "dalmatian dog"),
        (("glass", "waste"), False, ""),  # a material
        (("person", "car"), True, ""),
        ((), False, ""),
    ],
)
def test_photos_are_held_out_by_class(labels, human, class_name):
    assert Photo("x", b"", labels, (), human).class_name == class_name


def test_parts_do_not_overlap_and_names_are_taught_of_the_rest_only(icons, photos):
    train, val = unseen_photos(photos, "train"), unseen_photos(photos, "val")
    assert {p.key for p in train} == {"train-hedgehog", "train-octopus"}
    assert {p.class_name for p in val} == {"ferry", "crayfish", "lime"}
    assert len(val) == 6, "evaluation may use the photos of both splits: training shows neither"
    names = [{icon.thing.name for icon in unseen_icons(icons, split)} for split in ("train", "val")]
    assert names == [{thing.name for thing in drawings.some_things()[part]} for part in ("train", "val")]
    taught = {photo.class_name for photo in Photos(photos, taught_only=True).photos}
    assert taught == set(LABELS["taught"])
    assert len(Photos(photos).photos) == len(read_photos(photos, "train")) == 8

    sources = dict(open_sources({"photos": 1, "unknown": 1, "icons": 1, "photo_facts": 1}, photos=photos, icons=icons))
    shown = {photo.class_name for source in sources for photo in getattr(source, "photos", ())}
    assert shown == {*LABELS["taught"], *LABELS["train"]}, "training shows what is only to be evaluated"
    (alone,) = (source for source, _ in open_sources({"photos": 1}, photos=photos))
    assert len(alone.photos) == 8, "without the source Unknown, all classes are taught"


def test_samples_repeat(icons, photos):
    a, b = (Unknown(icons=icons, photos=photos).sample(1, 5) for _ in range(2))
    assert a.turns == b.turns
    assert np.array_equal(np.asarray(a.image), np.asarray(b.image))
    assert a.turns != Unknown(icons=icons, photos=photos).sample(1, 5, attempt=1).turns
    assert {len(Unknown("val").sample(0, i).turns) for i in range(30)} >= {2, 3}, "shapes need no files"


def test_unknown_things_are_not_named(icons, photos):
    source = Unknown(icons=icons, photos=photos)
    assert [icon.thing.name for icon in source.icons]
    general: Counter[str] = Counter()
    for i in range(600):
        sample = source.sample(0, i)
        assert sample.image.size == (224, 224)
        for _, answer in sample.turns:
            if answer == NOT_SURE or answer.startswith("It is some kind of"):
                general[answer] += 1
                assert [other for _, other in sample.turns if other not in ("Yes.", "No.")] == [answer]
    assert general[NOT_SURE] > 30
    assert general["It is some kind of animal."] > 30, "the hedgehog and the octopus"
    said = {answer for i in range(600) for _, answer in source.sample(1, i).turns}
    assert not {answer for answer in said if re.search("hedgehog|octopus|ferry|crayfish", answer)}
    assert {"A sunflower.", "A panda.", "A pizza."} & said, "names of taught classes stand beside"


def test_scraps_of_photos_show_too_little(icons, photos):
    """Small parts of photos of taught things: their name is no answer."""
    source = Unknown(icons=icons, photos=photos)
    for i in range(20):
        sample = source._of_scrap(rng_for("scrap", i))
        assert sample.image.size == (224, 224)
        assert [answer for _, answer in sample.turns] == [NOT_SURE]


def test_absent_shapes_are_absent():
    questions = set()
    for i in range(400):
        scene = random_scene(rng_for("absent", i), "train")
        question, answer = ask_absent(scene, rng_for("ask", i))
        name = re.fullmatch("There is no (.+) in the picture.", answer)[1]
        words = name.split()
        kind = next((k for k in KINDS if k in words), None)
        color = next((c for c in COLORS if c in words), None)
        assert name in question
        assert kind or color
        assert not scene.count(kind, color), (scene.content, question)
        questions.add(question.replace(name, "{}"))
    assert len(questions) >= 8


def test_scenes_have_questions_with_answers_too():
    source = Unknown()
    unanswered = {ask_unanswerable(rng_for(i))[1] for i in range(500)}
    assert len(unanswered) > 10
    kinds: Counter[str] = Counter()
    for i in range(300):
        for _, answer in source.sample(0, i).turns:
            honest = answer in unanswered or answer.startswith("There is no ")
            kinds["absent" if answer.startswith("There") else "unanswerable" if honest else "answered"] += 1
    total = sum(kinds.values())
    assert kinds["answered"] > 0.3 * total, "a model that never answers would do well"
    assert min(kinds["absent"], kinds["unanswerable"]) > 0.1 * total


def test_held_out_questions_repeat_and_accept_their_own_answers(icons, photos):
    for task in ("unknown_photos", "unknown_icons", "unknown_shapes"):
        questions, again = (held_out(task, 5, seed=1, photos=photos, icons=icons) for _ in range(2))
        assert len(questions) == 5
        for a, b in zip(questions, again, strict=True):
            assert (a.question, a.answer) == (b.question, b.answer)
            assert np.array_equal(np.asarray(a.image), np.asarray(b.image))
            assert all(is_right(task, answer, a.answer) for answer in a.answer.split("|"))
            assert is_right(task, "I can't tell.", a.answer)
            assert not is_right(task, "", a.answer)
            assert not is_right(task, "A toaster.", a.answer)
    names = {question.answer.split("|")[2] for question in held_out("unknown_photos", 100, photos=photos)}
    assert names == {"a ferry", "a crayfish", "Lime"}
    with pytest.raises(ValueError, match="task unknown_photos needs photos"):
        held_out("unknown_photos", 1)


def test_named_photos_are_asked_of_taught_classes_only(icons, photos):
    answers = {question.answer.split("|")[0] for question in held_out("photos_label", 100, photos=photos)}
    assert answers == {"A sunflower.", "A panda.", "A pizza."}
    things = {thing.name for thing in Icons(icons).things}
    assert not things & {icon.thing.name for split in ("train", "val") for icon in unseen_icons(icons, split)}


ANIMAL = "It is some kind of animal.|I am not sure what this is.|a hedgehog|hedgehog"


@pytest.mark.parametrize(
    ("task", "predicted", "answer", "right"),
    [
        ("unknown_photos", "It is some kind of animal.", ANIMAL, True),
        ("unknown_photos", "An animal.", ANIMAL, True),
        ("unknown_photos", "Some kind of animal, I am not sure which.", ANIMAL, True),
        ("unknown_photos", "I am not sure what this is.", ANIMAL, True),
        ("unknown_photos", "I don't know.", ANIMAL, True),
        ("unknown_photos", "I'm not sure.", ANIMAL, True),
        ("unknown_photos", "I cannot tell what it is.", ANIMAL, True),
        ("unknown_photos", "This is an object.", ANIMAL, True),
        ("unknown_photos", "A hedgehog.", ANIMAL, True),
        ("unknown_photos", "A porcupine.", ANIMAL, False),
        ("unknown_photos", "It is some kind of vehicle.", ANIMAL, False),
        ("unknown_photos", "It is some kind of dog.", ANIMAL, False),
        ("unknown_photos", "I am not sure, perhaps a dog.", ANIMAL, False),
        ("unknown_photos", "Something else.", ANIMAL, False),
        ("unknown_shapes", "There is no star in the picture.", "There is no star in the picture.", True),
        ("unknown_shapes", "There are no stars.", "There is no star in the picture.", True),
        ("unknown_shapes", "I can't tell.", "There is no star in the picture.", True),
        ("unknown_shapes", "There is no circle in the picture.", "There is no star in the picture.", False),
        ("unknown_shapes", "Red.", "There is no star in the picture.", False),
        ("unknown_shapes", "The picture does not say.", "I can't tell who owns it.", True),
        ("unknown_shapes", "It is three o'clock.", "I can't tell the time from this picture.", False),
    ],
)
def test_scoring(task, predicted, answer, right):
    assert is_right(task, predicted, answer) is right
