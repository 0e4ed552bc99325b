"""Layers of bitsandbytes (arXiv:2208.07339, arXiv:2305.14314), stored so that they come back exact.

Its layers do not load by `load_state_dict`, and some processors repack a weight in its first product, after which other
scales would be saved: so a layer is made from stored tensors by its own constructors, and saved before it is used.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

OUTLIER_THRESHOLD = 6.0  # of LLM.int8(), arXiv:2208.07339
BLOCK = 64  # weights to a scale in NF4, arXiv:2305.14314
# What it warns of at every product, or that it does not fetch code from a hub.
NOISE = ("MatMul8bitLt: inputs will be cast", "Failed to load CPU gemm_4bit_forward")
NF4_PARTS = ("weight", "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4")
INT8_PARTS = ("weight", "SCB")


def parts_of(scheme: str) -> tuple[str, ...]:
    """Names of the tensors that a layer is stored as, behind the layer's own."""
    return NF4_PARTS if scheme == "bnb-nf4" else INT8_PARTS


@cache
def import_bitsandbytes() -> Any:
    """Raises: ValueError with the way out if it cannot be imported."""
    quiet = logging.Filter()
    quiet.filter = lambda record: not record.getMessage().startswith(NOISE)  # type: ignore[method-assign]
    for name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
        logging.getLogger(name).addFilter(quiet)
    try:
        with _without_kernel_downloads():
            import bitsandbytes
    except Exception as error:  # its import loads compiled libraries, which fail in ways of their own
        raise ValueError(
            f"bitsandbytes cannot be imported ({type(error).__name__}: {error}); install it with "
            '"pip install bitsandbytes", or use the schemes int8 or int4, which need nothing'
        ) from error
    return bitsandbytes


@contextmanager
def _without_kernel_downloads() -> Iterator[None]:
    """On some processors its import fetches compiled code from a hub by the package `kernels`, if that is installed.
    No code from a hub is run here: inside, that package cannot be imported."""
    known = sys.modules.get("kernels")
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if known is None:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = known


def is_bnb(module: nn.Module) -> bool:
    return type(module).__module__.startswith("bitsandbytes.")


def make_layer(weight: Tensor, bias: Tensor | None, scheme: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Quantize a weight (out_features, in_features) into a layer whose products take activations of `dtype`."""
    nn_bnb = import_bitsandbytes().nn
    layer = _empty(scheme, tuple(weight.shape), bias, device, dtype)
    wide = weight.detach().to("cpu")
    if scheme == "bnb-nf4":
        layer.weight = nn_bnb.Params4bit(
            wide, requires_grad=False, quant_type="nf4", blocksize=BLOCK, compress_statistics=False, module=layer
        )
    else:
        layer.weight = nn_bnb.Int8Params(wide, requires_grad=False, has_fp16_weights=False)
    return _ready(layer.to(device))


def from_parts(
    parts: dict[str, Tensor],
    bias: Tensor | None,
    scheme: str,
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
) -> nn.Module:
    """The layer whose `to_parts` these are.  Raises: ValueError if some are missing."""
    if set(parts) != set(parts_of(scheme)):
        raise ValueError(
            f"a {scheme} weight has parts {', '.join(sorted(parts))}; expected {', '.join(parts_of(scheme))}"
        )
    nn_bnb = import_bitsandbytes().nn
    layer = _empty(scheme, shape, bias, device, dtype)
    if scheme == "bnb-nf4":
        stats = {name.removeprefix("weight."): t for name, t in parts.items() if name != "weight"}
        layer.weight = nn_bnb.Params4bit.from_prequantized(
            data=parts["weight"], quantized_stats=stats, device=device, module=layer
        )
    else:
        codes, scale = parts["weight"].to(device), parts["SCB"].to(device)
        layer.weight = nn_bnb.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scale)
    return _ready(layer)


def to_parts(layer: nn.Module) -> dict[str, Tensor]:
    """What is stored of a layer.  Raises: ValueError if its first product has repacked it."""
    if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
        raise ValueError(
            "this model has run, and bitsandbytes repacked its weights for this processor; save it before its first use"
        )
    state = {name: t for name, t in layer.state_dict().items() if name not in ("bias", "weight_format")}
    return {name: t.detach().contiguous().cpu() for name, t in state.items()}


def nbytes_of(scheme: str, shape: tuple[int, ...]) -> int:
    """Bytes of a weight (rows, columns) and its scales."""
    rows, cols = shape
    return rows * cols // 2 + 4 * (rows * cols // BLOCK) if scheme == "bnb-nf4" else rows * (cols + 4)


def _empty(scheme: str, shape: tuple[int, ...], bias: Tensor | None, device: torch.device, dtype: torch.dtype) -> Any:
    """A layer without a weight."""
    nn_bnb = import_bitsandbytes().nn
    rows, cols = shape
    with torch.device("meta"):
        if scheme == "bnb-nf4":
            layer = nn_bnb.Linear4bit(cols, rows, bias is not None, compute_dtype=dtype, quant_type="nf4")
            # The repacking for AVX-512 takes only these shapes, and refuses others with an assertion.
            layer.support_avx512bf16_for_cpu &= rows % 32 == 0 and cols % 2 == 0
        else:
            layer = nn_bnb.Linear8bitLt(
                cols, rows, bias is not None, has_fp16_weights=False, threshold=OUTLIER_THRESHOLD
            )
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().to(device), requires_grad=False)
    return layer


def _ready(layer: nn.Module) -> nn.Module:
    return layer.eval().requires_grad_(False)
