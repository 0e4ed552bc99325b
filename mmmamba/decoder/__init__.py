"""Decoding a token with few fused kernels a layer and a CUDA graph around them, beside the plain path of `generate`.

    decoder_for(model)      the one place that chooses: a `FusedDecoder`, or None for the plain path; says once which
    FusedDecoder.open       conversations that go on together, tokens drawn on the device
    FusedDecoder.decode_one_token    as `generate.decode_one_token`

Importing needs no Triton and no GPU. `MMMAMBA_DECODER=plain` in the environment turns the fused decoder off, `fused`
makes it an error where it cannot run.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Literal
from weakref import WeakKeyDictionary

import torch
from torch import nn

from mmmamba.kernels import SWITCH
from mmmamba.model import MMMamba

if TYPE_CHECKING:
    from mmmamba.decoder.fused import FusedDecoder

Choice = Literal["auto", "plain", "fused"]
CHOICES = ("auto", "plain", "fused")
MIN_CAPABILITY = (8, 0)  # the first cards that multiply bf16
# Relative RMS difference from the plain path that rounding may explain in any model; a wrong kernel is off by about 1.
AGREEMENT = {torch.float32: 0.02, torch.bfloat16: 0.1, torch.float16: 0.1}

# Rows of a workspace whose token is one launch (`one_launch.py`), by compute capability, hidden size, kind of weights:
# what was measured on a card and found faster than many launches (`benchmarks/LOG.md`, 27).
ONE_LAUNCH_ROWS: dict[tuple[tuple[int, int], int, str], tuple[int, ...]] = {((9, 0), 2048, "dense"): (4,)}

log = logging.getLogger(__name__)

__all__ = ["SWITCH", "Choice", "decoder_for", "make_decoder"]

_chosen: WeakKeyDictionary[nn.Module, tuple[tuple[object, ...], FusedDecoder | None]] = WeakKeyDictionary()


def decoder_for(model: object, choice: Choice | None = None) -> FusedDecoder | None:
    """The fused decoder of a model, or None where the plain path is to be taken; made on first use, and again when the
    model has other weights. Models that train, and those on the CPU, take the plain path.

    Args: choice: in place of the environment's `MMMAMBA_DECODER`.
    Raises: ValueError if the choice is unknown, or is "fused" and cannot be had.
    """
    if not isinstance(model, MMMamba):
        return None
    choice = choice or _from_environment()
    probe = model.language.norm.weight
    if choice == "plain" or (probe.device.type != "cuda" and choice != "fused"):
        return None
    if probe.is_cuda and probe.device.index != torch.cuda.current_device():
        return None  # Triton launches on the current device
    head, first, last = model.language.output, model.language.layers[0], model.language.layers[-1]
    # Weights that were moved, converted, packed or trained are others. (Decays are what is copied here: their version
    # counts what an optimizer wrote.)
    decays = getattr(last.mixer, "A_log", probe)
    written = None if decays.is_inference() else decays._version
    places = (id(head), id(first.get_submodule("mlp.w1")), probe.data_ptr(), decays.data_ptr())
    key = (*places, model.dtype, model.training, probe.requires_grad, decays.requires_grad, written, choice)
    known = _chosen.get(model)
    if known is None or known[0] != key:
        _chosen.pop(model, None)  # frees its buffers before new ones are made
        decoder, reason = make_decoder(model)
        if decoder is None and choice == "fused":
            raise ValueError(f"the fused decoder cannot run: {reason}; set {SWITCH}=auto for the plain path there")
        log.info("decoder: %s", _described(decoder) if decoder else f"plain ({reason})")
        known = _chosen[model] = key, decoder
    return known[1]


def _described(decoder: FusedDecoder) -> str:
    rows = " and ".join(map(str, decoder.one_launch))
    return "fused kernels in a CUDA graph" + (f", one launch a token in batches of {rows}" if rows else "")


def _from_environment() -> Choice:
    value = os.environ.get(SWITCH, "auto")
    for choice in CHOICES:
        if value == choice:
            return choice  # type: ignore[return-value]
    raise ValueError(f'{SWITCH}="{value}" is not known; use one of {", ".join(CHOICES)}')


def make_decoder(model: MMMamba) -> tuple[FusedDecoder | None, str]:
    """A decoder that was seen to agree with the plain path on a few tokens, or None with the reason."""
    if model.training or any(p.requires_grad for p in model.parameters()):
        return None, "the model trains"
    if model.device.type != "cuda":
        return None, f"the model is on {model.device}"
    capability = torch.cuda.get_device_capability(model.device)
    if capability < MIN_CAPABILITY or torch.version.hip is not None:
        return None, f"{torch.cuda.get_device_name(model.device)} is no NVIDIA card that multiplies bf16"
    try:
        from mmmamba.decoder.check import disagreement
        from mmmamba.decoder.fused import FusedDecoder
        from mmmamba.decoder.layers import Unsupported
    except Exception as error:  # whatever a broken build of Triton raises means "not here"
        return None, f"Triton does not import: {type(error).__name__}: {error}"
    reason = ""
    # Where kernels cannot overlap on a card, or do so wrongly, they may still do one after the other.
    for overlap in (True, False):
        try:
            decoder = FusedDecoder(model, overlap=overlap)
            difference = disagreement(model, overlap=overlap)
        except Unsupported as error:
            return None, str(error)
        except Exception as error:  # a compiler that fails on this card raises its own; the plain path needs none
            log.warning("the fused decoder failed on this card (overlap: %s)", overlap, exc_info=True)
            reason = f"it fails here: {type(error).__name__}: {error}"
            continue
        if difference <= AGREEMENT[model.dtype]:
            decoder.one_launch = _rows_in_one_launch(model, decoder, capability)
            return decoder, ""
        log.warning("the fused decoder differs from the plain path by %.2g (overlap: %s)", difference, overlap)
        reason = f"it differs from the plain path by {difference:.2g}"
    return None, reason


def _rows_in_one_launch(model: MMMamba, decoder: FusedDecoder, capability: tuple[int, int]) -> tuple[int, ...]:
    """Rows of workspaces that one launch serves: measured on such a card, and seen to agree on this one. Says why any
    that were measured stay with many launches."""
    from mmmamba.decoder.check import disagreement
    from mmmamba.decoder.fused import FusedDecoder
    from mmmamba.decoder.layers import Unsupported

    kind = decoder.layers.layers[0].in_proj.kind
    if decoder.layers.head.kind != kind:
        return ()
    taken = []
    for rows in ONE_LAUNCH_ROWS.get((capability, decoder.layers.hidden_size, kind), ()):
        about = f"batches of {rows} are decoded in many launches"
        try:
            FusedDecoder(model, overlap=decoder.overlap, one_launch=(rows,)).reserve(rows)  # with all layers it fits
            difference = disagreement(model, overlap=decoder.overlap, one_launch=rows)
        except (Unsupported, ImportError) as error:  # `cuda-bindings` need not be there
            log.info("%s (%s)", about, error)
        except Exception as error:  # whatever a compiler or a driver that refuses raises
            log.warning("%s (one fails here: %s: %s)", about, type(error).__name__, error)
        else:
            if difference <= AGREEMENT[model.dtype]:
                taken.append(rows)
            else:
                log.warning("%s (one differs from the plain path by %.2g)", about, difference)
    return tuple(taken)
