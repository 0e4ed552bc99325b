"""NLVR: statements keep their truth however the picture changes, and hidden pictures never come up in training."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from distill.data.mixture import open_sources
from distill.data.nlvr import (
    Item,
    Nlvr,
    Statement,
    ask,
    ask_count,
    draw_boxes,
    may_mirror,
    may_recolor,
    mirrored,
    read_statements,
    recolored,
)
from distill.data.sample import rng_for
from distill.data.shapes import NUMBERS
from distill.reading import reading_questions, reads_right
from tests.reading import statement, write_nlvr

BOXES = (
    (Item("square", "yellow", 10, 20, 20), Item("circle", "blue", 60, 60, 30)),
    (Item("triangle", "black", 0, 0, 10),),
    (),
)


def test_records_are_read(nlvr_folder: Path) -> None:
    first, second, *_ = read_statements(nlvr_folder / "nlvr_dev.jsonl.gz")
    assert (first.text, first.truth, second.truth) == ("There is a yellow square.", True, False)
    assert first.boxes[2] == (Item("square", "blue", 0, 10, 20),)


def test_lost_first_letters_are_put_back(tmp_path: Path) -> None:
    path = tmp_path / "cut.jsonl"
    texts = ("ll 3 boxes have a square", "t least one box  has two", "There is a tower")
    path.write_text("\n".join(json.dumps(statement(0, text=text)) for text in texts))
    assert [s.text for s in read_statements(path)] == [
        "All 3 boxes have a square",
        "At least one box has two",
        "There is a tower",
    ]


def test_hidden_statements_are_held_out(nlvr_folder: Path) -> None:
    train, val = Nlvr(nlvr_folder), Nlvr(nlvr_folder, "val")
    assert len(train.statements) == 20
    assert len(val.statements) == 10
    hidden = {s.picture for s in val.statements}
    assert not any(train.statement(0, i)[0].picture in hidden for i in range(300))
    assert all(val.statement(0, i)[0].picture in hidden for i in range(30))


def test_a_hidden_picture_in_the_training_files_is_left_out(tmp_path: Path) -> None:
    folder = write_nlvr(tmp_path)
    hidden = json.loads(gzip.decompress((folder / "nlvr_hidden.jsonl.gz").read_bytes()).splitlines()[0])
    hidden["boxes"].reverse()
    path = folder / "nlvr_dev.jsonl.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + b"\n" + json.dumps(hidden).encode()))
    assert len(Nlvr(folder).statements) == 20


def test_recoloring_changes_text_and_picture_alike() -> None:
    made = Statement("There is a Yellow block over a blue block", True, BOXES)
    changed = recolored(made, ("black", "yellow", "blue"))
    assert changed.text == "There is a Black block over a yellow block"
    assert [item.color for box in changed.boxes for item in box] == ["black", "yellow", "blue"]
    assert [(i.kind, i.x, i.y, i.size) for b in changed.boxes for i in b] == [
        (i.kind, i.x, i.y, i.size) for b in BOXES for i in b
    ]
    assert recolored(made, ("yellow", "blue", "black")) == made


@pytest.mark.parametrize(
    ("text", "recolor", "mirror"),
    [
        ("There is a black block below a yellow block", True, True),
        ("There is ablue block", False, True),
        ("a bule item touching the right wall", False, False),
        ("two blacks blocks", False, True),
        ("an item on the left", True, False),
    ],
)
def test_what_may_change_where_words_allow_it(text: str, recolor: bool, mirror: bool) -> None:
    assert may_recolor(text) is recolor
    assert may_mirror(text) is mirror


def test_mirroring_twice_changes_nothing() -> None:
    made = Statement("x", True, BOXES)
    assert mirrored(made).boxes[0][0] == Item("square", "yellow", 70, 20, 20)
    assert mirrored(mirrored(made)) == made


def test_both_answers_come_equally_often_and_are_right(nlvr_folder: Path) -> None:
    source = Nlvr(nlvr_folder)
    answers: Counter[str] = Counter()
    for i in range(600):
        made, _, turns = source.statement(0, i)
        said = re.sub(r"\W", "", made.text).lower()
        ((_, answer),) = [turn for turn in turns if said in re.sub(r"\W", "", turn[0]).lower()]
        assert (answer in ("True.", "Yes.")) == made.truth
        answers[answer] += 1
    assert set(answers) == {"True.", "False.", "Yes.", "No."}
    assert abs(answers["True."] + answers["Yes."] - 300) < 50


def test_questions_fit_their_answers() -> None:
    for i in range(60):
        question, answer = ask(Statement("there are 2 blocks", True, BOXES), rng_for(i))
        assert "There are 2 blocks." in question
        assert answer == ("True." if "true or false" in question.lower() else "Yes.")


def test_counts_are_right() -> None:
    items = [item for box in BOXES for item in box]
    for i in range(100):
        turn = ask_count(Statement("x", True, BOXES), rng_for(i))
        assert turn is not None
        kind = next((k for k in ("square", "circle", "triangle") if k in turn[0]), None)
        color = next((c for c in ("yellow", "blue", "black") if c in turn[0]), None)
        number = sum(kind in (None, item.kind) and color in (None, item.color) for item in items)
        assert turn[1].lower() == NUMBERS[number] + "."


def test_the_picture_shows_the_boxes() -> None:
    """Each colour covers as much as its shapes do, in every layout."""
    for i in range(20):
        pixels = np.asarray(draw_boxes(BOXES, rng_for("draw", i))).astype(int)
        areas = {}
        for name, rgb in (("yellow", (250, 230, 0)), ("blue", (0, 150, 255)), ("black", (0, 0, 0))):
            areas[name] = int((np.abs(pixels - rgb).sum(2) < 30).sum())
        assert 1.5 < areas["blue"] / areas["yellow"] < 2.1  # a circle of 30 over a square of 20: 1.77
        assert 0.05 < areas["black"] / areas["yellow"] < 0.2  # a triangle of 10: 0.125


def test_same_seed_and_index_give_the_same_sample(nlvr_folder: Path) -> None:
    a, b = Nlvr(nlvr_folder).sample(1, 5), Nlvr(nlvr_folder).sample(1, 5)
    assert a.turns == b.turns
    assert np.array_equal(np.asarray(a.image), np.asarray(b.image))
    assert a.image.size == (224, 224)
    ((source, weight),) = open_sources({"nlvr": 2}, text=[nlvr_folder])
    assert source.sample(1, 5).turns == a.turns
    assert weight == 2


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nlvr_hidden\.jsonl\.gz of NLVR is not in"):
        Nlvr(tmp_path)
    folder = write_nlvr(tmp_path / "nlvr")
    (folder / "nlvr_dev.jsonl.gz").write_bytes(gzip.compress(b'{"sentence": "x"}'))
    with pytest.raises(ValueError, match=r"nlvr_dev\.jsonl\.gz, line 1"):
        Nlvr(folder)
    (folder / "nlvr_dev.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(ValueError, match="cannot be read"):
        Nlvr(folder)
    with pytest.raises(ValueError, match="pass nlvr="):
        list(reading_questions("nlvr", 1))


def test_every_hidden_statement_is_asked_once(nlvr_folder: Path) -> None:
    asked = list(reading_questions("nlvr", 100, nlvr=nlvr_folder))
    assert len(asked) == 10
    assert all(reads_right("nlvr", answer, answer) for _, _, answer in asked)


@pytest.mark.parametrize(
    ("predicted", "answer", "right"),
    [
        ("yes", "True.", True),
        ("True", "Yes.", True),
        ("No, it is not.", "False.", True),
        ("Yes.", "No.", False),
        ("Perhaps.", "No.", False),
    ],
)
def test_scoring(predicted: str, answer: str, right: bool) -> None:
    assert reads_right("nlvr", predicted, answer) is right
