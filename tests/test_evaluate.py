"""Scores of held-out questions, what is shown of those that went wrong, and how far talk moves from the base's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from distill.__main__ import main
from distill.base import load_base
from distill.convert import make_student
from distill.data.batches import Batch, Rows, pixel_values, stack
from distill.data.sample import Sample
from distill.data.sample import held_out as held_out_by_hash
from distill.data.text import HELD_OUT_PERCENT, Conversations
from distill.evaluate import SURE_LOGITS, _bf16_is_faster, _leads, exact_matches, held_out_questions, judge
from distill.failures import failures_table, write_failures
from distill.nano import new_teacher
from distill.replies import greedy_replies
from distill.scores import Failure, TaskScore, score
from distill.tables import read_scores, scores_table
from distill.tasks import Question, held_out
from distill.text_kl import own_answers, text_kl
from mmmamba.checkpoint import BUNDLED_DIR, load_model
from mmmamba.conversation import Conversation
from mmmamba.generate import SamplingParams
from mmmamba.model import MMMamba
from mmmamba.tokenizer import Tokenizer, load_tokenizer
from tests.training import save_tiny_base, save_tiny_teacher, tiny_config


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(BUNDLED_DIR)


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_teacher(tmp_path_factory.mktemp("models") / "teacher")


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture
def talk(tmp_path: Path) -> Conversations:
    """Conversations of one or two turns, of which the first that is held out is too long."""
    long = next(i for i in range(400) if held_out_by_hash(f"What of {i}?", HELD_OUT_PERCENT))
    lines = []
    for i in range(400):
        turns = [("user", f"What of {i}?"), ("assistant", f"Nothing of {i}." * (400 if i == long else 1))]
        turns += [("user", "And then?"), ("assistant", "More.")] * (i % 2)
        lines.append(json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]}))
    (tmp_path / "self.jsonl").write_text("\n".join(lines))
    return own_answers([tmp_path])


# --- talk ---


def by_hand(model: MMMamba, base: Any, tokenizer: Tokenizer, talk: Conversations) -> list[float]:
    """The divergence of every answer token, one conversation at a time, in float64."""
    rows = Rows(tokenizer, model.config, "text", seqlen=512)
    found = []
    for number in range(len(talk)):
        row = rows.row(Sample(None, talk.turns(number), "self"))
        if row is None:
            continue
        ids = torch.from_numpy(row.input_ids)[None]
        with torch.no_grad():
            p, q = base(ids).logits[0], model(ids)[0]
        for at in row.loss_mask.nonzero()[0] - 1:
            p_at, q_at = p[at].double().softmax(dim=-1), q[at].double().softmax(dim=-1)
            found.append(float((p_at * (p_at / q_at[: len(p_at)]).log()).sum()))
    return found


def test_a_new_teacher_talks_as_its_base(tokenizer: Tokenizer, base_dir: Path, talk: Conversations) -> None:
    """All that differs is what the ids that the base lacks take: 8 of 49,160."""
    base = load_base(str(base_dir))
    model = new_teacher(base, tiny_config()).eval()
    found = text_kl(model, base, tokenizer, talk)
    assert 0 < found.nats < 10 * 8 / 49_160
    wanted = by_hand(model, base, tokenizer, talk)
    assert found.tokens == len(wanted)
    assert found.nats == pytest.approx(sum(wanted) / len(wanted), abs=2e-6)


@pytest.mark.parametrize("kind", ["teacher", "linear"])
def test_talk_that_moved_is_measured(
    kind: str, tokenizer: Tokenizer, teacher_dir: Path, base_dir: Path, talk: Conversations
) -> None:
    base, model = load_base(str(base_dir)), load_model(teacher_dir)
    if kind == "linear":
        model = make_student(model, ("mamba2",) * 2, ("mamba2",) * 2)
    found = text_kl(model, base, tokenizer, talk)
    wanted = by_hand(model, base, tokenizer, talk)
    assert found.nats == pytest.approx(sum(wanted) / len(wanted), rel=1e-4)
    assert (found.conversations, found.left_out) == (len(talk) - 1, 1)
    assert found.tokens == len(wanted) > 5 * len(talk)


def test_what_cannot_be_compared(tmp_path: Path, tokenizer: Tokenizer, teacher_dir: Path, talk: Conversations) -> None:
    larger = load_base(str(save_tiny_base(tmp_path / "larger", vocab_size=49_200)))
    with pytest.raises(ValueError, match="the base has 49200 ids and the model 49160; pass the base that"):
        text_kl(load_model(teacher_dir), larger, tokenizer, talk)


def test_the_bundled_conversations_have_some_held_out() -> None:
    assert len(own_answers()) >= 10


# --- questions ---


def test_scores_and_failures(tokenizer: Tokenizer, teacher_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model nobody trained is wrong; what it says in other words may be right, and is only known if decoded."""
    model = load_model(teacher_dir)
    rows = Rows(tokenizer, model.config, "image", seqlen=96)
    asked = {"shapes_count": held_out("shapes_count", 5), "shapes_color": held_out("shapes_color", 3)}
    scores, failures, readings = score(model, rows, asked.items(), failure_count=2)
    assert scores == {"shapes_count": TaskScore(5, 0, None, 0), "shapes_color": TaskScore(3, 0, None, 0)}
    assert scores["shapes_count"].exact_match == 0.0
    assert [(f.task, f.question) for f in failures] == [
        (task, question) for task, questions in asked.items() for question in questions[:2]
    ]
    assert all(f.reply for f in failures)
    assert not readings

    first, second = asked["shapes_count"][:2]
    known = {first.question: first.answer.upper().rstrip("."), second.question: "Who knows?"}
    decoded: list[str] = []

    def replies(model: MMMamba, tokenizer: Tokenizer, asked: list[tuple[Image.Image, str]]) -> list[str]:
        decoded.extend(question for _, question in asked)
        return [known.get(question, "?") for _, question in asked]

    monkeypatch.setattr("distill.scores.greedy_replies", replies)
    scores, failures, _ = score(model, rows, asked.items(), decode=True, failure_count=1)
    assert scores == {"shapes_count": TaskScore(5, 0, 1, 0), "shapes_color": TaskScore(3, 0, 0, 0)}
    assert [f.reply for f in failures] == ["Who knows?", "?"]
    assert sorted(decoded) == sorted(q.question for of_one in asked.values() for q in of_one), "not each once"


