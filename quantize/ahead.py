"""What a scheme makes of a checkpoint, told before it is loaded: its bytes in memory, and whether anything is lost."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch

from mmmamba.checkpoint import build_meta, dtype_of, named_tensors
from mmmamba.config import ModelConfig
from mmmamba.kernels.native import refusal_of_spec
from mmmamba.keymap import from_published
from mmmamba.packing import PackedSpec
from mmmamba.stored import CheckpointError, TensorFiles
from quantize.bnb import nbytes_of
from quantize.pack import widened
from quantize.schemes import Scheme, find_scheme


def loaded_bytes(config: ModelConfig, scheme: str | None, dtype: torch.dtype, *, in_c: bool = True) -> int:
    """Bytes of a model's tensors once they are loaded; those that it may share with another model are counted.

    Args:
        scheme: of `quantize`, or None for weights in `dtype`.
        in_c: packed weights are multiplied as they are; else they are counted twice, as `torch_products` holds them.
    """
    chosen = None if scheme is None else find_scheme(scheme)
    times = 1 if in_c or chosen is None or chosen.method == "bitsandbytes" else 2
    return sum(
        times * _packed_bytes(chosen, name, tuple(tensor.shape)) or tensor.numel() * dtype_of(name, dtype).itemsize
        for name, tensor in named_tensors(build_meta(config))
    )


def _packed_bytes(scheme: Scheme | None, name: str, shape: tuple[int, ...]) -> int:
    """0 where the scheme leaves a weight as it is."""
    if scheme is None or not scheme.wants(name):
        return 0
    if scheme.method == "bitsandbytes":
        return nbytes_of(scheme.name, shape)
    spec = scheme.spec(name, shape)
    return 0 if spec is None else spec.nbytes


def stored_scheme(directory: Path) -> str | None:
    """The scheme that a checkpoint was written by; None for others, and where its weights are not on this machine."""
    with ExitStack() as stack:
        try:
            return TensorFiles(directory, stack).scheme
        except CheckpointError:
            return None


def kept_by(directory: Path, scheme: str) -> bool:
    """Whether a checkpoint's weights are stored on grids that the scheme keeps, and that our C multiplies with: then
    nothing is lost by it, and nothing is unpacked. False where the weights are not on this machine."""
    chosen = find_scheme(scheme)
    with ExitStack() as stack:
        try:
            files = TensorFiles(directory, stack)
        except CheckpointError:
            return False
        wanted = [(ours, name) for name in files.names() if (ours := from_published(name)) and chosen.wants(ours)]
        return bool(wanted) and all(_is_kept(chosen, ours, files.packed_spec(name)) for ours, name in wanted)


def _is_kept(scheme: Scheme, name: str, spec: PackedSpec | None) -> bool:
    return spec is not None and spec.bits in scheme.grids(name) and not refusal_of_spec(widened(spec))
