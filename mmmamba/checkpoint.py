"""Reading and writing checkpoints: published layouts, safetensors only, strict, without remote code."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mmmamba.config import ModelConfig
from mmmamba.keymap import UNUSED, from_published, to_published, unused_tensors
from mmmamba.model import MMMamba
from mmmamba.packing import PackedWeight
from mmmamba.stored import INDEX, ForeignParts, listing
from mmmamba.stored import CheckpointError as CheckpointError
from mmmamba.stored import TensorFiles as TensorFiles

BUNDLED_DIR = Path(__file__).resolve().parent.parent / "checkpoints" / "nano"
BUNDLED = {"nano": "linear", "nano-linear": "linear", "nano-hybrid": "hybrid", "nano-teacher": "teacher"}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
)
MAX_SHARD_SIZE = "5GB"
DIGEST_NUMEL = 20_000
# Step sizes and decays act through an exponential: two digits of bf16 would not do.
_WIDE = re.compile(r"\.mixer\.(A_log|dt_bias)$")

Progress = Callable[[float, str], None]


class WeightQuantizer(Protocol):
    """What `load_model` asks of `quantize.api.Quantizer`."""

    @property
    def name(self) -> str: ...

    def wants(self, name: str, shape: tuple[int, ...]) -> bool: ...

    def place_(
        self,
        model: MMMamba,
        name: str,
        weight: Tensor | PackedWeight | ForeignParts,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None: ...


def load_model(
    path_or_hub_id: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    quantize: str | WeightQuantizer | None = None,
    progress: Progress | None = None,
    share: Sequence[MMMamba] = (),
) -> MMMamba:
    """Load HoVLE or mmMamba from a directory, a Hugging Face hub id or a bundled name ("nano", "nano-teacher").

    Args:
        device, dtype: where the weights go and how wide they are; decays and step biases stay in float32 at least.
        revision: branch, tag or commit of a hub id.
        quantize: a scheme of `quantize` ("int8", "int4", "bnb-int8", "bnb-nf4"), applied to each weight as it is read;
            or a `quantize.Quantizer`, for groups of another size. None: the checkpoint's own, if it has one.
        progress: called with (fraction done, what is being read).
        share: models loaded already; a tensor that equals theirs of the same name is held in memory once.
    Returns: the model in eval mode, frozen; `model.source` is the directory it came from.
    Raises: CheckpointError if nothing is found, tensors are missing, extra or mis-shaped (all listed by name), or only
        pickle files are there; ConfigError if the configuration cannot be run; ValueError if the scheme cannot be used.
    """
    directory = resolve_checkpoint(path_or_hub_id, revision=revision)
    model = build_meta(read_config(directory))
    with ExitStack() as stack:
        files = TensorFiles(directory, stack)
        _check_tensors(directory, files, model)
        quantizer = _quantizer(directory, files.scheme, quantize)
        _fill(model, files, torch.device(device), dtype, quantizer, progress, share)
    model.scheme = None if quantizer is None else quantizer.name
    model.source = directory
    return model.eval().requires_grad_(False)


def save_model(model: MMMamba, path: str | Path) -> None:
    """Write `config.json`, safetensors (in shards of 5 GB) and the tokenizer's files in the published layout.

    A checkpoint that is there already is replaced, its `model*.safetensors` and their index too.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    if model.scheme is not None:
        raise ValueError(f"the model's weights are {model.scheme}; write it with quantize.save_quantized")
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tensors = dict(named_tensors(model))
    published = {to_published(name, model.config): t.contiguous() for name, t in tensors.items()}
    for name, source in unused_tensors(model.config).items():
        published[name] = tensors[source].clone()
    write_config(model, path)
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
    copy_tokenizer(model, path)


def write_config(model: MMMamba, directory: Path) -> None:
    config = model.config.to_dict() | {"torch_dtype": str(model.dtype).removeprefix("torch.")}
    (directory / "config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n")


