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

from mmmamba.checkpoint import named_tensors
from mmmamba.keymap import to_published
from mmmamba.model import MMMamba
from mmmamba.packing import PackedSpec, pack
from mmmamba.stored import INDEX, PACKED_METADATA, PACKED_PARTS, PART_SEPARATOR, packed_metadata

MAX_SHARD_BYTES = 25 * 2**19
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
    # Our name -> its different values, each with the files of its stored parts. A published name may stand in several
    # files with different values (two students' mixers): the index of a model says which file is meant.
    stored: dict[str, list[tuple[Tensor, dict[str, str]]]] = {}
    shards: list[Path] = []
    for model_name, model in models.items():
        weight_map: dict[str, str] = {}
        shard = _Shard(path, model_name)
        for ours, tensor in named_tensors(model):
            files = next((f for values, f in stored.get(ours, []) if torch.equal(values, tensor)), None)
            if files is None:
                files = {}
                stored.setdefault(ours, []).append((tensor, files))
                name = to_published(ours, model.config)
                for part, rows in _parts(name, tensor, spec_of(ours, tensor), max_shard_bytes):
                    tensors, spec = _stored_form(part, rows, spec_of(ours, rows))
                    if not shard.fits(tensors, max_shard_bytes):
                        shards.append(shard.write())
                        shard = _Shard(path, model_name, shard.number + 1)
                    files[part] = shard.add(tensors, spec)
            weight_map |= {part: f"../{file}" for part, file in files.items()}
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
        # One entry of metadata: of two the order in the file would be random, and a bundle written again another file.
        save_file(self.tensors, self.path, metadata={PACKED_METADATA: json.dumps(self.specs)})
        return self.path


def _stored_form(name: str, tensor: Tensor, spec: PackedSpec | None) -> tuple[dict[str, Tensor], dict[str, object]]:
    if spec is None:
        wide = tensor.numel() < HALF_FROM_NUMEL
        return {name: tensor.detach().to(torch.float32 if wide else torch.float16).contiguous()}, {}
    packed = dict(zip(PACKED_PARTS, pack(tensor, spec), strict=True))
    return {f"{name}.{part}": t.contiguous() for part, t in packed.items()}, {name: packed_metadata(spec)}


def _parts(name: str, tensor: Tensor, spec: PackedSpec | None, limit: int) -> list[tuple[str, Tensor]]:
    """The tensor whole, or in runs of rows that fit a shard."""
    bits = (
        32.0 if spec is None else spec.bits + 32 / spec.group_size
    )  # 16 for large ones: splitting them early is harmless
    if tensor.numel() * bits / 8 <= limit:
        return [(name, tensor)]
    rows = int(limit / (tensor[0].numel() * bits / 8)) if tensor.ndim else 0
    if not rows:
        raise ValueError(f"{name} {tuple(tensor.shape)} does not fit shards of {limit} bytes")
    return [(f"{name}{PART_SEPARATOR}{i}", part) for i, part in enumerate(tensor.chunk(-(-tensor.shape[0] // rows)))]
