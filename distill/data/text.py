"""Conversations without a picture, from JSON Lines files: dialogues, problems, and what the base model said itself."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from distill.data.sample import QA, Sample, Split, check_split, held_out, rng_for

HELD_OUT_PERCENT = 2


class Conversations:
    """Turns from one file of `{"messages": [{"role", "content"}, ...]}` lines, `.jsonl` or `.jsonl.gz`. A `Source`.

    Consecutive messages of one role are joined, an answer without a question and a question without an answer are left
    out. Held out are the 2 % of conversations whose first message hashes so; other fields of a line do not matter.
    """

    def __init__(
        self, path: str | Path, split: Split = "train", *, name: str | None = None, any_start: bool = False
    ) -> None:
        """
        Args:
            name: of the source and the task of its samples; the file's name without endings unless given.
            any_start: begin a sample at any question of the conversation, not only at the first. For long small talk,
                of which a row would otherwise only ever hold the greetings.
        Raises: ValueError for a file that cannot be read, a line that is no such object (with its number), or no
            conversation of this split.
        """
        path = Path(path)
        self.name = name or path.name.removesuffix(".gz").removesuffix(".jsonl")
        self.split = check_split(split)
        self.any_start = any_start
        self.num_skipped = 0  # conversations with a system message or without a whole turn
        self._lines: list[bytes] = []  # kept as text: a tenth of the memory, and parsing costs 50 µs a sample
        try:
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
                lines = file.read().splitlines()
        except (OSError, EOFError) as error:
            raise ValueError(f"{path} cannot be read ({error}); fetch or make it again") from error
        for number, line in enumerate(lines, start=1):
            try:
                messages = json.loads(line)["messages"]
                turns = _turns(messages)
                first = messages[0]["content"] if messages else ""
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {number}: no object with messages ({error!r}); mend the line"
                ) from error
            if not turns:
                self.num_skipped += 1
            elif held_out(first, HELD_OUT_PERCENT) == (split == "val"):
                self._lines.append(line)
        if not self._lines:
            raise ValueError(f'{path} holds no conversation of split "{split}" ({self.num_skipped} could not be used)')

    def __len__(self) -> int:
        """Number of conversations."""
        return len(self._lines)

    def turns(self, number: int) -> tuple[QA, ...]:
        """All turns of one conversation, `number` from 0."""
        return _turns(json.loads(self._lines[number])["messages"])

    def sample(self, seed: int, index: int, attempt: int = 0) -> Sample:
        rng = rng_for(self.name, self.split, seed, index, attempt)
        turns = self.turns(rng.randrange(len(self._lines)))
        start = rng.randrange(len(turns)) if self.any_start else 0
        return Sample(None, turns[start:], self.name)


def _turns(messages: list[dict[str, Any]]) -> tuple[QA, ...]:
    """Questions with their answers; none if there is a system message, which a sample cannot hold."""
    joined: list[tuple[str, str]] = []
    for message in messages:
        role, content = message["role"], message["content"].strip()
        if role == "system":
            return ()
        if role not in ("user", "assistant"):
            raise ValueError(f'role "{role}" is neither "user" nor "assistant"')
        if joined and joined[-1][0] == role:
            joined[-1] = (role, f"{joined[-1][1]}\n{content}".strip())
        elif content:
            joined.append((role, content))
    if joined and joined[0][0] == "assistant":
        del joined[0]
    questions, answers = joined[::2], joined[1::2]
    return tuple((question, answer) for (_, question), (_, answer) in zip(questions, answers, strict=False))