def copy_tokenizer(model: MMMamba, directory: Path) -> None:
    """Put the files of the tokenizer that the model came with beside its weights."""
    if model.source is not None and model.source.resolve() != directory.resolve():
        for file in tokenizer_files(model.source):
            shutil.copy2(file, directory / file.name)


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
            f"nor bundled ({', '.join(_bundled())})"
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


def _bundled() -> list[str]:
    """Names of what is in this installation."""
    return [name for name, folder in BUNDLED.items() if (BUNDLED_DIR / folder).is_dir()]


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


def dtype_of(name: str, dtype: torch.dtype) -> torch.dtype:
    """What a parameter of ours is held in where the model is loaded in `dtype`."""
    return torch.promote_types(dtype, torch.float32) if _WIDE.search(name) else dtype


def weights_digest(model: MMMamba) -> str:
    """Short hash that tells a model's weights from those of other trainings, the same in float32 and bfloat16.

    Of the small tensors alone (norms, decays, biases): every training moves them, and they are read in milliseconds.
    """
    digest = hashlib.sha256()
    for name, tensor in named_tensors(model):
        if tensor.numel() <= DIGEST_NUMEL:
            digest.update(name.encode())
            digest.update(tensor.detach().to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


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
        raise CheckpointError(listing(directory, problems))


def _quantizer(directory: Path, stored: str | None, asked: str | WeightQuantizer | None) -> WeightQuantizer | None:
    """Of the scheme that the weights are stored by, else of the one that is asked for."""
    if asked is None and stored is None:
        return None
    if stored is not None and not (asked is None or asked == stored):
        name = asked if isinstance(asked, str) else asked.name
        raise CheckpointError(
            f"{directory} holds {stored} weights already, {name} would round them again; load it without a scheme, or "
            "quantize the checkpoint that it was made from"
        )
    if asked is not None and not isinstance(asked, str):
        return asked
    from quantize import SCHEMES, Quantizer  # sits on this package; needed only where somebody asks for it

    if stored is not None and stored not in SCHEMES:
        raise CheckpointError(
            f'{directory} was quantized by the scheme "{stored}", which is not known here ({", ".join(SCHEMES)}); '
            "use the version that wrote it"
        )
    return Quantizer(stored or str(asked))


def _fill(
    model: MMMamba,
    files: TensorFiles,
    device: torch.device,
    dtype: torch.dtype,
    quantizer: WeightQuantizer | None,
    progress: Progress | None,
    others: Sequence[MMMamba],
) -> None:
    held = [dict(named) for other in others for named in (other.named_parameters(), other.named_buffers())]
    names = [name for name in files.names() if name != UNUSED]
    for i, name in enumerate(names):
        if progress is not None:
            progress(i / len(names), name)
        ours = from_published(name)
        assert ours is not None, "checked before"
        module, _, attribute = ours.rpartition(".")
        # A quantized checkpoint says which weights are packed; elsewhere that is the scheme's choice.
        if quantizer is not None and (
            files.is_packed(name) if files.scheme else quantizer.wants(ours, files.shape(name))
        ):
            quantizer.place_(model, ours, files.as_stored(name), device, dtype)
            _share_buffers(model.get_submodule(module), module, held)
            continue
        tensor = files.read(name, dtype_of(ours, dtype)).to(device)
        twin = _twin(ours, tensor, held)
        setattr(model.get_submodule(module), attribute, nn.Parameter(tensor) if twin is None else twin)
    model.tie_weights()
    if progress is not None:
        progress(1.0, "done")


def _share_buffers(layer: nn.Module, path: str, held: Sequence[dict[str, Tensor]]) -> None:
    for name, tensor in list(layer.named_buffers()):
        if tensor.numel() and (twin := _twin(f"{path}.{name}", tensor, held)) is not None:
            holder, _, attribute = name.rpartition(".")
            setattr(layer.get_submodule(holder), attribute, twin)


def _twin(name: str, tensor: Tensor, held: Sequence[dict[str, Tensor]]) -> Tensor | None:
    """The same object: what is frozen in a student takes memory once, however many models hold it."""
    return next((t for tensors in held if (t := tensors.get(name)) is not None and _same(t, tensor)), None)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
