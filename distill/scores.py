"""What a model gets right of held-out questions, counted, and what it gets wrong, to be shown."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from distill.data.batches import Rows
from distill.evaluate import judge
from distill.replies import greedy_replies
from distill.tasks import Question, is_right
from mmmamba.model import MMMamba

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


def score(
    model: MMMamba,
    rows: Rows,
    asked: Iterable[tuple[str, list[Question]]],
    *,
    decode: bool = False,
    failure_count: int = 0,
    batch_size: int = 64,
) -> tuple[dict[str, TaskScore], list[Failure]]:
    """Score tasks, and collect the first wrong replies of each.

    Args:
        asked: tasks with their questions, see `evaluate.held_out_questions`.
        decode: decode every reply that is not right to the letter, to see if it is right in other words. Needed where
            several answers are right: names of photos, honest answers.
        failure_count: wrong replies to collect for each task.
    """
    scores, failures = {}, list[Failure]()
    for task, questions in asked:
        judged = judge(model, rows, task, questions, batch_size=batch_size)
        exact = judged.count(True)
        right = exact
        wrong: list[Failure] = []
        missed = [question for question, hit in zip(questions, judged, strict=True) if hit is False]
        step = batch_size if decode else max(_FEWEST_AT_A_TIME, failure_count)
        for start in range(0, len(missed), step):
            if not decode and len(wrong) >= failure_count:
                break
            part = missed[start : start + step]
            replies = greedy_replies(model, rows.tokenizer, [(q.image, q.question) for q in part])
            for question, reply in zip(part, replies, strict=True):
                if is_right(task, reply, question.answer):
                    right += 1
                else:
                    wrong.append(Failure(task, question, reply))
        count = len(judged) - judged.count(None)
        scores[task] = TaskScore(count, exact, right if decode else None, judged.count(None))
        failures += wrong[:failure_count]
    return scores, failures
