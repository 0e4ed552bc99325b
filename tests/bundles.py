"""A small bundle as `checkpoints/nano` is one: teacher, linear and hybrid, what they share stored once, in 4 bits."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.convert import fuse_, make_student
from mmmamba.bundle import save_bundle
from mmmamba.packing import PackedSpec
from tests.helpers import golden_config, random_model

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def spec_of(name: str, tensor: Tensor) -> PackedSpec | None:
    """As nano is stored: 4 bits in the layers, 6 in the table, 8 behind the pixel shuffle, in groups of 64."""
    if tensor.ndim != 2 or "stem" in name or tensor.shape[1] % 64:
        return None
    bits = 6 if name == "embedding.text.weight" else 8 if "shuffle_proj" in name or "output" in name else 4
    return PackedSpec(bits, 64, tuple(tensor.shape))


def write_bundle(folder: Path, tokenizer: Path) -> Path:
    """`folder`/teacher, /linear and /hybrid; the tokenizer of another checkpoint serves all three."""
    raw = golden_config("post", "hovle") | {"template": "chatml", "max_dynamic_patch": 4}
    raw["embedding_config"] |= SIZES | {"num_hidden_layers": 2, "llm_hidden_size": 64}
    raw["llm_config"] |= SIZES | {"num_hidden_layers": 2, "tie_word_embeddings": True}
    teacher = random_model(raw, dtype=torch.float32)
    models = {
        "teacher": teacher,
        "linear": fuse_(make_student(teacher, ("mamba2",) * 2, ("mamba2",) * 2)),
        "hybrid": fuse_(make_student(teacher, ("mha", "mamba2"), ("mha", "mamba2"), seed=9)),
    }
    save_bundle(models, folder, spec_of)
    shutil.copy2(tokenizer / "tokenizer.json", folder / "tokenizer.json")
    return folder
