"""Many questions at once: batch-mates change no answer, faults stay where they are, and a broken run goes on."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mmmamba import SamplingParams, cli, load_model
from mmmamba.batch import Answer, Batch, Question, join_states, take_rows
from mmmamba.conversation import Conversation
from mmmamba.generate import ModelInputs, decode_one_token, prefill
from mmmamba.jsonl import answer_file, read_questions
from mmmamba.model import MMMamba
from mmmamba.together import prefill_together
from mmmamba.tokenizer import load_tokenizer
from tests.helpers import assert_same_state

GREEDY = SamplingParams(greedy=True, max_new_tokens=6)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / "red.png", folder / "blue.png"]
    for path, size in zip(paths, ((60, 40), (40, 40)), strict=True):
        Image.new("RGB", size, path.stem).save(path)
    return paths


def model_of(request: pytest.FixtureRequest, fixture: str) -> MMMamba:
    return load_model(request.getfixturevalue(fixture), dtype=torch.float32)


def batch_of(model: MMMamba, size: int) -> Batch:
    assert model.source is not None
    return Batch(model, load_tokenizer(model.source), size=size)


def questions_of(pictures: Sequence[Path]) -> list[Question]:
    """Of different lengths, with and without pictures, short and long answers, each with a seed of its own."""
    red, blue = pictures
    hot = SamplingParams(temperature=1.5, top_p=1.0, max_new_tokens=9, seed=3)
    return [
        Question("Hi", params=GREEDY),
        Question("What is it?", (red,), params=hot),
        Question("Hello there", params=SamplingParams(greedy=True, max_new_tokens=1)),
        Question("And these two?", (red, blue), max_tiles=1, params=GREEDY),
        Question("Hi", system="Be brief", params=SamplingParams(temperature=1.0, seed=9, max_new_tokens=14)),
        Question("Hi", params=SamplingParams(temperature=2.0, seed=4, max_new_tokens=7, repetition_penalty=1.5)),
        Question("Yo", params=GREEDY),
    ]


@pytest.mark.parametrize("fixture", ["tiny_dir", "tiny_teacher_dir"])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_answers_equal_those_of_single_chats(
    fixture: str, size: int, request: pytest.FixtureRequest, pictures: list[Path]
) -> None:
    model = model_of(request, fixture)
    questions = questions_of(pictures)
    answers = sorted(batch_of(model, size).run(questions), key=lambda answer: answer.index)
    assert [answer.index for answer in answers] == list(range(len(questions)))
    for question, answer in zip(questions, answers, strict=True):
        chat = Conversation(model, system=question.system, max_tiles=question.max_tiles)
        *_, event = chat.ask(question.text, question.images, question.params)
        assert (answer.text, answer.num_tokens, answer.finish_reason, answer.error) == (
            event.reply,
            event.num_tokens,
            event.finish_reason,
            None,
        )
        assert (answer.text_tokens, answer.image_tokens) == (chat.state.num_text_tokens, chat.state.num_image_tokens)


def test_rows_really_go_together(
    tiny_dir: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And whoever is done makes room for the next one."""
    model = model_of(request, "tiny_dir")
    widths: list[int] = []

    def counted(model: Any, token: Any, state: Any) -> Any:
        widths.append(len(token))
        return decode_one_token(model, token, state)

    monkeypatch.setattr("mmmamba.batch.decode_one_token", counted)
    lengths = (2, 12, 12, 6, 6)
    batch = batch_of(model, 3)
    batch._stops = set()
    done = list(batch.run(Question("Hi", params=SamplingParams(greedy=True, max_new_tokens=n)) for n in lengths))
    assert [answer.num_tokens for answer in done] == [2, 6, 12, 12, 6]
    assert max(widths) == 3
    assert sum(widths) == sum(n - 1 for n in lengths), "a last token has nothing to be fed for"
    assert len(widths) <= 13, "rows waited for each other"


