"""How a model's weights are held, by the names that the page, its command and scripts share. Torch is imported when a
precision is worked out, not when one is named."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

Precision = Literal["auto", "float32", "bfloat16", "float16", "int8", "int4", "bnb-int8", "bnb-nf4"]
DTYPES: tuple[Precision, ...] = ("float32", "bfloat16", "float16")
SCHEMES: tuple[Precision, ...] = ("int8", "int4", "bnb-int8", "bnb-nf4")  # of `quantize`, which imports torch
PRECISIONS: tuple[Precision, ...] = ("auto", *DTYPES, *SCHEMES)
LABELS: dict[str, str] = {
    "int8": "int8: 8 bits",
    "int4": "int4: 4 bits",
    "bnb-int8": "LLM.int8(): 8 bits, by bitsandbytes",
    "bnb-nf4": "NF4: 4 bits, by bitsandbytes",
}


def refusal(precision: str, device: str) -> str:
    """Why a precision cannot be had here, in one sentence; nothing if there is no reason known before trying."""
    if not precision.startswith("bnb-"):
        return ""
    if device.partition(":")[0] not in ("auto", "cpu", "cuda"):
        return f"{precision} runs on cpu and cuda, and the device is {device}; choose int8 or int4."
    if find_spec("bitsandbytes") is None:
        return f'{precision} needs the package bitsandbytes ("pip install bitsandbytes"); int8 and int4 need nothing.'
    return ""


def offered(device: str) -> list[tuple[str, str]]:
    """(label, precision) of what can be chosen on a device."""
    return [(LABELS.get(name, name), name) for name in PRECISIONS if not refusal(name, device)]


def default_precision(models: Sequence[str], device: torch.device) -> Precision:
    """What `auto` means for a model, the first of `models`, and for those it is compared with: see
    `quantize.precision`, whose reason is logged once."""
    from quantize.precision import default_precision as choose

    choice = choose(models, device)
    if choice.why:
        _say(choice.why)
    return choice.precision  # type: ignore[return-value]


@cache
def _say(choice: str) -> None:
    log.info("precision: %s", choice)
