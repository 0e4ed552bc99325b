"""What a model is and costs, as a record and as text for people."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from mmmamba import cost
from mmmamba.config import ModelConfig
from mmmamba.keymap import from_published
from mmmamba.stored import CheckpointError, TensorFiles

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def info_record(config: ModelConfig, *, dtype: str, num_text_tokens: int, num_image_tokens: int) -> dict[str, Any]:
    """What a model costs when its weights, convolution states and caches are in `dtype`, for one conversation."""
    size = DTYPES[dtype].itemsize
    parameters = cost.count_parameters(config)

    def kv(c: ModelConfig) -> int:
        return cost.kv_cache_bytes(
            c, num_text_tokens=num_text_tokens, num_image_tokens=num_image_tokens, element_bytes=size
        )

    return {
        "kind": config.kind,
        "model_type": config.model_type,
        "embedding_layers": list(config.embedding.layer_types),
        "language_layers": list(config.language.layer_types),
        "hidden_size": config.language.hidden_size,
        "vocab_size": config.language.vocab_size,
        "tile_px": config.image_size,
        "tokens_per_tile": config.tokens_per_tile,
        "parameters": parameters.total,
        "dtype": dtype,
        "quantize": None,
        "weight_bytes": parameters.total * size,
        "weight_bytes_per_token": parameters.per_token * size,
        "state_bytes": cost.state_bytes(config, element_bytes=size),
        "context_tokens": num_text_tokens + num_image_tokens,
        "image_tokens": num_image_tokens,
        "kv_bytes": kv(config),
        "teacher_kv_bytes": kv(cost.teacher_config(config)),
        "fingerprint": config.fingerprint(),
    }


def quantized_record(directory: Path, *, tied: bool) -> dict[str, Any]:
    """What takes the place of `info_record`'s facts for a checkpoint of `quantize`: its scheme, and the bytes that its
    weights take as they are stored; nothing for other checkpoints, and where only a config is there.

    Args: tied: whether the embedding table is the output head too, which a token reads in full.
    """
    with ExitStack() as stack:
        try:
            files = TensorFiles(directory, stack)
        except CheckpointError:
            return {}
        if files.scheme is None:
            return {}
        sizes = {from_published(name) or name: files.nbytes(name) for name in files.names()}
        elsewhere = cost.IMAGE_ONLY if tied else (*cost.IMAGE_ONLY, *cost.TABLES)
        return {
            "quantize": files.scheme,
            "weight_bytes": sum(sizes.values()),
            "weight_bytes_per_token": sum(size for name, size in sizes.items() if not name.startswith(elsewhere)),
        }


def info_text(r: dict[str, Any]) -> str:
    """A table of `info_record`'s facts; `r` also holds `model` and `directory`."""
    length = f"{r['context_tokens']:,} tokens"
    if r["image_tokens"]:
        length += f", {r['image_tokens']:,} of them image tokens"
    rows = [
        ("model", f"{r['model']} ({r['kind']}; {r['directory']})"),
        ("holistic embedding", _layers(r["embedding_layers"])),
        ("language model", _layers(r["language_layers"])),
        ("hidden size", f"{r['hidden_size']:,}; vocabulary {r['vocab_size']:,}"),
        ("image tile", f"{r['tile_px']} px, {r['tokens_per_tile']} tokens"),
        ("parameters", f"{r['parameters']:,}"),
        ("weights", f"{readable_bytes(r['weight_bytes'])} in {r['quantize'] or r['dtype']}"),
        ("a token reads", f"{readable_bytes(r['weight_bytes_per_token'])} of them"),
        ("recurrent state", f"{readable_bytes(r['state_bytes'])} at any length"),
        ("key-value cache", f"{readable_bytes(r['kv_bytes'])} at {length}"),
        ("the teacher's", f"{readable_bytes(r['teacher_kv_bytes'])} at {length}"),
    ]
    return "\n".join(f"{name:<20}{value}" for name, value in rows)


def _layers(types: Sequence[str]) -> str:
    """`8 layers: mamba2`, or runs of equal types: `8 layers: 1 mha, 3 mamba2, 1 mha, 3 mamba2`."""
    runs = [(name, len(list(run))) for name, run in groupby(types)]
    named = runs[0][0] if len(runs) == 1 else ", ".join(f"{count} {name}" for name, count in runs)
    return f"{len(types)} layers: {named}"


def readable_bytes(num_bytes: int) -> str:
    """`1.5 MiB`: four digits in the largest unit that leaves at least 1."""
    size, unit = float(num_bytes), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.4g} {unit}"
