"""What a model gets right of held-out questions, counted, and what it gets wrong, to be shown."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from PIL import Image

from distill.data.batches import Rows
from distill.evaluate import best_answer, judge
from distill.reading import PRINTED
from distill.replies import greedy_replies
from distill.tasks import Question, is_right
from mmmamba.model import MMMamba

_BLANK = Image.new("RGB", (1, 1))
_FEWEST_AT_A_TIME = 8  # questions, in search of a few failures


@dataclass(frozen=True)
class TaskScore:
    """count: questions asked.  exact: of these, answered to the letter.
    right: answered right, other words included (`tasks.is_right`); None if replies were not decoded.
    left_out: further questions, too long for a row.
    """

    count: int
    exact: int
    right: int | None
    left_out: int

    @property
    def exact_match(self) -> float:
        return round(self.exact / self.count, 4) if self.count else 0.0


class Failure(NamedTuple):
    """A question of a task and the wrong reply to it."""

    task: str
    question: Question
    reply: str


class Scores(NamedTuple):
    """tasks: counts by task.  failures: the first wrong replies of each.  readings: (reply, what is printed) of every
    question of `printed_text`, if they were asked for."""

    tasks: dict[str, TaskScore]
    failures: list[Failure]
    readings: list[tuple[str, str]]


def score(
    model: MMMamba,
    rows: Rows,
    asked: Iterable[tuple[str, list[Question]]],
    *,
    decode: bool = False,
    failure_count: int = 0,
    readings: bool = False,
    batch_size: int | None = None,
) -> Scores:
    """Score tasks, and collect the first wrong replies of each.

    Args:
        asked: tasks with their questions, see `evaluate.held_out_questions`.
        decode: decode every reply that is not right to the letter, to see if it is right in other words. Needed where
            several answers are right: names of photos, honest answers.
        failure_count: wrong replies to collect for each task.
        readings: give replies to all of `printed_text`, for its character error rate.
        batch_size: questions that are judged together; None: as many as suit the device.
    """
    tasks = []
    for name, questions in asked:
        judged = judge(model, rows, name, questions, batch_size=batch_size)
        # Pictures of what was answered are let go: hundreds a task would take gigabytes.
        kept = [q._replace(image=_BLANK) if hit else q for q, hit in zip(questions, judged, strict=True)]
        tasks.append(_Task(name, kept, judged))
    # Replies of all tasks are decoded together: questions of one length share a batch, and a task has few of each.
    if wanted := [(task, place) for task in tasks for place in task.wanted(decode, readings)]:
        _reply(model, rows, wanted)
    while more := [
        (task, place)
        for task in tasks
        if len(task.failures) < failure_count
        for place in task.missed[: max(_FEWEST_AT_A_TIME, failure_count)]
    ]:
        _reply(model, rows, more)
    return Scores(
        {task.name: task.score(decode) for task in tasks},
        [failure for task in tasks for failure in task.failures[:failure_count]],
        [reading for task in tasks if readings and task.name == PRINTED for reading in task.readings()],
    )


@dataclass
class _Task:
    """judged: as `evaluate.judge` gives it.  replies: those decoded so far, by the place of the question."""

    name: str
    questions: list[Question]
    judged: list[bool | None]
    replies: dict[int, str] = field(default_factory=dict)

    def wanted(self, decode: bool, readings: bool) -> list[int]:
        """Questions of which a reply is needed in any case."""
        if readings and self.name == PRINTED:
            return [place for place, hit in enumerate(self.judged) if not hit]
        return self.missed if decode else []

    @property
    def missed(self) -> list[int]:
        """Questions not answered to the letter, of which no reply is known yet."""
        return [place for place, hit in enumerate(self.judged) if hit is False and place not in self.replies]

    @property
    def failures(self) -> list[Failure]:
        """Those wrong in any words, of the replies known so far."""
        found = []
        for place, question in enumerate(self.questions):
            reply = self.replies.get(place)
            if self.judged[place] is False and reply is not None and not is_right(self.name, reply, question.answer):
                found.append(Failure(self.name, question, reply))
        return found

    def readings(self) -> list[tuple[str, str]]:
        return [
            (best_answer(question) if hit else self.replies[place], question.answer)
            for place, (question, hit) in enumerate(zip(self.questions, self.judged, strict=True))
        ]

    def score(self, decoded: bool) -> TaskScore:
        left_out = self.judged.count(None)
        count = len(self.judged) - left_out
        right = count - len(self.failures) if decoded else None
        return TaskScore(count, self.judged.count(True), right, left_out)


def _reply(model: MMMamba, rows: Rows, wanted: list[tuple[_Task, int]]) -> None:
    """Decode replies; prompts of one length one after the other, since models with attention read only such at once."""
    wanted.sort(key=lambda of: len(rows.tokenizer.encode(of[0].questions[of[1]].question)))
    asked = [task.questions[place] for task, place in wanted]
    replies = greedy_replies(model, rows.tokenizer, [(q.image, q.question) for q in asked])
    for (task, place), reply in zip(wanted, replies, strict=True):
        task.replies[place] = reply
