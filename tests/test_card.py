"""What is measured in a model card: put between its marks at one command, and nothing else of the card moves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from distill.__main__ import main
from distill.card import LABELS, PARTS, Trained, check_marks, fill_card, read_log, training_part
from distill.failures import write_failures
from distill.scores import Failure
from distill.tasks import TASKS, Question
from mmmamba.checkpoint import BUNDLED_DIR

CARD = """# A model

<!-- begin scores -->
old numbers
<!-- end scores -->
In between, by hand: | 50 % |

<!-- begin failures --><!-- end failures -->
<!-- begin training -->
<!-- end training -->
<!-- begin attribution -->
<!-- end attribution -->
The end.
"""


def line(stage: str, step: int, seconds: float) -> str:
    return json.dumps({"stage": stage, "step": step, "seconds": seconds, "loss": 1.0})


@pytest.fixture
def card(tmp_path: Path) -> Path:
    path = tmp_path / "README.md"
    path.write_text(CARD, encoding="utf-8")
    return path


def scores_file(path: Path, exact: int, right: int | None) -> Path:
    tasks = {"flags": {"count": 10, "exact": exact, "right": right, "left_out": 0}}
    path.write_text(json.dumps({"tasks": tasks, "text_kl": {"nats": 0.25, "tokens": 70}}))
    return path


def test_every_part_at_once_and_again(card: Path, tmp_path: Path) -> None:
    red = Image.new("RGB", (32, 32), "red")
    shown = [Failure("flags", Question(red, "Whose?", "Japan"), "Peru"), Failure("flags", Question(red, "?", "x"), "y")]
    write_failures(shown, tmp_path / "wrong")
    log = tmp_path / "log.jsonl"
    log.write_text(
        "\n".join([line("stage1", 1, 1), line("stage1", 75, 90), line("stage3", 1, 0), line("stage3", 9, 30)])
    )
    (tmp_path / "ATTRIBUTION.md").write_text("| photos | CC BY 4.0 |\n")
    made = [
        f"teacher={scores_file(tmp_path / 'a.json', 8, None)}",
        f"linear={scores_file(tmp_path / 'b.json', 6, None)}",
    ]
    options = ["--failures", f"linear={tmp_path / 'wrong'}", "--trained", f"linear={log}", "--gpus", "2"]
    main(["card", str(card), "--scores", *made, *options, "--attribution", str(tmp_path / "ATTRIBUTION.md")])
    text = card.read_text()
    assert "old numbers" not in text
    assert f"| {LABELS['flags']} | 10 | 80.0 | 60.0 |" in text
    assert "| % of teacher |  | 100.0 | 75.0 |" in text
    assert "Right in these" not in text, "replies were not decoded"
    assert "| ![flags](failures/linear/flags-1.webp) | flags | Whose? | Japan | Peru |" in text
    assert (tmp_path / "failures" / "linear" / "flags-2.webp").is_file()
    assert "| linear | stage1 | 75 | 3.0 |" in text
    assert "| **sum** | | | **4.0** |" in text
    assert "| photos | CC BY 4.0 |" in text
    by_hand = [t for t in CARD.replace("--><!--", "-->\n<!--").splitlines() if t not in ("", "old numbers")]
    assert [t for t in text.splitlines() if t in by_hand] == by_hand, "what was written by hand moved"

    # New weights: fewer failures, other numbers, decoded; the rest stays.
    write_failures(shown[:1], tmp_path / "fewer")
    made = [f"teacher={scores_file(tmp_path / 'a.json', 9, 10)}", f"linear={scores_file(tmp_path / 'b.json', 9, 9)}"]
    main(["card", str(card), "--scores", *made, "--failures", f"linear={tmp_path / 'fewer'}"])
    again = card.read_text()
    assert "| 80.0 |" not in again
    exact, right = again.split("Right in these or other words")
    assert f"| {LABELS['flags']} | 10 | 90.0 | 90.0 |" in exact
    assert f"| {LABELS['flags']} | 10 | 100.0 | 90.0 |" in right
    assert "| linear | stage1 | 75 | 3.0 |" in again
    assert [f.name for f in (tmp_path / "failures" / "linear").iterdir()] == ["flags-1.webp"]
    main(["card", str(card), "--scores", *made, "--failures", f"linear={tmp_path / 'fewer'}"])
    assert card.read_text() == again


def test_a_card_without_a_place_is_left_alone(card: Path, tmp_path: Path) -> None:
    scores = str(scores_file(tmp_path / "teacher.json", 1, None))
    for broken in ("no marks", CARD.replace("end scores", "end"), "<!-- end scores --><!-- begin scores -->", CARD * 2):
        card.write_text(broken)
        with pytest.raises(ValueError, match=r"has no place for scores: put the lines <!-- begin scores --> and "):
            main(["card", str(card), "--scores", scores])
        assert card.read_text() == broken
    card.write_text("no marks")
    write_failures([], tmp_path / "none")
    with pytest.raises(ValueError, match="no place for failures"):
        main(["card", str(card), "--failures", str(tmp_path / "none")])
    assert not (tmp_path / "failures").exists(), "pictures were copied for no one"


def test_what_cannot_go_into_a_card(card: Path, tmp_path: Path) -> None:
    def fails(*options: str) -> str:
        with pytest.raises(ValueError, match=r"pass|holds|name|read|lacks") as raised:
            main(["card", str(card), *options])
        assert card.read_text() == CARD
        return str(raised.value)

    assert "nothing to write" in fails()
    assert "holds no failures.md" in fails("--failures", str(tmp_path))
    one = str(scores_file(tmp_path / "teacher.json", 1, None))
    assert "names of their own, NAME=PATH" in fails("--scores", one, one)
    (tmp_path / "log").write_text('{"stage": "stage1", "eval_count": 3}\n')
    assert "holds no line of a stage" in fails("--trained", str(tmp_path / "log"))
    (tmp_path / "log").write_text("{")
    assert "cannot be read" in fails("--trained", str(tmp_path / "log"))
    page = write_failures([Failure("digits", Question(Image.new("RGB", (8, 8)), "?", "1"), "2")], tmp_path / "wrong")
    (page.parent / "digits-1.webp").unlink()
    assert "lacks digits-1.webp" in fails("--failures", str(page.parent))


def test_stages_of_a_log(tmp_path: Path) -> None:
    """One that was resumed from a checkpoint, whose clock goes on there, and the same stage of another run."""
    log = tmp_path / "log.jsonl"
    lines: list[Any] = [
        line("teacher", 1, 20),
        line("teacher", 50, 60),
        line("teacher", 40, 54),
        line("teacher", 100, 120),
    ]
    lines += [json.dumps({"stage": "teacher", "exact_match": {}}), line("teacher", 1, 2), line("teacher", 7, 6)]
    log.write_text("\n".join(lines))
    found = read_log(log)
    assert found == [Trained("teacher", 100, 2.0), Trained("teacher", 7, 0.1)]
    assert training_part({"a": found}, 3).splitlines()[-1] == "| **sum** | | | **6.3** |"


def test_the_bundled_card_has_every_mark(tmp_path: Path) -> None:
    check_marks(BUNDLED_DIR / "README.md", PARTS)
    copy = tmp_path / "README.md"
    text = (BUNDLED_DIR / "README.md").read_text(encoding="utf-8")
    copy.write_text(text, encoding="utf-8")
    fill_card(copy, {"failures": "| new |"})
    assert copy.read_text(encoding="utf-8").startswith(text[: text.index("<!-- begin failures -->")])
    assert set(LABELS) == set(TASKS)
