"""Reading and writing checkpoints: published layouts, safetensors only, strict, without remote code."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mmmamba.config import ModelConfig
from mmmamba.keymap import UNUSED, from_published, to_published, unused_tensors
from mmmamba.model import MMMamba
from mmmamba.packing import PackedSpec, unpack

BUNDLED_DIR = Path(__file__).resolve().parent.parent / "checkpoints" / "nano"
BUNDLED = {"nano": "linear", "nano-linear": "linear", "nano-teacher": "teacher"}
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
)
PACKED_METADATA = "mmmamba_packed"
PACKED_PARTS = ("qweight", "scales", "zeros")
PART_SEPARATOR = "::"
MAX_SHARD_SIZE = "5GB"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# Step sizes and decays act through an exponential: two digits of bf16 would not do.
_WIDE = re.compile(r"\.mixer\.(A_log|dt_bias)$")

Progress = Callable[[float, str], None]


class CheckpointError(ValueError):
    """A checkpoint that cannot be found or read, with the way out."""


def load_model(
    path_or_hub_id: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    progress: Progress | None = None,
) -> MMMamba:
    """Load HoVLE or mmMamba from a directory, a Hugging Face hub id or a bundled name ("nano", "nano-teacher").

    Args:
        device, dtype: where the weights go and how wide they are; decays and step biases stay in float32 at least.
        revision: branch, tag or commit of a hub id.
        progress: called with (fraction done, what is being read).
    Returns: the model in eval mode, frozen; `model.source` is the directory it came from.
    Raises: CheckpointError if nothing is found, tensors are missing, extra or mis-shaped (all listed by name), or only
        pickle files are there; ConfigError if the configuration cannot be run.
    """
    directory = resolve_checkpoint(path_or_hub_id, revision=revision)
    model = build_meta(read_config(directory))
    with ExitStack() as stack:
        files = TensorFiles(directory, stack)
        _check_tensors(directory, files, model)
        _fill(model, files, torch.device(device), dtype, progress)
    model.source = directory
    return model.eval().requires_grad_(False)


def save_model(model: MMMamba, path: str | Path) -> None:
    """Write `config.json`, safetensors (in shards of 5 GB) and the tokenizer's files in the published layout.

    A checkpoint that is there already is replaced, its `model*.safetensors` and their index too.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tensors = dict(named_tensors(model))
    published = {to_published(name, model.config): t.contiguous() for name, t in tensors.items()}
    for name, source in unused_tensors(model.config).items():
        published[name] = tensors[source].clone()
    config = model.config.to_dict() | {"torch_dtype": str(model.dtype).removeprefix("torch.")}
    (path / "config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n")
    shards = split_torch_state_dict_into_shards(
        published, filename_pattern="model{suffix}.safetensors", max_shard_size=MAX_SHARD_SIZE
    )
    for filename, names in shards.filename_to_tensors.items():
        save_file({name: published[name] for name in names}, path / filename, metadata={"format": "pt"})
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (path / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    else:
        (path / INDEX).unlink(missing_ok=True)
    for file in path.glob("model*.safetensors"):
        if file.name not in shards.filename_to_tensors:
            file.unlink()
    if model.source is not None and model.source.resolve() != path.resolve():
        for file in tokenizer_files(model.source):
            shutil.copy2(file, path / file.name)


def resolve_checkpoint(path_or_hub_id: str | Path, *, revision: str | None = None, config_only: bool = False) -> Path:
    """The local directory of a checkpoint; downloads a hub id (or only its config) into the Hugging Face cache.

    Raises: CheckpointError if there is no such directory, bundled name or reachable hub repository.
    """
    name = str(path_or_hub_id)
    if name in BUNDLED:
        bundled = BUNDLED_DIR / BUNDLED[name]
        if not bundled.is_dir():
            raise CheckpointError(
                f'the bundled model "{name}" is not part of this installation ({bundled} is missing); run from a '
                "checkout of the project that has its weights, or pass the directory or hub id of a checkpoint"
            )
        return bundled
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file; pass the directory that holds config.json and the safetensors files")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise CheckpointError(
            f'"{name}" is neither a directory, nor a hub id such as "hustvl/mmMamba-linear", '
            f"nor bundled ({', '.join(BUNDLED)})"
        )
    from huggingface_hub import snapshot_download

    try:
        patterns = ["config.json"] if config_only else ["config.json", "*.safetensors", INDEX, *TOKENIZER_FILES]
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub client raises its own, requests' and the OS's errors; all mean "not to be had"
        at = f" at revision {revision}" if revision else ""
        raise CheckpointError(
            f'"{name}"{at} is not a local directory and could not be fetched from the hub ({type(error).__name__}); '
            "check the name and the connection, log in for private models, or pass a downloaded directory"
        ) from error


def read_config(directory: Path) -> ModelConfig:
    """Raises: CheckpointError if `config.json` is not there or is no JSON; ConfigError if it cannot be run."""
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{directory} holds no config.json; pass the directory of a HoVLE or mmMamba checkpoint")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); take a complete checkpoint") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} holds no JSON object but {type(raw).__name__}; take a complete checkpoint")
    return ModelConfig.from_dict(raw)


