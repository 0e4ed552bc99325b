"""Exact-match accuracy on held-out questions, fast: one pass over question and answer instead of a decoding loop.

A greedy reply equals the reference answer, `<|im_end|>` included, exactly when every one of its tokens is the most
likely one after the reference tokens before it; so a single teacher-forced pass counts exact greedy matches. Where
several answers are right, the best one counts (`is_right` on decoded text is more lenient).
"""

from __future__ import annotations

from pathlib import Path

import torch

from distill.data.batches import Batch, Rows, pixel_values, stack
from distill.data.photos import Photos
from distill.data.sample import Sample, Spelled
from distill.tasks import ALTERNATIVES, ICON_TASKS, PHOTO_TASKS, TASKS, held_out
from mmmamba.model import MMMamba


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # a graph for every batch size here would cost more than it saves
def exact_matches(model: MMMamba, batch: Batch) -> torch.Tensor:
    """Which rows a greedy reply would match exactly, bool (batch,)."""
    device = model.device
    pixels = None if batch.pixels is None else pixel_values(batch.pixels.to(device))
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        hidden = model.hidden_states(batch.input_ids, pixels)
        rows, columns = (i.to(device) for i in batch.loss_mask[:, 1:].nonzero(as_tuple=True))
        predicted = model.language.output(hidden[rows, columns]).argmax(dim=-1)
    wrong = predicted != batch.input_ids.to(device)[rows, columns + 1]
    return torch.zeros(len(hidden), dtype=torch.int, device=device).index_add_(0, rows, wrong.int()) == 0


def accuracy(
    model: MMMamba,
    rows: Rows,
    photos: Photos | None,
    *,
    count: int,
    icons: Path | None = None,
    fonts: Path | None = None,
    nlvr: Path | None = None,
    batch_size: int = 64,
) -> dict[str, float]:
    """Share of exact matches for each task; those that need photos, icons, fonts or NLVR are left out without them."""
    needs = (
        dict.fromkeys(PHOTO_TASKS, photos) | dict.fromkeys(ICON_TASKS, icons) | {"printed_text": fonts, "nlvr": nlvr}
    )
    result = {}
    for task in TASKS:
        if needs.get(task, ...) is None:
            continue
        made = [
            rows.row(Sample(q.image, ((q.question, _best(q.answer)),), task))
            for q in held_out(task, count, photos=photos, icons=icons, fonts=fonts, nlvr=nlvr)
        ]
        fitting = [row for row in made if row is not None]
        if not fitting:  # photos without a class that is never taught
            continue
        hits = [
            exact_matches(model, stack(fitting[i : i + batch_size])).float() for i in range(0, len(fitting), batch_size)
        ]
        result[task] = round(float(torch.cat(hits).mean()), 4)
    return result


def _best(answer: str) -> str:
    """The first of several right answers, as it is written."""
    return answer if isinstance(answer, Spelled) else answer.split(ALTERNATIVES)[0]
