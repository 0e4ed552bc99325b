"""The architecture of nano: SmolLM2-135M's language model behind a holistic embedding of the same layer shape."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distill.base import language_tensors
from mmmamba.config import EmbeddingConfig, LanguageConfig, ModelConfig
from mmmamba.model import MMMamba

# 49,152 of SmolLM2, `<img>`, `</img>`, `<IMG_CONTEXT>`, and 5 rows of padding to a multiple of 8 (tensor cores).
VOCAB_SIZE = 49_160
IMG_CONTEXT_TOKEN_ID = 49_154
INIT_STD = 0.02


def nano_config() -> ModelConfig:
    """HoVLE-nano: 8 embedding layers, 30 language layers, 224 px tiles of 64 tokens, `post` pixel shuffle."""
    shape: dict[str, Any] = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100_000.0,
        "max_position_embeddings": 8192,
    }
    embedding = EmbeddingConfig(
        **shape,
        num_hidden_layers=8,
        num_channels=3,
        patch_size=14,
        image_size=224,
        llm_vocab_size=VOCAB_SIZE,
        llm_hidden_size=576,
        img_context_token_id=IMG_CONTEXT_TOKEN_ID,
        downsample_ratio=0.5,
        pixel_shuffle_loc="post",
    )
    language = LanguageConfig(
        **shape,
        num_hidden_layers=30,
        vocab_size=VOCAB_SIZE,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=True,
    )
    # One tile unless a caller asks for more: nano is trained on single tiles.
    return ModelConfig(
        embedding=embedding, language=language, model_type="internvl_chat", template="chatml", max_dynamic_patch=1
    )


@torch.no_grad()
def new_teacher(base: Any, config: ModelConfig | None = None, *, seed: int = 0) -> MMMamba:
    """HoVLE-nano (or a teacher of `config`): the base's language model behind a new embedding, the identity at first.

    The output projections of the embedding's attention and MLP start at zero, so that it begins as the identity: text
    passes unchanged, and the model chats as the base does before the first step.
    """
    torch.manual_seed(seed)
    model = MMMamba(config or nano_config())
    for module in model.embedding.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.normal_(module.weight, std=INIT_STD)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    layer: Any
    for layer in model.embedding.layers:
        nn.init.zeros_(layer.mixer.out_proj.weight)
        nn.init.zeros_(layer.mlp.w2.weight)
    nn.init.normal_(model.embedding.stem.position_embedding, std=INIT_STD)
    tensors = language_tensors(base, model.config.language.num_key_value_heads)
    text = tensors.pop("text")
    model.embedding.text.weight.copy_(_grown(text, model.config.embedding.llm_vocab_size))
    missing, extra = model.load_state_dict(tensors, strict=False)
    assert not extra, extra
    assert all(name.startswith(("embedding.", "language.output")) for name in missing), missing
    return model


def _grown(text: Tensor, rows: int) -> Tensor:
    """Token embeddings with new rows near the mean of the old ones: a plain start for image tokens."""
    mean = text.mean(dim=0, keepdim=True)
    return torch.cat([text, mean + torch.randn(rows - len(text), text.shape[1]) * INIT_STD])
