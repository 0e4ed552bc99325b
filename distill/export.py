"""A trained student in the published inference layout, which the authors' code and `mmmamba.load_model` read."""

from __future__ import annotations

from pathlib import Path

import torch

from distill.checkpoints import writing_model
from distill.convert import fused_copy
from mmmamba.checkpoint import load_model, read_config, save_model
from mmmamba.model import MMMamba


def export_student(student: MMMamba, out: Path) -> Path:
    """Write `config.json`, safetensors with fused `wvkqgdt`, and the tokenizer's files of the model it grew from.

    The student is left as it is and may train on. What was written is read again and compared, so a full disk or a
    torn file shows here and not on the day of use.

    Returns: `out`.
    Raises: OSError if it cannot be written; ValueError for a model without a `mamba2` layer, or if what is on disk is
        not what was written.
    """
    if student.config.kind == "teacher":
        raise ValueError("the model has no mamba2 layer, so it is no student; write a teacher with mmmamba.save_model")
    fused = fused_copy(student)
    with writing_model(out):
        save_model(fused, out)
    written = dict(load_model(out, dtype=student.dtype).named_parameters())
    if read_config(out) != fused.config:
        raise ValueError(f"{out}/config.json does not say what the student is; look at the disk and export again")
    for name, tensor in fused.named_parameters():
        # Decays and step biases are read in float32 at least, whatever the rest is.
        if not torch.equal(written[name].to(tensor), tensor):
            raise ValueError(f"{out} holds other values of {name} than were written; look at the disk and export again")
    return out
