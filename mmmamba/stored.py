"""Tensors as they lie in the safetensors files of a checkpoint: plain, packed, or in another library's form."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmmamba.packing import PackedSpec, PackedWeight

INDEX = "model.safetensors.index.json"
PACKED_METADATA = "mmmamba_packed"
PACKED_PARTS = ("qweight", "scales", "zeros")
QUANTIZED_METADATA = "mmmamba_quantized"  # scheme, group size and source of a checkpoint of `quantize`
PART_SEPARATOR = "::"
UNPACKED_BITS = (6,)  # stored so, and never held so
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class CheckpointError(ValueError):
    """A checkpoint that cannot be found or read, with the way out."""


class ForeignParts(NamedTuple):
    """A weight in another library's form: what it is (rows, columns), and its tensors by their names there."""

    shape: tuple[int, ...]
    tensors: dict[str, Tensor]


class _ForeignSpec(NamedTuple):
    shape: tuple[int, ...]
    parts: tuple[str, ...]


class _Stored(NamedTuple):
    """A tensor, or some rows of one, in an opened file; `spec` if it is packed."""

    path: Path
    file: Any
    name: str
    spec: PackedSpec | _ForeignSpec | None

    def shape(self) -> tuple[int, ...]:
        return self.spec.shape if self.spec else tuple(self.file.get_slice(self.name).get_shape())

    def parts(self) -> tuple[str, ...]:
        """Names of the stored tensors that it is made of."""
        inner = self.spec.parts if isinstance(self.spec, _ForeignSpec) else PACKED_PARTS if self.spec else ()
        return tuple(f"{self.name}.{part}" for part in inner) or (self.name,)

    def as_stored(self) -> Tensor | PackedWeight | ForeignParts:
        tensors = self._tensors()
        if isinstance(self.spec, _ForeignSpec):
            return ForeignParts(self.spec.shape, dict(zip(self.spec.parts, tensors, strict=True)))
        return tensors[0] if self.spec is None else PackedWeight(tensors[0], tensors[1], tensors[2], self.spec)

    def _tensors(self) -> list[Tensor]:
        """As they lie in the file, mapped."""
        if isinstance(self.spec, PackedSpec) and self.spec.bits in UNPACKED_BITS:
            return [self._alone(part) for part in self.parts()]
        return [self.file.get_tensor(part) for part in self.parts()]

    def _alone(self, part: str) -> Tensor:
        """Through a mapping of its own, which ends with the tensor: that of the file is kept by weights that stay in
        it, and would keep in memory what was only read to be unpacked."""
        with safe_open(self.path, "pt") as file:
            tensor: Tensor = file.get_tensor(part)
        return tensor

    def read(self, dtype: torch.dtype) -> Tensor:
        stored = self.as_stored()
        assert not isinstance(stored, ForeignParts), "checkpoints with foreign parts name a scheme, which reads them"
        return stored.unpack(dtype) if isinstance(stored, PackedWeight) else stored.to(dtype)