def test_prompts_are_read_together(
    tiny_dir: Path, request: pytest.FixtureRequest, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of about one length, as many as rows are free; and what fails together is read one by one."""
    model = model_of(request, "tiny_dir")
    read: list[list[int]] = []
    broken = False

    def counted(model: Any, prompts: Any) -> Any:
        read.append([inputs.input_ids.shape[1] for inputs in prompts])
        if broken:
            raise RuntimeError("out of memory")
        return prefill_together(model, prompts)

    monkeypatch.setattr("mmmamba.batch.prefill_together", counted)
    texts = ["Hi", "Hello", "Hi " * 30, "Hello World", "Yo", "World"]
    questions = [Question(text, params=GREEDY) for text in texts]
    answers = {answer.index: answer.text for answer in batch_of(model, 4).run(questions)}
    assert len(read[0]) == 3, "all of the first four but the long one"
    assert all(max(lengths) <= 2 * min(lengths) for lengths in read)
    broken = True
    assert {answer.index: answer.text for answer in batch_of(model, 4).run(questions)} == answers
    assert read[0] == read[len(read) // 2]


def test_long_prompts_are_read_alone_and_few_wait(
    tiny_dir: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(request, "tiny_dir")
    monkeypatch.setattr("mmmamba.batch.CPU_TOGETHER", 20)
    monkeypatch.setattr("mmmamba.batch.prefill_together", lambda *args: pytest.fail("above the limit"))
    taken = 0

    def source() -> Iterator[Question]:
        nonlocal taken
        for _ in range(6):
            taken += 1
            yield Question("Hello World", params=GREEDY)

    batch = batch_of(model, 6)
    assert next(iter(batch._prepare(enumerate(source()), deque(), 6)), None) is None
    assert 1 <= taken < 6, "all pictures would wait in memory"
    assert len(list(batch.run(source()))) == 6


def test_pictures_need_no_file(tiny_dir: Path, request: pytest.FixtureRequest, pictures: list[Path]) -> None:
    batch = batch_of(model_of(request, "tiny_dir"), 2)
    shown = Image.open(pictures[0])
    of_file, of_picture = (
        next(iter(batch.run([Question("What?", (it,), params=GREEDY)]))) for it in (pictures[0], shown)
    )
    assert of_file == of_picture
    assert of_file.image_tokens > 0


def test_caches_of_one_length_share_a_batch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(request, "tiny_teacher_dir")
    widths: list[int] = []

    def counted(model: Any, token: Any, state: Any) -> Any:
        widths.append(len(token))
        return decode_one_token(model, token, state)

    monkeypatch.setattr("mmmamba.batch.decode_one_token", counted)
    batch = batch_of(model, 2)
    batch._stops = set()
    answers = list(batch.run(Question(text, params=GREEDY) for text in ("Hi", "Hello", "Yo", "World")))
    assert sorted(answer.index for answer in answers[:2]) == [0, 2]
    assert widths == [2] * 10


def test_one_bad_question_leaves_the_others_their_answers(
    request: pytest.FixtureRequest, tmp_path: Path, tiny_dir: Path
) -> None:
    letter = tmp_path / "letter.png"
    letter.write_text("Dear Sir or Madam")
    questions = [
        Question("Hi", params=GREEDY),
        Question("What?", (letter,)),
        Question("What?", (tmp_path / "gone.png",)),
        Question("Yo", params=GREEDY),
    ]
    answers = {answer.index: answer for answer in batch_of(model_of(request, "tiny_dir"), 2).run(questions)}
    assert "not an image" in str(answers[1].error)
    assert "gone.png" in str(answers[2].error)
    assert answers[0].error is None
    assert answers[3].text
    with pytest.raises(ValueError, match="a batch of 0 rows"):
        batch_of(model_of(request, "tiny_dir"), 0)


@pytest.mark.parametrize("fixture", ["tiny_dir", "tiny_teacher_dir"])
def test_joined_states_come_apart_as_they_were(fixture: str, request: pytest.FixtureRequest) -> None:
    model = model_of(request, fixture)
    states = []
    for ids in ([[5, 6, 7, 8]], [[9, 10, 11, 12]]):
        state = model.new_state()
        prefill(model, ModelInputs(torch.tensor(ids)), state)
        states.append(state)
    joined = join_states(states)
    assert joined.batch == 2
    decode_one_token(model, torch.tensor([3, 4]), joined)
    for i, token in enumerate((3, 4)):
        decode_one_token(model, torch.tensor([token]), states[i])
        assert_same_state(take_rows(joined, [i]), states[i], 1e-5)
    if fixture == "tiny_teacher_dir":
        with pytest.raises(ValueError, match=r"caches of \[0, 5\] positions"):
            join_states([states[0], model.new_state()])


# Files


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def records(path: Path) -> dict[Any, Any]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({line["id"] for line in lines}) == len(lines), "an id was answered twice"
    return {line["id"]: line for line in lines}


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str]:
    status = cli.main(["batch", *map(str, argv), "--greedy", "--max-new-tokens", "4", "--dtype", "float32"])
    out, err = capsys.readouterr()
    assert out == ""
    return status, err.strip().splitlines()[-1]


def test_a_file_is_answered_and_a_second_run_has_nothing_to_do(
    capsys: pytest.CaptureFixture[str], tiny_dir: Path, pictures: list[Path], tmp_path: Path
) -> None:
    folder = pictures[0].parent
    questions = write(
        folder / "in.jsonl",
        {"id": "a", "question": "What is it?", "image": "red.png", "extra": {"split": "test"}},
        "",
        {"question": "Both?", "images": ["red.png", str(pictures[1])], "max_tiles": 1, "max_new_tokens": 2},
        {"id": "c", "question": "Hi", "imagee": "red.png"},
        {"id": "d", "question": "Hi", "image": "gone.png"},
        {"id": "e", "question": " "},
        {"id": "f", "question": "Hi", "temperature": -1},
        "{",
    )
    out = tmp_path / "out.jsonl"
    status, told = run(capsys, questions, out, "--model", tiny_dir, "--batch-size", 2)
    assert status == 0
    assert told == f"mmmamba: 2 answered, 5 with an error, 0 were there already; {out}"
    answers = records(out)
    assert answers["a"]["extra"] == {"split": "test"}
    assert answers["a"]["finish_reason"] in ("stop", "length")
    assert answers["a"]["image_tokens"] > 0
    assert answers[3]["num_tokens"] <= 2
    assert {answer["model"] for answer in answers.values()} == {tiny_dir.name}
    for key, says in (
        ("c", '"imagee" is not known'),
        ("d", "gone.png"),
        ("e", "question is ' '"),
        ("f", "temperature=-1"),
    ):
        assert says in answers[key]["error"]
    assert "no JSON" in answers[8]["error"]
    before = out.read_text()
    status, told = run(capsys, questions, out, "--model", tiny_dir)
    assert (status, told) == (0, f"mmmamba: 0 answered, 0 with an error, 7 were there already; {out}")
    assert out.read_text() == before
    Image.new("RGB", (40, 40)).save(folder / "gone.png")
    status, told = run(capsys, questions, out, "--model", tiny_dir, "--retry-errors")
    assert told.startswith("mmmamba: 1 answered, 4 with an error, 2 were there already")
    assert records(out)["d"]["text"] is not None


def test_a_run_that_was_broken_off_goes_on(capsys: pytest.CaptureFixture[str], tiny_dir: Path, tmp_path: Path) -> None:
    questions = write(tmp_path / "in.jsonl", *({"id": i, "question": "Hi" * (i + 1)} for i in range(5)))
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    run(capsys, questions, whole, "--model", tiny_dir)
    text = whole.read_text()
    second = text.index("\n", text.index("\n") + 1)
    broken.write_text(text[: second + 20])  # cut inside the third line
    status, told = run(capsys, questions, broken, "--model", tiny_dir)
    assert status == 0
    assert told.startswith("mmmamba: 3 answered, 0 with an error, 2 were there already")
    assert records(broken) == records(whole)


def test_answers_are_on_disk_before_the_next_one_is_asked_for(tiny_dir: Path, tmp_path: Path) -> None:
    """A run that dies leaves what it had."""

    class Dies(Batch):
        def __init__(self) -> None:
            pass

        def run(self, questions: Any) -> Any:
            yield Answer(1, "b", "stop")
            raise RuntimeError("the power is out")

    questions = write(tmp_path / "in.jsonl", {"question": "one"}, {"question": "two"})
    lines = read_questions(questions, GREEDY)
    out = tmp_path / "out.jsonl"
    with pytest.raises(RuntimeError, match="power"):
        answer_file(Dies(), lines, out, "m")
    assert list(records(out)) == [2]


def test_line_breaks_inside_a_text_are_no_new_lines(tiny_dir: Path, tmp_path: Path) -> None:
    odd = "a\u2028b\x85c"

    class Says(Batch):
        def __init__(self) -> None:
            pass

        def run(self, questions: Any) -> Any:
            yield from (Answer(i, question.text, "stop") for i, question in enumerate(questions))

    questions = tmp_path / "in.jsonl"
    questions.write_text("\ufeff" + json.dumps({"question": odd, "extra": odd}, ensure_ascii=False) + "\n", "utf-8")
    out = tmp_path / "out.jsonl"
    (line,) = lines = read_questions(questions, GREEDY)
    assert (line.error, line.extra) == (None, odd)
    assert answer_file(Says(), lines, out, "m").answered == 1
    assert answer_file(Says(), lines, out, "m").skipped == 1
    (written,) = out.read_text("utf-8").split("\n")[:-1]
    assert json.loads(written)["text"] == odd


def test_files_that_cannot_be_used_are_refused(
    capsys: pytest.CaptureFixture[str], tiny_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    twice = write(tmp_path / "twice.jsonl", {"id": 1, "question": "a"}, {"id": 1, "question": "b"})
    status, told = run(capsys, twice, out, "--model", tiny_dir)
    assert status == 2
    assert "lines 1 and 2 both have the id 1" in told
    one = write(tmp_path / "one.jsonl", {"id": 1, "question": "a"})
    foreign = write(tmp_path / "foreign.jsonl", {"caption": "a"})
    status, told = run(capsys, one, foreign, "--model", tiny_dir)
    assert (status, foreign.read_text()) == (2, '{"caption": "a"}\n')
    assert "line 1 is no answer of this command" in told
    other = write(tmp_path / "other.jsonl", {"id": 7, "model": "other", "text": "x"})
    status, told = run(capsys, one, other, "--model", tiny_dir)
    assert status == 2
    assert 'was answered by "other"' in told
    status, told = run(capsys, one, tmp_path / "nowhere" / "out.jsonl", "--model", tiny_dir)
    assert status == 2
    assert "there is no folder nowhere" in told
    status, told = run(capsys, tmp_path / "none.jsonl", out, "--model", tiny_dir)
    assert status == 2
    assert "none.jsonl" in told
    assert not out.exists()
