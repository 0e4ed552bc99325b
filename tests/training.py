"""Teachers, students, stages and batches for the tests of the distillation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from distill.convert import make_student
from distill.data.batches import Batch
from distill.data.packing import PackedBatch, Piece
from distill.distributed import FlatGradients
from distill.inputs import prepare
from distill.nano import nano_config
from distill.runner import step_runner
from distill.stages import LayerStage, LogitsStage, Stage
from mmmamba.checkpoint import load_model, save_model
from mmmamba.config import ModelConfig
from mmmamba.model import MMMamba
from tests.helpers import GOLDEN, IMAGE_ID, TILE_TOKENS, golden_config


def teacher_of(folder: str, dtype: torch.dtype = torch.float32, *, device: str = "cpu") -> MMMamba:
    """A model of its own, to be trained."""
    return load_model(GOLDEN / folder / "hovle", dtype=dtype, device=device)


def student_of(teacher: MMMamba, folder: str, kind: str = "linear") -> MMMamba:
    embedding, language = ModelConfig.from_dict(golden_config(folder, kind)).stacks
    return make_student(teacher, embedding.layer_types, language.layer_types)


def student_stage(number: int, teacher: MMMamba, student: MMMamba) -> Stage:
    """Stage 1, 2 or 3."""
    if number == 3:
        return LogitsStage(teacher, student, compiled=False)
    return LayerStage(teacher, student, train_vkq=number == 2, compiled=False)


def batch(kind: str, seed: int = 0, rows: int = 3) -> Batch:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 140, (rows, 16), generator=g)
    mask = torch.zeros(rows, 16, dtype=torch.bool)
    mask[:, 10:14] = True
    pixels = None
    if kind == "image":
        ids[:, 2:6] = IMAGE_ID
        pixels = torch.randint(0, 256, (rows, 56, 56, 3), generator=g, dtype=torch.uint8)
    return Batch(ids, mask, pixels, 0)


def piece(seed: int, layout: Sequence[int], *, learned: int = 3, side: int = 56) -> Piece:
    """A sample without padding: `layout` is runs of text (positive) and of the tokens of whole tiles (negative)."""
    rng = np.random.default_rng(seed)
    runs = [rng.integers(0, 140, run) if run > 0 else np.full(-run, IMAGE_ID) for run in layout]
    ids = np.concatenate(runs).astype(np.int64)
    mask = np.zeros(len(ids), bool)
    mask[-learned:] = True
    num_tiles = sum(-run for run in layout if run < 0) // TILE_TOKENS
    pixels = rng.integers(0, 256, (num_tiles, side, side, 3), dtype=np.uint8) if num_tiles else None
    return Piece(ids, mask, pixels)


def batches(kind: str) -> Iterator[Batch]:
    seed = 0
    while True:
        yield batch(kind, seed := seed + 1)


def copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def run_step(stage: Stage, batches: Sequence[tuple[float, Batch | PackedBatch]]) -> dict[str, Tensor]:
    """One step as the trainer runs it, without the optimizer."""
    options = {"all_tokens": stage.all_tokens, "mark_real": stage.mark_real}
    prepared = [(weight, prepare(batch, stage.model.config, **options)) for weight, batch in batches]
    return step_runner(stage, FlatGradients(stage.parameters().values()), graph=False)(prepared)


TINY = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}


def tiny_config() -> ModelConfig:
    config = nano_config()
    return replace(
        config,
        embedding=replace(
            config.embedding, **TINY, llm_hidden_size=32, image_size=56, num_hidden_layers=2, layer_types=()
        ),
        language=replace(config.language, **TINY, num_hidden_layers=2, layer_types=()),
    )


def save_tiny_teacher(path: Path, config: ModelConfig | None = None) -> Path:
    """A teacher nobody trained, with the bundled tokenizer's ids."""
    torch.manual_seed(0)
    model = MMMamba(config or tiny_config())
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.05)
    save_model(model, path)
    return path


def save_tiny_base(path: Path, *, vocab_size: int = 49_152) -> Path:
    """A language model nobody trained, of the shape of the tiny teacher's."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **TINY, num_hidden_layers=2, vocab_size=vocab_size, tie_word_embeddings=True, rms_norm_eps=1e-5, rope_theta=1e5
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path
