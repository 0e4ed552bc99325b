"""Several models in one set of shards: what they share is stored once, every model has an index and a config.

The layout (read by `mmmamba.load_model`):

    DIR/weights-01-of-09.safetensors ...    packed tensors, at most `max_shard_bytes` each
    DIR/NAME/config.json                    one directory a model
    DIR/NAME/model.safetensors.index.json   which stored tensors are its own
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

MAX_SHARD_BYTES = 14 * 2**20
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
    stored: dict[str, Tensor] = {}  # stored (published) name -> values
    names_of: dict[str, list[str]] = {}  # model -> stored names
    by_ours: dict[str, list[str]] = {}  # our name -> stored names of its versions
    ours_of: dict[str, str] = {}
    for model_name, model in models.items():
        names_of[model_name] = []
        for ours, tensor in named_tensors(model):
            same = next((n for n in by_ours.get(ours, []) if torch.equal(stored[n], tensor)), None)
            if same is None:
                same = to_published(ours, model.config)
                if same in stored:
                    raise ValueError(f"{same} has different values in {model_name} and a model before it")
                stored[same] = tensor
                ours_of[same] = ours
                by_ours.setdefault(ours, []).append(same)
            names_of[model_name].append(same)

    shards: list[dict[str, Tensor]] = [{}]
    specs: list[dict[str, object]] = [{}]
    sizes = [0]
    shard_of: dict[str, int] = {}  # stored part name -> shard
    parts_of: dict[str, list[str]] = {}
    for name, tensor in stored.items():
        parts_of[name] = []
        for part_name, rows in _parts(name, tensor, spec_of(ours_of[name], tensor), max_shard_bytes):
            tensors, spec = _stored_form(part_name, rows, spec_of(ours_of[name], rows))
            size = sum(t.nbytes for t in tensors.values())
            if sizes[-1] + size > max_shard_bytes:
                shards.append({})
                specs.append({})
                sizes.append(0)
            shards[-1] |= tensors
            specs[-1] |= spec
            sizes[-1] += size
            shard_of[part_name] = len(shards) - 1
            parts_of[name].append(part_name)

    path.mkdir(parents=True, exist_ok=True)
    files = [f"weights-{i + 1:02d}-of-{len(shards):02d}.safetensors" for i in range(len(shards))]
    for file, tensors, spec in zip(files, shards, specs, strict=True):
        save_file(tensors, path / file, metadata={"format": "pt", PACKED_METADATA: json.dumps(spec)})
    for model_name, names in names_of.items():
        directory = path / model_name
        directory.mkdir(exist_ok=True)
        weight_map = {part: f"../{files[shard_of[part]]}" for name in names for part in parts_of[name]}
        (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=1) + "\n")
        config = json.dumps(models[model_name].config.to_dict(), indent=1)
        (directory / "config.json").write_text(config + "\n")
    return [path / file for file in files]


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