def test_questions_read_together_are_judged_as_alone(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of mixed lengths, some right and some wrong, and one that fits no row; on a CPU not too many at once."""
    model = load_model("nano-linear")
    rows = Rows(tokenizer, model.config, "image", seqlen=model.config.tokens_per_tile + 40)
    asked = [q for task in ("shapes_describe", "digits") for q in held_out(task, 3)]
    asked.insert(3, asked[0]._replace(question="How many? " * 30))
    sizes = []
    found = exact_matches

    def noted(model: MMMamba, batch: Batch) -> torch.Tensor:
        sizes.append(len(batch.input_ids))
        return found(model, batch)

    monkeypatch.setattr("distill.evaluate.exact_matches", noted)
    monkeypatch.setattr("distill.evaluate.CPU_ROWS", 4)
    monkeypatch.setattr("distill.evaluate._bf16_is_faster", lambda model: False)
    together = judge(model, rows, "mixed", asked)
    assert sizes == [4, 2]
    assert together[3] is None
    assert {True, False} <= set(together)
    assert together == judge(model, rows, "mixed", asked, batch_size=1)
    # With bf16 products first, float32 has little left to say, and the verdicts are the same.
    sizes.clear()
    monkeypatch.setattr("distill.evaluate._bf16_is_faster", lambda model: True)
    assert together == judge(model, rows, "mixed", asked)
    assert sum(sizes) < 6


def test_what_bf16_cannot_decide_float32_does(
    tokenizer: Tokenizer, teacher_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(teacher_dir)
    rows = Rows(tokenizer, model.config, "image", seqlen=96)
    asked = [q._replace(question=f"How many?{' Look!' * i}") for i, q in enumerate(held_out("shapes_count", 5))]
    leads = torch.tensor([SURE_LOGITS, -SURE_LOGITS, SURE_LOGITS - 0.1, 0.1 - SURE_LOGITS, 0.0])
    lengths = []

    def exact(model: MMMamba, batch: Batch) -> torch.Tensor:
        lengths.extend(batch.loss_mask.int().argmax(dim=1).tolist())
        return torch.tensor([False, True, True])

    monkeypatch.setattr("distill.evaluate._bf16_is_faster", lambda model: True)
    monkeypatch.setattr("distill.evaluate._leads", lambda model, batch, narrow: leads)
    monkeypatch.setattr("distill.evaluate.exact_matches", exact)
    assert judge(model, rows, "shapes_count", asked) == [True, False, False, True, True]
    assert len(lengths) == 3
    assert lengths == sorted(lengths), "the longest three were read again"
    # Models on a GPU or in bf16 are judged once.
    monkeypatch.undo()
    assert not _bf16_is_faster(load_model(teacher_dir, dtype=torch.bfloat16))


def test_a_lead_is_that_of_the_weakest_token(tokenizer: Tokenizer, teacher_dir: Path) -> None:
    model = load_model(teacher_dir)
    rows = Rows(tokenizer, model.config, "image", seqlen=96)
    made = [rows.row(Sample(q.image, ((q.question, q.answer),), "t")) for q in held_out("shapes_describe", 3)]
    batch = stack([row for row in made if row is not None])
    with torch.no_grad():
        logits = model(batch.input_ids, pixel_values(batch.pixels)).double()
    wanted = []
    for row, (ids, mask) in enumerate(zip(batch.input_ids, batch.loss_mask, strict=True)):
        of_row = []
        for at in mask.nonzero()[:, 0].tolist():
            own, others = logits[row, at - 1, ids[at]], logits[row, at - 1].clone()
            others[ids[at]] = -torch.inf
            of_row.append(float(own - others.max()))
        wanted.append(min(of_row))
    assert _leads(model, batch, narrow=False).tolist() == pytest.approx(wanted, abs=1e-4)


def test_replies_are_decoded_once_and_together(
    tokenizer: Tokenizer, teacher_dir: Path, font_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of all tasks at a time; what is printed is read off the same replies, and what was right needs none."""
    model = load_model(teacher_dir)
    rows = Rows(tokenizer, model.config, "image", seqlen=96)
    asked = {task: held_out(task, 4, fonts=font_pack) for task in ("shapes_exist", "printed_text")}
    calls: list[list[str]] = []

    def read(model: object, tokenizer: object, asked: list[tuple[Image.Image, str]]) -> list[str]:
        calls.append([question for _, question in asked])
        return ["?"] * len(asked)

    monkeypatch.setattr("distill.scores.greedy_replies", read)
    verdicts: dict[str, list[bool | None]] = {
        "shapes_exist": [True, False, True, False],
        "printed_text": [True, False, None, True],
    }
    monkeypatch.setattr("distill.scores.judge", lambda model, rows, task, asked, batch_size: verdicts[task])
    printed = [q.answer for q in asked["printed_text"]]
    wanted = [(printed[0], printed[0]), ("?", printed[1]), ("?", printed[2]), (printed[3], printed[3])]
    questions = {task: [q.question for q in of_one] for task, of_one in asked.items()}

    scores, _, readings = score(model, rows, asked.items(), decode=True, readings=True)
    (call,) = calls
    assert sorted(call) == sorted([*questions["shapes_exist"][1::2], *questions["printed_text"][1:3]])
    lengths = [len(tokenizer.encode(question)) for question in call]
    assert lengths == sorted(lengths), "of one length one after the other"
    assert readings == wanted
    assert scores["printed_text"] == TaskScore(3, 2, 2, 1)
    assert scores["shapes_exist"] == TaskScore(4, 2, 2, 0)
    calls.clear()
    assert score(model, rows, asked.items(), readings=True).readings == wanted
    assert [sorted(call) for call in calls] == [sorted(questions["printed_text"][1:3])], (
        "no other replies were asked for"
    )
    calls.clear()
    failures = score(model, rows, asked.items(), failure_count=1).failures
    assert [f.task for f in failures] == ["shapes_exist", "printed_text"]
    assert len(calls) == 1


@pytest.mark.parametrize("kind", ["teacher", "linear", "hybrid"])
def test_replies_are_those_of_a_chat(
    kind: str, tokenizer: Tokenizer, teacher_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model nobody trained never stops of itself; here every seventh token ends a reply, each at another length."""
    for module in ("mmmamba.batch", "mmmamba.conversation"):
        monkeypatch.setattr(f"{module}.stop_token_ids", lambda *args: tuple(range(0, 49_152, 7)))
    model = load_model(teacher_dir)
    if kind != "teacher":
        model = make_student(model, ("mamba2",) * 2, ("mamba2", "mha" if kind == "hybrid" else "mamba2"))
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "embedding.text" not in name:
            parameter.data *= 6  # else it says one word on and on
    questions = [q for task in ("shapes_count", "shapes_relation", "digits") for q in held_out(task, 4)]
    wide = Image.new("RGB", (200, 50), "red")
    asked = [*((q.image, q.question) for q in questions), (wide, questions[0].question)]
    for max_dynamic_patch in (1, 4):
        model.config = replace(model.config, max_dynamic_patch=max_dynamic_patch)
        found = greedy_replies(model, tokenizer, asked, batch_size=3, max_new_tokens=12)
        params = SamplingParams(temperature=0, max_new_tokens=12)
        for (image, question), reply in zip(asked, found, strict=True):
            events = Conversation(model, tokenizer).ask(question, [image], params)
            assert reply == "".join(event.text for event in events)
    assert len({len(tokenizer.encode(reply)) for reply in found}) > 2


def test_what_fits_no_row_is_not_asked(tokenizer: Tokenizer, teacher_dir: Path) -> None:
    model = load_model(teacher_dir)
    rows = Rows(tokenizer, model.config, "image", seqlen=40)
    questions = held_out("shapes_count", 2)
    long = questions[0]._replace(question="How many? " * 40)
    assert judge(model, rows, "shapes_count", [long, questions[1]]) == [None, False]
    scores, _, _ = score(model, rows, [("shapes_count", [long, questions[1]])], decode=True)
    assert scores["shapes_count"] == TaskScore(1, 0, 0, 1)


def test_tasks_that_were_asked_for_must_have_their_data() -> None:
    everything = dict(held_out_questions(None, count=1))
    assert "shapes_count" in everything
    assert "photos_label" not in everything
    assert list(dict(held_out_questions(None, count=1, tasks=["digits"]))) == ["digits"]
    with pytest.raises(ValueError, match="task photos_label needs photos"):
        list(held_out_questions(None, count=1, tasks=["photos_label"]))
    with pytest.raises(ValueError, match='task "speed" is not known'):
        list(held_out_questions(None, count=1, tasks=["speed"]))


def test_failures_as_pictures_and_markdown(tmp_path: Path) -> None:
    red = Image.new("RGB", (224, 224), (200, 10, 10))
    failures = [
        Failure("flags", Question(red, "Whose flag?", "Japan|Nippon"), "A <b>|star|</b>\n*new*"),
        Failure("flags", Question(red, "And this?", "Peru"), "Chile"),
    ]
    page = write_failures(failures, tmp_path / "wrong")
    assert sorted(f.name for f in page.parent.iterdir()) == ["failures.md", "flags-1.webp", "flags-2.webp"]
    with Image.open(page.parent / "flags-1.webp") as stored:
        assert stored.size == (224, 224)
        pixel = stored.convert("RGB").getpixel((100, 100))
    assert isinstance(pixel, tuple)
    assert all(abs(a - b) < 8 for a, b in zip(pixel, (200, 10, 10), strict=True))
    lines = page.read_text().splitlines()
    assert lines[2] == (
        "| ![flags](flags-1.webp) | flags | Whose flag? | Japan / Nippon | A \\<b\\>\\|star\\|\\</b\\> \\*new\\* |"
    )
    assert "(card/x.webp)" in failures_table(failures[:1], ["card/x.webp"])


def test_the_command_writes_counts_and_failures(
    tmp_path: Path, teacher_dir: Path, base_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--tokenizer", str(BUNDLED_DIR), "--device", "cpu", "--count", "3", "--tasks", "digits,shapes_exist"]
    written = ["--out", str(tmp_path / "new" / "scores.json"), "--failures", str(tmp_path / "wrong")]
    main(["eval", str(teacher_dir), *options, *written, "--failure-count", "1", "--base", str(base_dir), "--decode"])
    brief = json.loads(capsys.readouterr().out.splitlines()[-1])
    report = json.loads((tmp_path / "new" / "scores.json").read_text())
    assert report["kind"] == "teacher"
    assert list(report["tasks"]) == ["digits", "shapes_exist"]
    for task, found in report["tasks"].items():
        assert found["count"] == 3
        assert brief[task] == round(found["exact"] / 3, 4)
        assert brief["right"][task] == round(found["right"] / 3, 4)
    assert report["text_kl"]["conversations"] >= 10
    assert brief["text_kl"] == round(report["text_kl"]["nats"], 4) > 0
    assert {f.name for f in (tmp_path / "wrong").iterdir()} == {"failures.md", "digits-1.webp", "shapes_exist-1.webp"}


# --- tables ---


def report_of(exact: int, right: int | None, **more: Any) -> dict[str, Any]:
    tasks = {"digits": (10, exact, right), "flags": (20, 20, None if right is None else 20)}
    return {"tasks": {t: {"count": n, "exact": e, "right": r, "left_out": 0} for t, (n, e, r) in tasks.items()}} | more


def test_scores_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = report_of(8, 9, text_kl={"nats": 0.0625, "tokens": 900, "conversations": 12, "left_out": 0})
    linear = report_of(6, 9, printed_text_cer={"rate": 0.125, "count": 50})
    for name, report in (("teacher", teacher), ("linear", linear)):
        (tmp_path / f"{name}.json").write_text(json.dumps(report))
    main(["table", str(tmp_path / "teacher.json"), f"mine={tmp_path / 'linear.json'}"])
    assert capsys.readouterr().out.splitlines() == [
        "| task | questions | teacher | mine |",
        "| --- | ---: | ---: | ---: |",
        "| digits | 10 | 80.0 | 60.0 |",
        "| flags | 20 | 100.0 | 100.0 |",
        "| **mean** |  | **90.0** | **80.0** |",
        "| % of teacher |  | 100.0 | 88.9 |",
        "| printed text, character error (%) | 50 |  | 12.5 |",
        "| divergence from the base's talk (nats a token) | 900 | 0.062 |  |",
    ]
    assert "| digits | 10 | 90.0 | 90.0 |" in scores_table({"a": teacher, "b": linear}, "right")


def test_scores_that_cannot_be_compared(tmp_path: Path) -> None:
    one, other = report_of(8, None), report_of(8, 8)
    other["tasks"]["digits"]["count"] = 11
    with pytest.raises(ValueError, match="a and b were not asked the same: digits differ"):
        scores_table({"a": one, "b": other})
    with pytest.raises(ValueError, match="replies of a were not decoded; score it with --decode"):
        scores_table({"a": one}, "right")
    with pytest.raises(ValueError, match="a table needs at least one file"):
        scores_table({})
    for text in ("{", "[]", "{}", '{"tasks": {"digits": {"count": 3}}}'):
        (tmp_path / "scores.json").write_text(text)
        with pytest.raises(ValueError, match=r"scores.json .*`python -m distill eval --out`"):
            read_scores(tmp_path / "scores.json")
