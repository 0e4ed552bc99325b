"""What training is timed on: networks of a recipe's shape with random weights, and random batches as it packs them."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import torch

from distill.config import Recipe, StageConfig
from distill.convert import make_student
from distill.data.batches import Batch
from distill.data.packing import PackedBatch, PackerState, Piece, RowShape, pack
from distill.inputs import Inputs, prepare
from distill.layer_step import Layers
from distill.nano import nano_config
from distill.stages import Stage, TeacherStage, student_stage
from mmmamba.config import EmbeddingConfig, LanguageConfig, ModelConfig
from mmmamba.model import MMMamba

_TEXT_SAMPLES = 4  # of a packed row, beside its pictures
_SHORTEST = 8  # tokens of text of a sample
_VOCAB = 49_000  # ids below are text in every vocabulary


def hovle_config(pixel_shuffle_loc: Literal["pre", "post"] = "post") -> ModelConfig:
    """HoVLE-2.6B (arXiv:2412.16158): 8 and 24 layers, 2,048 wide, tiles of 448 px; softmax attention everywhere.

    With "post" the embedding stack sees 1,024 tokens a tile, with "pre" 256.
    """
    stack = {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "max_position_embeddings": 32_768,
    }
    embedding = EmbeddingConfig(
        num_hidden_layers=8,
        num_channels=3,
        patch_size=14,
        image_size=448,
        llm_vocab_size=92_553,
        llm_hidden_size=2048,
        img_context_token_id=92_546,
        downsample_ratio=0.5,
        pixel_shuffle_loc=pixel_shuffle_loc,
        **stack,  # type: ignore[arg-type]
    )
    language = LanguageConfig(num_hidden_layers=24, vocab_size=92_553, **stack)  # type: ignore[arg-type]
    return ModelConfig(embedding=embedding, language=language, model_type="internvl_chat", template="internlm2-chat")


def teacher_config(recipe: Recipe, pixel_shuffle_loc: Literal["pre", "post"] = "post") -> ModelConfig:
    """The teacher that a recipe is made for.  Raises: ValueError if it is neither nano nor HoVLE-2.6B."""
    for config in (nano_config(), hovle_config(pixel_shuffle_loc)):
        try:
            recipe.shape.check(config)
        except ValueError:
            continue
        return config
    raise ValueError(f"recipe {recipe.name} is for a teacher of {recipe.shape}; known are nano and HoVLE-2.6B")


def random_teacher(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> MMMamba:
    """Made on the device in the dtype in which a run holds it: nothing larger is ever allocated."""
    with torch.device("meta"):
        model = MMMamba(config).to(dtype)
    model = model.to_empty(device=device).requires_grad_(False)
    model.tie_weights()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.02)
        else:
            torch.nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
    return model


def random_stage(
    name: str,
    recipe: Recipe,
    config: StageConfig,
    teacher: ModelConfig,
    device: torch.device,
    *,
    compiled: bool,
    captured: bool = False,
    layers: Layers = "auto",
) -> Stage:
    """A stage as `distill.pipeline` sets it up, on random weights; `captured`, `layers` as `student_stage` has them."""
    if name == "teacher":
        return TeacherStage(random_teacher(teacher, device, torch.float32), compiled=compiled)
    model = random_teacher(teacher, device, getattr(torch, recipe.frozen_dtype))
    student = make_student(model, *recipe.layer_types(teacher), seed=recipe.seed)
    return student_stage(name, model, student, config, compiled=compiled, captured=captured, layers=layers)


def random_batches(
    recipe: Recipe, config: StageConfig, stage: Stage, *, fixed_shapes: bool = False
) -> list[tuple[float, Inputs]]:
    """The batches of one step, on the CPU, of the shapes that the recipe gives them; `fixed_shapes` as in `prepare`."""
    model = stage.model.config
    if recipe.packed:
        packed = packed_rows(recipe, config.image_batch, model)
        options = {"all_tokens": stage.all_tokens, "fixed_shapes": fixed_shapes}
        return [(1.0, prepare(packed, model, config.image_answer_tokens, **options))]
    shape = recipe.image_seqlen, config.image_batch, config.image_answer_tokens
    batches = [(1.0, _rows(stage, *shape, pictures=recipe.pictures))]
    if config.text_batch:
        shape = recipe.text_seqlen, config.text_batch, config.text_answer_tokens
        batches.append((config.text_weight, _rows(stage, *shape, pictures=0)))
    return batches


def packed_rows(recipe: Recipe, rows: int, model: ModelConfig) -> PackedBatch:
    """Full rows: pictures of 1 to as many tiles as the recipe allows, with text, and a few samples of text alone; the
    second half of a sample's text is its answer. Three quarters of a row are pictures where the recipe sets no number.

    Raises: ValueError if tiles leave no room for text.
    """
    rng = np.random.default_rng(recipe.seed)
    tiles = recipe.packed_tiles
    shape = RowShape.of(model, seqlen=recipe.image_seqlen, rows=rows, tiles=tiles, pad_id=2)
    if tiles is None:
        tiles = recipe.image_seqlen * 3 // 4 // model.tokens_per_tile
    return pack([_samples(rng, recipe, tiles, model) for _ in range(rows)], shape, PackerState())


def _samples(rng: np.random.Generator, recipe: Recipe, tiles: int, model: ModelConfig) -> list[Piece]:
    most = recipe.max_tiles + (recipe.max_tiles > 1)
    of_samples: list[int] = []
    while (left := tiles - sum(of_samples)) > 0:
        of_samples.append(min(left, int(rng.integers(1, most + 1))))
    room = recipe.image_seqlen - tiles * model.tokens_per_tile
    of_samples += [0] * _TEXT_SAMPLES
    if room < len(of_samples) * _SHORTEST:
        raise ValueError(
            f"rows of {recipe.image_seqlen} tokens with {tiles} tiles leave {room} tokens for the text of "
            f"{len(of_samples)} samples; make packed_tiles less or image_seqlen more"
        )
    lengths = _SHORTEST + rng.multinomial(room - _SHORTEST * len(of_samples), [1 / len(of_samples)] * len(of_samples))
    side = model.image_size
    pieces = []
    for num_tiles, length in zip(of_samples, lengths, strict=True):
        text = rng.integers(3, _VOCAB, length)
        image = np.full(num_tiles * model.tokens_per_tile, model.embedding.img_context_token_id)
        mask = np.arange(len(image) + length) >= len(image) + length // 2
        pixels = rng.integers(0, 256, (num_tiles, side, side, 3), dtype=np.uint8) if num_tiles else None
        pieces.append(Piece(np.concatenate([image, text]).astype(np.int64), mask, pixels))
    return pieces


def _rows(stage: Stage, seqlen: int, batch: int, answer_tokens: int | None, *, pictures: int) -> Inputs:
    """A sample a row, as nano's recipes have it."""
    config = stage.model.config
    ids = torch.randint(3, _VOCAB, (batch, seqlen))
    start = 5
    for _ in range(pictures):
        ids[:, start : start + config.tokens_per_tile] = config.embedding.img_context_token_id
        start += config.tokens_per_tile + 5
    mask = torch.zeros(batch, seqlen, dtype=torch.bool)
    mask[:, start : start + (answer_tokens or 16)] = True
    side = config.image_size
    pixels = torch.randint(0, 255, (batch * pictures, side, side, 3), dtype=torch.uint8) if pictures else None
    return prepare(Batch(ids, mask, pixels, 0), config, answer_tokens, all_tokens=stage.all_tokens)


def with_rows(config: StageConfig, image_batch: int | None, recompute: bool | None) -> StageConfig:
    """The settings of a stage with other rows a step, or with blocks computed again in the backward pass or not."""
    changes: dict[str, int | bool] = {}
    if image_batch is not None:
        changes["image_batch"] = image_batch
    if recompute is not None:
        changes["activation_checkpointing"] = recompute
    return replace(config, **changes)  # type: ignore[arg-type]
