"""Exact-match accuracy on held-out questions, fast: one pass over question and answer instead of a decoding loop.

A greedy reply equals the reference answer, `<|im_end|>` included, exactly when every one of its tokens is the most
likely one after the reference tokens before it; so a single teacher-forced pass counts exact greedy matches. Where
several answers are right, the best one counts (`is_right` on decoded text is more lenient, see `distill.scores`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from distill.data.batches import Batch, Rows, pixel_values, stack
from distill.data.photos import Photos
from distill.data.sample import Sample, Spelled
from distill.reading import PRINTED, PRINTED_LONG
from distill.tasks import ALTERNATIVES, ICON_TASKS, PHOTO_TASKS, TASKS, Question, held_out
from mmmamba.model import MMMamba

# Rows that are read at once. On a CPU few: what layers hand on then stays in its caches, and no step maps fresh memory.
CPU_ROWS = 8
GPU_ROWS = 64
# Between what bf16 and float32 make of a lead lay at most 0.71 over 2,750 tokens of answers, right and wrong, of a
# teacher and a student. Leads of twice as much do not change sides.
SURE_LOGITS = 1.5


def rows_at_once(device: torch.device) -> int:
    """How many questions to read at a time on this device; it changes the time that they take, not the answers."""
    return CPU_ROWS if device.type == "cpu" else GPU_ROWS


def exact_matches(model: MMMamba, batch: Batch) -> torch.Tensor:
    """Which rows a greedy reply would match exactly, bool (batch,)."""
    # Beside frozen weights in bf16 mixers are float32: only autocast multiplies the two.
    return _leads(model, batch, narrow=model.device.type == "cuda" or model.dtype == torch.bfloat16) > 0


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # a graph for every batch size here would cost more than it saves
def _leads(model: MMMamba, batch: Batch, *, narrow: bool) -> torch.Tensor:
    """For each row how far the token of its answer that leads least is ahead of all other tokens, in logits, (batch,).

    Below 0 it is behind one. Equal ones count as a lead, however small, for the token with the lower id, as `argmax`
    takes it.
    """
    device = model.device
    pixels = None if batch.pixels is None else pixel_values(batch.pixels.to(device))
    used = int(batch.loss_mask.any(dim=0).nonzero().max()) + 1  # the rest is padding behind the last answer
    ids = batch.input_ids[:, :used].to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=narrow):
        hidden = model.hidden_states(ids, pixels)
        rows, columns = (i.to(device) for i in batch.loss_mask[:, 1:].nonzero(as_tuple=True))
        logits = model.language.output(hidden[rows, columns])
    wanted = ids[rows, columns + 1, None]
    own = logits.gather(1, wanted).squeeze(1).float()
    chosen = logits.argmax(dim=-1, keepdim=True) == wanted
    other = logits.scatter(1, wanted, float("-inf")).amax(dim=-1).float()
    lead = torch.where(chosen.squeeze(1), (own - other).clamp(min=torch.finfo(torch.float32).tiny), own - other)
    lowest = torch.full((len(hidden),), float("inf"), device=device)
    return lowest.scatter_reduce(0, rows, lead, "amin")


def held_out_questions(
    photos: Photos | None,
    *,
    count: int,
    tasks: Sequence[str] | None = None,
    icons: Path | None = None,
    fonts: Path | None = None,
    nlvr: Path | None = None,
) -> Iterator[tuple[str, list[Question]]]:
    """Tasks with `count` questions each, or as many as there are.

    Args:
        tasks: of `TASKS`. None: all, but those that need photos, icons, fonts or NLVR and go without.
    Raises: ValueError for an unknown task, or one that was asked for and lacks what it needs.
    """
    needs = dict.fromkeys(PHOTO_TASKS, photos) | dict.fromkeys(ICON_TASKS, icons)
    needs |= {PRINTED: fonts, PRINTED_LONG: fonts, "nlvr": nlvr}
    for task in TASKS if tasks is None else tasks:
        if tasks is None and needs.get(task, ...) is None:
            continue
        questions = held_out(task, count, photos=photos, icons=icons, fonts=fonts, nlvr=nlvr)
        if questions:  # none: photos without a class that is never taught
            yield task, questions


def judge(
    model: MMMamba, rows: Rows, task: str, questions: Sequence[Question], *, batch_size: int | None = None
) -> list[bool | None]:
    """For each question whether a greedy reply is the first of its right answers; None if it fits no row.

    Rows of about the same length are read together, `batch_size` at a time (None: as many as suit the device), since
    all of a batch are as long as its longest. A CPU with matrix units for bf16 reads all rows with them first, in less
    than half the time; rows whose verdict hangs on less than SURE_LOGITS are then read again in float32.
    """
    made = [rows.row(Sample(q.image, ((q.question, best_answer(q)),), task)) for q in questions]
    lengths = {place: int(row.loss_mask.nonzero()[0].max()) for place, row in enumerate(made) if row is not None}
    order = sorted(lengths, key=lengths.__getitem__)
    size = batch_size or rows_at_once(model.device)
    found: list[bool | None] = [None] * len(made)

    def batches(places: Sequence[int]) -> Iterator[tuple[Sequence[int], Batch]]:
        for start in range(0, len(places), size):
            part = places[start : start + size]
            yield part, stack([row for place in part if (row := made[place]) is not None])

    if _bf16_is_faster(model):
        unsure = []
        for part, batch in batches(order):
            for place, lead in zip(part, _leads(model, batch, narrow=True).tolist(), strict=True):
                if abs(lead) >= SURE_LOGITS:
                    found[place] = lead > 0
                else:
                    unsure.append(place)
        order = unsure
    for part, batch in batches(order):
        for place, hit in zip(part, exact_matches(model, batch).tolist(), strict=True):
            found[place] = hit
    return found


def _bf16_is_faster(model: MMMamba) -> bool:
    """Whether this model in float32 is on a CPU whose products of bf16 are several times as fast."""
    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return model.device.type == "cpu" and model.dtype == torch.float32 and probe is not None and bool(probe())


def accuracy(
    model: MMMamba,
    rows: Rows,
    photos: Photos | None,
    *,
    count: int,
    icons: Path | None = None,
    fonts: Path | None = None,
    nlvr: Path | None = None,
    batch_size: int | None = None,
) -> dict[str, float]:
    """Share of exact matches for each task; those that need photos, icons, fonts or NLVR are left out without them."""
    result = {}
    for task, questions in held_out_questions(photos, count=count, icons=icons, fonts=fonts, nlvr=nlvr):
        hits = [hit for hit in judge(model, rows, task, questions, batch_size=batch_size) if hit is not None]
        if hits:
            result[task] = round(sum(hits) / len(hits), 4)
    return result


def best_answer(question: Question) -> str:
    """The first of several right answers, as it is written."""
    answer = question.answer
    return answer if isinstance(answer, Spelled) else answer.split(ALTERNATIVES)[0]
