"""Several models in one set of shards: what they share is stored once, every model has an index and a config.

The layout (read by `mmmamba.load_model`):

    DIR/FIRST-01.safetensors ...            packed tensors of the first model, at most `max_shard_bytes` each
    DIR/SECOND-01.safetensors ...           what the second adds to them, and so on
    DIR/NAME/config.json                    one directory a model
    DIR/NAME/model.safetensors.index.json   which stored tensors are its own, in whatever file

A model added later leaves the files of those before it as they are.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from mmmamba.checkpoint import INDEX, PACKED_METADATA, PACKED_PARTS, PART_SEPARATOR, named_tensors
from mmmamba.keymap import to_published
from mmmamba.model import MMMamba
from mmmamba.packing import PackedSpec, pack

MAX_SHARD_BYTES = 13 * 2**20
HALF_FROM_NUMEL = 100_000  # unpacked tensors from this size on are stored in float16, smaller ones in float32
SpecFn = Callable[[str, Tensor], PackedSpec | None]


def save_bundle(
    models: dict[str, MMMamba], path: str | Path, spec_of: SpecFn, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> list[Path]:
    """Write models that share tensors (equal values under the same name); returns the shards.

    Args:
        spec_of: (our name, tensor) -> how to store it, or None for floating point.
    Raises: ValueError if a tensor does not fit a shard even in single rows.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    stored: dict[str, Tensor] = {}  # published name -> values
    versions: dict[str, list[str]] = {}  # our name -> published names under which it is stored with different values
    files_of: dict[str, dict[str, str]] = {}  # published name -> stored part -> file
    shards: list[Path] = []
    for model_name, model in models.items():
        weight_map: dict[str, str] = {}
        shard = _Shard(path, model_name)
        for ours, tensor in named_tensors(model):
            name = next((n for n in versions.get(ours, []) if torch.equal(stored[n], tensor)), None)
            if name is None:
                name = to_published(ours, model.config)
                if name in stored:
                    raise ValueError(f"{name} has different values in {model_name} and a model before it")
                stored[name] = tensor
                versions.setdefault(ours, []).append(name)
                files_of[name] = {}
                for part, rows in _parts(name, tensor, spec_of(ours, tensor), max_shard_bytes):
                    tensors, spec = _stored_form(part, rows, spec_of(ours, rows))
                    if not shard.fits(tensors, max_shard_bytes):
                        shards.append(shard.write())
                        shard = _Shard(path, model_name, shard.number + 1)
                    files_of[name][part] = shard.add(tensors, spec)
            weight_map |= {part: f"../{file}" for part, file in files_of[name].items()}
        if shard.tensors:
            shards.append(shard.write())
        directory = path / model_name
        directory.mkdir(exist_ok=True)
        (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=1) + "\n")
        (directory / "config.json").write_text(json.dumps(model.config.to_dict(), indent=1) + "\n")
    return shards


class _Shard:
    """A file being filled."""

    def __init__(self, directory: Path, model_name: str, number: int = 1) -> None:
        self.number = number
        self.path = directory / f"{model_name}-{number:02d}.safetensors"
        self.tensors: dict[str, Tensor] = {}
        self.specs: dict[str, object] = {}
        self.nbytes = 0

    def fits(self, tensors: dict[str, Tensor], limit: int) -> bool:
        return not self.tensors or self.nbytes + sum(t.nbytes for t in tensors.values()) <= limit

    def add(self, tensors: dict[str, Tensor], specs: dict[str, object]) -> str:
        self.tensors |= tensors
        self.specs |= specs
        self.nbytes += sum(t.nbytes for t in tensors.values())
        return self.path.name

    def write(self) -> Path:
        save_file(self.tensors, self.path, metadata={"format": "pt", PACKED_METADATA: json.dumps(self.specs)})
        return self.path


def _stored_form(name: str, tensor: Tensor, spec: PackedSpec | None) -> tuple[dict[str, Tensor], dict[str, object]]:
    if spec is None:
        wide = tensor.numel() < HALF_FROM_NUMEL
        return {name: tensor.detach().to(torch.float32 if wide else torch.float16).contiguous()}, {}
    packed = dict(zip(PACKED_PARTS, pack(tensor, spec), strict=True))
    meta = {"bits": spec.bits, "group_size": spec.group_size, "shape": list(spec.shape)}
    return {f"{name}.{part}": t.contiguous() for part, t in packed.items()}, {name: meta}


def _parts(name: str, tensor: Tensor, spec: PackedSpec | None, limit: int) -> list[tuple[str, Tensor]]:
    """The tensor whole, or in runs of rows that fit a shard."""
    bits = 16.0 if spec is None else spec.bits + 32 / spec.group_size
    count = -(-int(tensor.numel() * bits / 8 * 1.01) // limit)
    if count == 1:
        return [(name, tensor)]
    if tensor.ndim == 0 or count > tensor.shape[0]:
        raise ValueError(f"{name} {tuple(tensor.shape)} does not fit shards of {limit} bytes")
    return [(f"{name}{PART_SEPARATOR}{i}", rows) for i, rows in enumerate(tensor.chunk(count))]
