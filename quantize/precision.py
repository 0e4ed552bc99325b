"""What a model's weights are held in unless someone says otherwise: one rule for the command line and the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from mmmamba.checkpoint import resolve_checkpoint
from mmmamba.kernels import native
from mmmamba.place import default_dtype
from quantize.ahead import kept_by, stored_scheme


class Choice(NamedTuple):
    """A scheme of `quantize`, or the name of a dtype; `why` is for people, empty where there was nothing to choose."""

    precision: str
    why: str = ""


def default_precision(models: Sequence[str], device: torch.device, *, revision: str | None = None) -> Choice:
    """For a model, the first of `models` (of which `revision` is), and those it is compared with: one for all of them.

    The scheme that they are stored by, if there is one. On a CPU `int4` for weights that are stored in 4 bits already,
    as nano's are, if the C that multiplies with them can be built: nothing is lost then. Else bfloat16 or float32.
    Raises: ValueError or OSError if the model is not to be had.
    """
    dtype = str(default_dtype(device)).removeprefix("torch.")
    directory = resolve_checkpoint(models[0], revision=revision, config_only=True)
    if (scheme := stored_scheme(directory)) is not None:
        return Choice(scheme)
    if device.type != "cpu" or not kept_by(directory, "int4"):
        return Choice(dtype)
    lib, reason = native.load_native()
    for other in models[1:] if lib else ():
        try:
            kept = kept_by(resolve_checkpoint(other, config_only=True), "int4")
        except (ValueError, OSError):
            continue  # it cannot be loaded in any precision
        if not kept:
            lib, reason = None, f"{other}, which it is compared with, is not stored in 4 bits"
            break
    if lib is None:
        return Choice(dtype, f"{dtype} rather than int4: {reason}")
    return Choice("int4", f"int4: {models[0]} is stored in 4 bits, nothing is lost")
