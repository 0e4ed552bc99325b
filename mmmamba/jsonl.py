"""Questions from a JSONL file, answers to another one, a line each; a run that was broken off goes on where it was.

A line of questions: {"question": ..., "image": file or "images": [files], "id": ..., "system": ..., "max_tiles": ...,
sampling settings, "extra": anything, which comes back with the answer}; all but the question may be left out. Files are
relative to that of the questions. A line of answers: {"id", "text", "finish_reason", "num_tokens", "text_tokens",
"image_tokens", "model", "extra"}, or {"id", "error", "model", "extra"}.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from mmmamba.batch import Answer, Batch, Question
from mmmamba.generate import SamplingParams

SAMPLING = tuple(f.name for f in fields(SamplingParams))
FIELDS = ("id", "question", "image", "images", "system", "max_tiles", "extra", *SAMPLING)


class JsonlError(ValueError):
    """A file that cannot be used as it is, with what to do."""


@dataclass(frozen=True)
class Line:
    """One line of the questions' file: a question, or why it is none. `id` is the line's number if it brings none."""

    id: str | int
    question: Question | None
    extra: Any = None
    error: str | None = None


@dataclass(frozen=True)
class Counts:
    """Of a run: lines that were answered now, that got an error, and that had been answered before."""

    answered: int
    errors: int
    skipped: int


def read_questions(
    path: Path, params: SamplingParams, *, system: str | None = None, max_tiles: int | None = None
) -> list[Line]:
    """Lines that are not blank. What a line brings comes before `params`, `system` and `max_tiles`.

    Raises: JsonlError if two lines have one id; OSError.
    """
    default = Question("", (), system, max_tiles, params)
    lines: list[Line] = []
    numbers: dict[str | int, int] = {}
    for number, text in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not text.strip():
            continue
        line = _line(text, number, default, path.parent)
        if line.id in numbers:
            both = f"lines {numbers[line.id]} and {number} both have the id {line.id!r}"
            raise JsonlError(f"{path}: {both}; answers are told apart by it")
        numbers[line.id] = number
        lines.append(line)
    return lines


def answer_file(
    batch: Batch, lines: Sequence[Line], out: Path, model: str, progress: Callable[[int], None] = lambda n: None
) -> Counts:
    """Answer what `out` does not hold yet, each answer written as soon as it is whole; `progress` is told how many.

    Raises: JsonlError if `out` is no file of answers of this model.
    """
    done = _done(out, model)
    todo = [line for line in lines if line.id not in done]
    answered = errors = 0
    with out.open("a", encoding="utf-8") as file:
        for line, answer in _answers(batch, todo):
            record: dict[str, Any] = {"id": line.id}
            if answer.error is not None:
                errors += 1
                record |= {"error": answer.error}
            else:
                answered += 1
                values = asdict(answer)
                record |= {name: values[name] for name in values if name not in ("index", "error")}
            record |= {"model": model} | ({} if line.extra is None else {"extra": line.extra})
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
            progress(1)
    return Counts(answered, errors, len(lines) - len(todo))


def num_unanswered(lines: Sequence[Line], out: Path, model: str) -> int:
    """Lines that `out` does not hold yet.  Raises: as `answer_file`, and if there is no folder for it."""
    if not out.resolve().parent.is_dir():
        raise JsonlError(f"{out}: there is no folder {out.resolve().parent.name}; make it, or choose another file")
    done = _done(out, model)
    return sum(line.id not in done for line in lines)


def forget_errors(out: Path) -> None:
    """Take the lines with errors out of a file of answers, so that they are asked again."""
    if not out.is_file():
        return
    kept = [text for text in _whole_lines(out) if "error" not in json.loads(text)]
    part = out.with_name(out.name + ".part")
    part.write_text("".join(f"{text}\n" for text in kept), encoding="utf-8")
    part.replace(out)


def _answers(batch: Batch, todo: Sequence[Line]) -> Iterator[tuple[Line, Answer]]:
    asked: list[Line] = []
    for line in todo:
        if line.question is None:
            yield line, Answer(-1, error=line.error)
        else:
            asked.append(line)
    for answer in batch.run(line.question for line in asked if line.question is not None):
        yield asked[answer.index], answer


def _done(out: Path, model: str) -> set[str | int]:
    """Ids that `out` holds; a last line that was cut short is removed from it."""
    if not out.exists():
        return set()
    done: set[str | int] = set()
    for number, text in enumerate(_whole_lines(out), start=1):
        record = json.loads(text)
        if record["model"] != model:
            theirs = record["model"]
            raise JsonlError(f'{out}: line {number} was answered by "{theirs}", not "{model}"; choose another file')
        done.add(record["id"])
    return done


def _whole_lines(out: Path) -> list[str]:
    """Lines of a file of answers; a last one that was cut short is removed.  Raises: JsonlError for other files."""
    data = out.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    lines = whole.decode("utf-8", errors="replace").split("\n")[:-1]  # not splitlines: answers may hold other breaks
    for number, text in enumerate(lines, start=1):
        try:
            record = json.loads(text)
            if not (isinstance(record["id"], str | int) and isinstance(record["model"], str)):
                raise ValueError
        except (ValueError, KeyError, TypeError) as error:
            raise JsonlError(f"{out}: line {number} is no answer of this command; choose another file") from error
    if len(whole) < len(data):
        out.write_bytes(whole)
    return lines


def _line(text: str, number: int, default: Question, folder: Path) -> Line:
    try:
        values = json.loads(text)
    except ValueError:
        return Line(number, None, error=f"line {number} is no JSON")
    if not isinstance(values, dict):
        return Line(number, None, error=f"line {number} is no JSON object")
    key = values.get("id", number)
    if not isinstance(key, str | int) or isinstance(key, bool):
        return Line(number, None, error=f"line {number}: id is {key!r}; use a text or a whole number")
    try:
        return Line(key, _question(values, default, folder), values.get("extra"))
    except (ValueError, TypeError) as error:
        return Line(key, None, values.get("extra"), f"line {number}: {error}")


def _question(values: Mapping[str, Any], default: Question, folder: Path) -> Question:
    unknown = [name for name in values if name not in FIELDS]
    if unknown:
        raise ValueError(f'the field "{unknown[0]}" is not known; put what should come back into "extra"')
    text, images = values.get("question"), values.get("images", [])
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"question is {text!r}; use a text")
    if isinstance(images, str) or "image" in values:
        images = [*([images] if isinstance(images, str) else images), *([values["image"]] if "image" in values else [])]
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise ValueError(f"images is {images!r}; use names of files")
    system, max_tiles = values.get("system", default.system), values.get("max_tiles", default.max_tiles)
    if not isinstance(system, str | None) or not isinstance(max_tiles, int | None):
        raise ValueError("system is a text and max_tiles a whole number")
    params = replace(default.params, **{name: values[name] for name in SAMPLING if name in values})
    return Question(text, tuple(folder / image for image in images), system, max_tiles, params)
