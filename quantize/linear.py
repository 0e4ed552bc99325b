"""Layers whose weights are packed: a linear layer in 8 or 4 bits, and an embedding table that shares one's weights."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from functools import cache, partial
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmmamba.kernels.native import load_native, refusal_of, unpack
from mmmamba.kernels.native import product as native_product
from mmmamba.packing import PackedSpec, PackedWeight, dequantize, unpack_bits
from quantize.torch_products import Product, torch_product

# Rows of x up to which products with packed weights take less time than unpacking and one large product (measured at
# nano's shapes with one thread: they meet at 16 to 20 rows, and near 90).
FEW_ROWS, FEW_ROWS_TORCH = 16, 64
# Rows of W that are unpacked at once: an output head of 92,553 rows would take as much memory as the rest of a small
# model.
UNPACKED_ROWS = 1 << 14

log = logging.getLogger(__name__)


class PackedLinear(nn.Module):
    """y = x W^T + bias with W packed; `qweight` uint8 flat, `scales` and `zeros` float16, one a group.

    The slow, obvious path unpacks W in the dtype of x, `UNPACKED_ROWS` at a time, on any device. On a CPU few rows of x
    are multiplied without that: by our C (`mmmamba.kernels.native`), or by torch's own kernels where that cannot be
    built.
    """

    bits: ClassVar[int]

    qweight: Tensor
    scales: Tensor
    zeros: Tensor

    def __init__(self, weight: PackedWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        assert weight.spec.bits == self.bits, f"{weight.spec} in a layer of {self.bits} bits"
        self.spec = weight.spec
        self.out_features, self.in_features = weight.spec.shape
        for name in ("qweight", "scales", "zeros"):
            self.register_buffer(name, getattr(weight, name))
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self._torch_product: Product | None = None

    def packed_weight(self) -> PackedWeight:
        return PackedWeight(self.qweight, self.scales, self.zeros, self.spec)

    def weight_as(self, dtype: torch.dtype) -> Tensor:
        """The weight (out_features, in_features), unpacked anew."""
        return _unpacked(self.packed_weight(), dtype)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        product = self._product_for(x, len(rows)) if len(rows) else None
        if product is None:
            return self._by_unpacking(x)
        y = product(rows).to(x.dtype).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias

    def _by_unpacking(self, x: Tensor) -> Tensor:
        if self.out_features <= UNPACKED_ROWS:
            return F.linear(x, self.weight_as(x.dtype), self.bias)
        y = x.new_empty(*x.shape[:-1], self.out_features)
        for start in range(0, self.out_features, UNPACKED_ROWS):
            rows = self.packed_weight().rows(start, min(start + UNPACKED_ROWS, self.out_features))
            y[..., start : start + UNPACKED_ROWS] = F.linear(x, _unpacked(rows, x.dtype))
        return y if self.bias is None else y + self.bias

    def _product_for(self, x: Tensor, num_rows: int) -> Product | None:
        weight = self.packed_weight()
        lib = _library(x.device.type, x.dtype, refusal_of(weight))
        if lib is not None:
            return partial(native_product, lib, weight) if num_rows <= FEW_ROWS else None
        # float64 is for references
        if x.device.type != "cpu" or x.dtype == torch.float64 or num_rows > FEW_ROWS_TORCH:
            return None
        if self._torch_product is None:
            self._torch_product = torch_product(weight)
        return self._torch_product

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # To another device with everything; but narrower scales would be other weights.
        scales, zeros = self.scales, self.zeros
        super()._apply(fn, recurse)
        self._torch_product = None  # made from the tensors that were here
        self.scales, self.zeros = scales.to(self.qweight.device), zeros.to(self.qweight.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, group_size={self.spec.group_size}"


class Int8Linear(PackedLinear):
    bits = 8


class Int4Linear(PackedLinear):
    bits = 4


def packed_linear(weight: PackedWeight, bias: Tensor | None = None) -> PackedLinear:
    return (Int4Linear if weight.spec.bits == 4 else Int8Linear)(weight, bias)


class PackedEmbedding(nn.Module):
    """Rows of a packed table, by id. A tied output head is the same `table`, so that both see the same numbers."""

    def __init__(self, table: PackedLinear, dtype: torch.dtype) -> None:
        super().__init__()
        self.table = table
        self.num_embeddings, self.embedding_dim = table.out_features, table.in_features
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=table.qweight.device), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """(...) int64 to (..., embedding_dim) in the dtype that the model was last converted to."""
        spec, flat = self.table.spec, ids.flatten()
        groups = len(flat) * (self.embedding_dim // spec.group_size)
        bits = self.table.qweight.view(self.num_embeddings, -1)[flat].flatten()
        q = unpack_bits(bits, spec.bits).view(groups, spec.group_size)
        scales, zeros = (t.view(self.num_embeddings, -1)[flat].flatten() for t in (self.table.scales, self.table.zeros))
        rows = PackedSpec(spec.bits, spec.group_size, (len(flat), self.embedding_dim))
        dtype = self.get_buffer("like").dtype
        return dequantize(q, scales, zeros, rows, dtype).view(*ids.shape, self.embedding_dim)


def _unpacked(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    lib = _library(weight.qweight.device.type, dtype, refusal_of(weight))
    return weight.unpack(dtype) if lib is None else unpack(lib, weight).to(dtype)


def _library(device_type: str, dtype: torch.dtype, refusal: str) -> ctypes.CDLL | None:
    """The C library where it can be used, else None; says once which and why."""
    if device_type != "cpu":
        refusal = f"the device is {device_type}"
    elif dtype not in (torch.float32, torch.bfloat16):
        refusal = f"activations are {dtype}"
    lib, reason = load_native() if not refusal else (None, refusal)
    _say(f"torch ({reason})" if lib is None else "C, as they are stored")
    return lib


@cache
def _say(choice: str) -> None:
    log.info("packed products: %s", choice)