class TensorFiles:
    """The safetensors files of a checkpoint, opened but not read."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.directory = directory
        self.scheme: str | None = None
        self._parts: dict[str, list[_Stored]] = {}
        wanted = self._index()
        paths = self._plain_files() if wanted is None else sorted(set(wanted.values()))
        stored: dict[str, _Stored] = {}
        for path in paths:
            entries, scheme = _open(path, stack)
            self.scheme = scheme or self.scheme
            for name, entry in entries.items():
                if wanted is None and name in stored:
                    raise CheckpointError(
                        f"{path} holds {name}, and so does a file before it; keep one, or add an index"
                    )
                if wanted is None or wanted.get(name) == path:
                    stored[name] = entry
        if wanted is not None and (absent := sorted(wanted.keys() - stored.keys())):
            raise CheckpointError(listing(directory, {"named in the index but in no file": absent}))
        for name in sorted(stored, key=_part_order):
            self._parts.setdefault(_part_order(name)[0], []).append(stored[name])

    def _index(self) -> dict[str, Path] | None:
        """Stored name -> file, or None without an index."""
        index = self.directory / INDEX
        if not index.is_file():
            return None
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = {str(name): str(file) for name, file in weight_map.items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(
                f"{index} holds no weight_map of tensors to files ({error!r}); fetch it again"
            ) from error
        base = self.directory.resolve()
        # Not resolved further: in the hub's cache the files are links to blobs elsewhere.
        paths = {name: Path(os.path.normpath(base / file)) for name, file in files.items()}
        for name, path in paths.items():
            if path.parent not in (base, base.parent) or path.suffix != ".safetensors":
                raise CheckpointError(f'{index} sends {name} to "{path}"; only safetensors files beside it are read')
        return paths

    def _plain_files(self) -> list[Path]:
        found = sorted(self.directory.glob("*.safetensors"))
        if found:
            return found
        pickles = sorted(p.name for pattern in _PICKLES for p in self.directory.glob(pattern))
        if pickles:
            raise CheckpointError(
                f"{self.directory} holds only pickle files ({', '.join(pickles[:3])}); loading them can run any code, "
                "so they are refused: convert them to safetensors"
            )
        raise CheckpointError(f"{self.directory} holds no safetensors files; pass a complete checkpoint")

    def names(self) -> list[str]:
        return sorted(self._parts)

    def shape(self, name: str) -> tuple[int, ...]:
        shapes = [part.shape() for part in self._parts[name]]
        return shapes[0] if len(shapes) == 1 else (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def nbytes(self, name: str) -> int:
        """Bytes that it takes in its files."""
        stored = self._parts[name]
        return sum(part.file.get_tensor(inner).nbytes for part in stored for inner in part.parts())  # mapped, not read

    def is_packed(self, name: str) -> bool:
        """Whether it is stored in integers, by us or by another library."""
        return self._parts[name][0].spec is not None

    def packed_spec(self, name: str) -> PackedSpec | None:
        """How it is stored in our integers; None for plain tensors and those of another library."""
        spec = self._parts[name][0].spec
        return PackedSpec(spec.bits, spec.group_size, self.shape(name)) if isinstance(spec, PackedSpec) else None

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        tensors = [part.read(dtype) for part in self._parts[name]]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    def as_stored(self, name: str) -> Tensor | PackedWeight | ForeignParts:
        """The tensor in the form that it has in its file; runs of rows put together."""
        parts = [part.as_stored() for part in self._parts[name]]
        packed = [part for part in parts if isinstance(part, PackedWeight)]
        if len(parts) == 1:
            return parts[0]
        if len(packed) < len(parts) or len({(part.spec.bits, part.spec.group_size) for part in packed}) > 1:
            return self.read(name, torch.float32)
        spec = PackedSpec(packed[0].spec.bits, packed[0].spec.group_size, self.shape(name))
        qweight, scales, zeros = (torch.cat(tensors) for tensors in list(zip(*packed, strict=True))[:3])
        return PackedWeight(qweight, scales, zeros, spec)


def packed_metadata(spec: PackedSpec) -> dict[str, object]:
    """What a file's metadata says of a packed tensor."""
    return {"bits": spec.bits, "group_size": spec.group_size, "shape": list(spec.shape)}


def _open(path: Path, stack: ExitStack) -> tuple[dict[str, _Stored], str | None]:
    """What a file holds, and the scheme that it was quantized by."""
    if not path.is_file():
        raise CheckpointError(f"the index names {path.name}, which is not there; fetch the whole checkpoint")
    try:
        f = stack.enter_context(safe_open(path, "pt"))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); it may be cut short, fetch it again") from error
    try:
        specs, scheme = _read_metadata(f.metadata() or {})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{path} has metadata that cannot be read ({error!r}); fetch it again, or use the version that wrote it"
        ) from error
    entries = {name: _Stored(path, f, name, spec) for name, spec in specs.items()}
    taken = {part for entry in entries.values() for part in entry.parts()}
    entries |= {name: _Stored(path, f, name, None) for name in set(f.keys()) - taken}
    if absent := taken - set(f.keys()):
        raise CheckpointError(f"{path} lacks {', '.join(sorted(absent))}, which its metadata names; fetch it again")
    return entries, scheme


def _read_metadata(metadata: dict[str, str]) -> tuple[dict[str, PackedSpec | _ForeignSpec], str | None]:
    quantized = json.loads(metadata.get(QUANTIZED_METADATA, "{}"))
    specs: dict[str, PackedSpec | _ForeignSpec] = {
        name: PackedSpec(spec["bits"], spec["group_size"], tuple(spec["shape"]))
        for name, spec in json.loads(metadata.get(PACKED_METADATA, "{}")).items()
    }
    for name, spec in quantized.get("foreign", {}).items():
        specs[name] = _ForeignSpec(tuple(spec["shape"]), tuple(spec["parts"]))
    return specs, quantized.get("scheme")


def _part_order(stored_name: str) -> tuple[str, int]:
    """Tensor and number of the part: one too large for a file is stored as `name::0`, `name::1`, ..."""
    name, _, part = stored_name.partition(PART_SEPARATOR)
    return name, int(part or 0)


def listing(directory: Path, problems: dict[str, list[str]]) -> str:
    parts = [f"{len(names)} tensors {what}: {', '.join(sorted(names))}" for what, names in problems.items() if names]
    return f"{directory} does not fit its config.json: {'; '.join(parts)}. Take config and weights from one checkpoint"
