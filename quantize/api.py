"""Quantize a model, or one that is being loaded; write a quantized checkpoint and read it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mmmamba.checkpoint import copy_tokenizer, load_model, named_tensors, write_config
from mmmamba.keymap import to_published
from mmmamba.model import MMMamba
from mmmamba.packing import PackedSpec, PackedWeight
from mmmamba.stored import (
    INDEX,
    PACKED_METADATA,
    PACKED_PARTS,
    QUANTIZED_METADATA,
    CheckpointError,
    ForeignParts,
    packed_metadata,
)
from quantize import bnb
from quantize.linear import PackedEmbedding, PackedLinear, packed_linear
from quantize.pack import narrow, nearest, relative_error, search, widen
from quantize.schemes import HEAD, TABLE, Scheme, find_scheme

WEIGHTS = "model.safetensors"
GRID_GROUPS = (64, 96, 128, 32)  # groups of weights that were trained as they are stored (distill/rounding.py)


class Quantizer:
    """Puts packed layers in the place of a model's own, one weight at a time.

    Args: group_size: weights to a scale, for int4 (64).
    Raises: ValueError if the scheme is unknown, has groups of one size only, or needs a package that is not there.
    """

    def __init__(self, name: str, group_size: int | None = None) -> None:
        self.scheme: Scheme = find_scheme(name, group_size)
        if self.scheme.method == "bitsandbytes":
            bnb.import_bitsandbytes()  # says at once if it is missing
        self.errors: dict[str, float] = {}  # relative error of each weight that was rounded here

    @property
    def name(self) -> str:
        return self.scheme.name

    def wants(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a weight of ours is packed by this scheme, rather than kept in floating point."""
        if not self.scheme.wants(name):
            return False
        return self.scheme.method == "bitsandbytes" or self.scheme.spec(name, shape) is not None

    def place_(
        self,
        model: MMMamba,
        name: str,
        weight: Tensor | PackedWeight | ForeignParts,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Pack a wanted weight, or take it as it is if it is stored in a form that fits, and put a layer with it into
        the model. `dtype` is that of the activations."""
        path = name.removesuffix(".weight")
        bias = getattr(model.get_submodule(path), "bias", None)
        if self.scheme.method == "bitsandbytes":
            layer = self._bnb_layer(name, weight, bias, device, dtype)
        else:
            if isinstance(weight, ForeignParts):
                raise CheckpointError(f"{name} is stored as another library does, not by {self.name}; write it again")
            layer = packed_linear(self._pack(name, weight), bias).to(device)
        if name == TABLE:
            assert isinstance(layer, PackedLinear)
            _replace(model, path, PackedEmbedding(layer, dtype))
            if model.config.language.tie_word_embeddings:
                _replace(model, HEAD.removesuffix(".weight"), layer)
        else:
            _replace(model, path, layer)

    def _pack(self, name: str, weight: Tensor | PackedWeight) -> PackedWeight:
        """In 4 or 8 bits."""
        if isinstance(weight, PackedWeight):
            if weight.spec.bits in self.scheme.grids(name):
                return widen(weight)
            weight = weight.unpack(torch.float32)
        spec = self.scheme.spec(name, tuple(weight.shape))
        if spec is None:
            raise CheckpointError(f"{name} {tuple(weight.shape)} is not packed as {self.name} packs; write it again")
        packed = next((p for bits in self.scheme.grids(name) if (p := on_grid(weight, bits))), None)
        if packed is None:
            # With 8 bits the search gains less than a twentieth of an error that is small already.
            packed = nearest(weight, spec) if spec.bits == 8 else search(weight, spec)
        packed = widen(packed)
        self.errors[name] = relative_error(weight, packed)
        return packed

    def _bnb_layer(
        self, name: str, weight: Any, bias: Tensor | None, device: torch.device, dtype: torch.dtype
    ) -> nn.Module:
        if isinstance(weight, ForeignParts):
            return bnb.from_parts(weight.tensors, bias, self.scheme.name, weight.shape, device, dtype)
        wide = weight.unpack(torch.float32) if isinstance(weight, PackedWeight) else weight
        return bnb.make_layer(wide, bias, self.scheme.name, device, dtype)


def on_grid(weight: Tensor, bits: int) -> PackedWeight | None:
    """The weight on the grid that it lies on already, or None if it lies on none: then nothing is lost."""

    def pack(rows: Tensor, group_size: int) -> PackedWeight | None:
        packed = nearest(rows, PackedSpec(bits, group_size, tuple(rows.shape)))
        return packed if torch.equal(packed.unpack(rows.dtype), rows) else None

    sizes = [size for size in GRID_GROUPS if weight.shape[-1] % size == 0 and pack(weight[:2], size)]
    return next((packed for size in sizes if (packed := pack(weight, size))), None)


@torch.no_grad()
def quantize_(model: MMMamba, scheme: str, *, group_size: int | None = None) -> Quantizer:
    """Pack the weights of a model where they are; returns what was done (`errors` by name).

    Args: group_size: weights to a scale, for int4 (64).
    Raises: ValueError if the scheme is unknown, or the model is quantized already.
    """
    if model.scheme is not None:
        raise ValueError(f"the model is {model.scheme} already; quantize the checkpoint that it was made from")
    quantizer = Quantizer(scheme, group_size)
    for name in [name for name, _ in named_tensors(model)]:  # one by one: each is freed when it is packed
        tensor = model.get_parameter(name)
        if quantizer.wants(name, tuple(tensor.shape)):
            quantizer.place_(model, name, tensor.detach(), tensor.device, model.dtype)
    model.scheme = scheme
    model.eval().requires_grad_(False)
    return quantizer


def _replace(model: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, attribute = path.rpartition(".")
    setattr(model.get_submodule(parent), attribute, layer)


# --- checkpoints ---


def save_quantized(model: MMMamba, path: str | Path, *, source: str | None = None) -> Path:
    """Write `config.json`, one safetensors file and the tokenizer's files; returns the path of the weights.

    `load_model` reads the directory. Scheme, group size and source (what the model was made from: a hub id or a name)
    are in the file's metadata under "mmmamba_quantized". A checkpoint that is there already is replaced.

    Raises: ValueError if the model is not quantized, has run with layers that a first product repacks, or lies in the
        directory itself.
    """
    if model.scheme is None:
        raise ValueError("the model is not quantized; call quantize_(model, scheme) first, or save_model")
    path = Path(path)
    check_target(path, model.source)
    tensors: dict[str, Tensor] = {}
    specs: dict[str, object] = {}
    foreign: dict[str, object] = {}
    sizes = set()
    for ours, module in _quantized_layers(model):
        name = to_published(ours, model.config)
        if isinstance(module, PackedLinear):
            packed = narrow(module.packed_weight())
            tensors |= {f"{name}.{part}": getattr(packed, part) for part in PACKED_PARTS}
            specs[name] = packed_metadata(packed.spec)
            if packed.spec.bits == 4:
                sizes.add(packed.spec.group_size)
        else:
            parts = bnb.to_parts(module)
            tensors |= {f"{name}.{part}": t for part, t in parts.items()}
            foreign[name] = {"shape": [module.out_features, module.in_features], "parts": sorted(parts)}
            if model.scheme == "bnb-nf4":
                sizes.add(bnb.BLOCK)
    quantized = {ours for ours, _ in _quantized_layers(model)}
    for ours, tensor in named_tensors(model):
        if ours not in quantized and not ours.startswith("embedding.text.table."):
            tensors[to_published(ours, model.config)] = tensor.detach()
    about = {
        "scheme": model.scheme,
        "group_size": sorted(sizes) if len(sizes) > 1 else next(iter(sizes), None),
        "source": source,
        "foreign": foreign,
    }
    path.mkdir(parents=True, exist_ok=True)
    write_config(model, path)
    weights = path / WEIGHTS
    metadata = {"format": "pt", PACKED_METADATA: json.dumps(specs), QUANTIZED_METADATA: json.dumps(about)}
    # Whole or not at all: somebody may be running the weights that it replaces, which stay mapped from their file.
    unfinished = weights.with_suffix(".part")
    save_file({name: t.contiguous().cpu() for name, t in tensors.items()}, unfinished, metadata=metadata)
    os.replace(unfinished, weights)
    (path / INDEX).unlink(missing_ok=True)
    for file in path.glob("model*.safetensors"):
        if file != weights:
            file.unlink()
    copy_tokenizer(model, path)
    return weights


def check_target(path: Path, source: Path | None) -> None:
    """Raises: ValueError if what is written to `path` would replace the checkpoint that it is made from."""
    if source is not None and path.resolve() == source.resolve():
        raise ValueError(f"{path} holds the model itself; write to another directory")
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; name a directory to write to")


def _quantized_layers(model: MMMamba) -> Iterator[tuple[str, nn.Module]]:
    """(our name of the weight, layer) of every layer that is packed; a table that two places share once."""
    for path, module in model.named_modules():
        if isinstance(module, PackedEmbedding):
            yield TABLE, module.table
        elif path != "embedding.text.table" and (isinstance(module, PackedLinear) or bnb.is_bnb(module)):
            if path == HEAD.removesuffix(".weight") and model.config.language.tie_word_embeddings:
                continue
            yield f"{path}.weight", module


def load_quantized(path: str | Path, **options: Any) -> MMMamba:
    """As `mmmamba.load_model`, for checkpoints of `save_quantized` alone.

    Raises: CheckpointError if the checkpoint is not quantized.
    """
    model = load_model(path, **options)
    if model.scheme is None:
        raise CheckpointError(f'{path} is not quantized; load it with load_model(path, quantize="int8")')
    return model