def tokenizer_files(directory: Path) -> list[Path]:
    """The tokenizer's files of a checkpoint: in its directory, or beside it where bundled models share one."""
    for place in (directory, directory.parent):
        if found := [place / name for name in TOKENIZER_FILES if (place / name).is_file()]:
            return found
    return []


def build_meta(config: ModelConfig) -> MMMamba:
    """The network without memory for its weights."""
    with torch.device("meta"):
        return MMMamba(config)


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every stored tensor once (a tied output head is the text embedding)."""
    yield from model.named_parameters(remove_duplicate=True)


class _Stored(NamedTuple):
    """A tensor, or some rows of one, in an opened file; `spec` if it is packed."""

    file: Any
    name: str
    spec: PackedSpec | None

    def shape(self) -> tuple[int, ...]:
        return self.spec.shape if self.spec else tuple(self.file.get_slice(self.name).get_shape())

    def read(self, dtype: torch.dtype) -> Tensor:
        if self.spec is None:
            return self.file.get_tensor(self.name).to(dtype)
        qweight, scales, zeros = (self.file.get_tensor(f"{self.name}.{part}") for part in PACKED_PARTS)
        return unpack(qweight, scales, zeros, self.spec, dtype)


class TensorFiles:
    """The safetensors files of a checkpoint, opened but not read."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.directory = directory
        self._parts: dict[str, list[_Stored]] = {}
        wanted = self._index()
        paths = self._plain_files() if wanted is None else sorted(set(wanted.values()))
        stored: dict[str, _Stored] = {}
        for path in paths:
            for name, entry in _open(path, stack).items():
                if wanted is None and name in stored:
                    raise CheckpointError(
                        f"{path} holds {name}, and so does a file before it; keep one, or add an index"
                    )
                if wanted is None or wanted.get(name) == path:
                    stored[name] = entry
        if wanted is not None and (absent := sorted(wanted.keys() - stored.keys())):
            raise CheckpointError(_listing(directory, {"named in the index but in no file": absent}))
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

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        tensors = [part.read(dtype) for part in self._parts[name]]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _open(path: Path, stack: ExitStack) -> dict[str, _Stored]:
    if not path.is_file():
        raise CheckpointError(f"the index names {path.name}, which is not there; fetch the whole checkpoint")
    try:
        f = stack.enter_context(safe_open(path, "pt"))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); it may be cut short, fetch it again") from error
    specs = {
        name: PackedSpec(spec["bits"], spec["group_size"], tuple(spec["shape"]))
        for name, spec in json.loads((f.metadata() or {}).get(PACKED_METADATA, "{}")).items()
    }
    plain = set(f.keys()) - {f"{name}.{part}" for name in specs for part in PACKED_PARTS}
    return {name: _Stored(f, name, specs.get(name)) for name in plain | specs.keys()}


def _part_order(stored_name: str) -> tuple[str, int]:
    """Tensor and number of the part: one too large for a file is stored as `name::0`, `name::1`, ..."""
    name, _, part = stored_name.partition(PART_SEPARATOR)
    return name, int(part or 0)


def _check_tensors(directory: Path, files: TensorFiles, model: MMMamba) -> None:
    expected = {name: tuple(t.shape) for name, t in named_tensors(model)}
    found: dict[str, str] = {}
    extra = []
    for name in files.names():
        ours = from_published(name)
        if name == UNUSED:
            continue
        if ours not in expected or ours in found:
            extra.append(name)
        else:
            found[ours] = name
    missing = [to_published(name, model.config) for name in expected if name not in found]
    misshaped = [
        f"{name} {list(files.shape(name))}, expected {list(expected[ours])}"
        for ours, name in found.items()
        if files.shape(name) != expected[ours]
    ]
    if missing or extra or misshaped:
        problems = {"missing": missing, "not part of this model": extra, "of another shape": misshaped}
        raise CheckpointError(_listing(directory, problems))


def _listing(directory: Path, problems: dict[str, list[str]]) -> str:
    parts = [f"{len(names)} tensors {what}: {', '.join(sorted(names))}" for what, names in problems.items() if names]
    return f"{directory} does not fit its config.json: {'; '.join(parts)}. Take config and weights from one checkpoint"


def _fill(
    model: MMMamba, files: TensorFiles, device: torch.device, dtype: torch.dtype, progress: Progress | None
) -> None:
    names = [name for name in files.names() if name != UNUSED]
    for i, name in enumerate(names):
        if progress is not None:
            progress(i / len(names), name)
        ours = from_published(name)
        assert ours is not None, "checked before"
        wide = torch.promote_types(dtype, torch.float32) if _WIDE.search(ours) else dtype
        module, _, attribute = ours.rpartition(".")
        setattr(model.get_submodule(module), attribute, nn.Parameter(files.read(name, wide).to(device)))
    model.tie_weights()
    if progress is not None:
        progress(1.0, "done")
