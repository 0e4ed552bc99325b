"""What a model costs: parameters, bytes of weights read for a token, bytes of state and of key-value cache.

Arithmetic on `ModelConfig`, so the bill of a model that does not fit this machine can be written too; `weight_bytes`
counts the tensors of a loaded one instead.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from mmmamba.config import EmbeddingConfig, LayerType, ModelConfig, StackConfig
from mmmamba.state import D_CONV

SSM_STATE_BYTES = 4  # float32 whatever the weights are
IMAGE_ONLY = ("embedding.stem.", "embedding.shuffle_proj.")  # read in prefill alone
TABLES = ("embedding.text.", "embedding.special.")  # a token reads one row


@dataclass(frozen=True)
class WeightCount:
    """`total`: everything stored. `per_token`: the part that decoding one text token reads.

    Not read: the image stem and the pixel shuffle's projection (images are read in prefill) and the embedding table but
    for one row. A tensor that two places share is counted once.
    """

    total: int
    per_token: int


def teacher_config(config: ModelConfig) -> ModelConfig:
    """The same network with softmax attention in every layer."""
    mha: tuple[LayerType, ...] = ("mha",)
    return config.with_layer_types(mha * config.embedding.num_hidden_layers, mha * config.language.num_hidden_layers)


def count_parameters(config: ModelConfig) -> WeightCount:
    """Parameters by the shapes of the published layout."""
    embedding, language = config.stacks
    layers = sum(_layer_parameters(stack) for stack in config.stacks)
    table = language.vocab_size * language.hidden_size
    head = table + language.hidden_size  # output, norm
    # llm_text_embeddings, output, and the language model's own table, which is stored and unused.
    tables = table if language.tie_word_embeddings else 3 * table
    total = layers + tables + language.hidden_size + _stem_parameters(embedding)
    return WeightCount(total, layers + head + language.hidden_size)


def weight_bytes(model: nn.Module) -> WeightCount:
    """Bytes of the tensors that a loaded model (`MMMamba`) holds, so packed weights count as packed."""
    counted: set[int] = set()
    total = per_token = 0
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    # Tables last: one that is the output head too is read in full, as the head.
    for name, tensor in sorted(named, key=lambda item: item[0].startswith(TABLES)):
        new = id(tensor) not in counted
        counted.add(id(tensor))
        total += tensor.nbytes if new else 0
        if name.startswith(TABLES):
            per_token += tensor[0].nbytes if tensor.ndim > 1 else 0  # packed tables are flat, a row of them is nothing
        elif new and not name.startswith(IMAGE_ONLY):
            per_token += tensor.nbytes
    return WeightCount(total, per_token)


def state_bytes(config: ModelConfig, *, batch: int = 1, element_bytes: int = 4) -> int:
    """Bytes of recurrent state of the `mamba2` layers, the same at any context length.

    Args: element_bytes: of the model's dtype, in which the convolution's inputs are kept.
    """
    total = 0
    for stack in config.stacks:
        ssm = stack.num_attention_heads * stack.head_dim**2 * SSM_STATE_BYTES
        conv = stack.conv_dim * (D_CONV - 1) * element_bytes
        total += stack.layer_types.count("mamba2") * (ssm + conv)
    return batch * total


def kv_cache_bytes(
    config: ModelConfig, *, num_text_tokens: int, num_image_tokens: int = 0, batch: int = 1, element_bytes: int = 4
) -> int:
    """Bytes of keys and values of the `mha` layers at a context length.

    Args:
        num_text_tokens, num_image_tokens: positions of the language model. With `post` pixel shuffle the embedding
            stack sees four positions for every image token.
    """
    total = 0
    for stack in config.stacks:
        expand = stack.stack_tokens_per_image_token if isinstance(stack, EmbeddingConfig) else 1
        positions = num_text_tokens + expand * num_image_tokens
        total += stack.layer_types.count("mha") * 2 * stack.kv_dim * positions * element_bytes
    return batch * total


def _layer_parameters(stack: StackConfig) -> int:
    """Parameters of all layers of a stack."""
    hidden = stack.hidden_size
    shared = 3 * hidden * stack.intermediate_size + 2 * hidden + hidden**2  # MLP, two norms, output projection
    mixers = {
        "mha": (hidden + 2 * stack.kv_dim) * hidden,
        "mamba2": stack.mixer_dim * hidden
        + stack.conv_dim * (D_CONV + 1)
        + 2 * stack.num_attention_heads
        + stack.head_dim,
    }
    return sum(shared + mixers[layer_type] for layer_type in stack.layer_types)


def _stem_parameters(embedding: EmbeddingConfig) -> int:
    """Image stem (patches, positions, class) and the projection of the pixel shuffle."""
    hidden = embedding.hidden_size
    patch = embedding.num_channels * embedding.patch_size**2 * hidden + hidden
    positions = (embedding.patches_per_tile + 1) * hidden
    projection = 4 * hidden * hidden + hidden + hidden * hidden + hidden
    specials = embedding.num_special_tokens * hidden
    return patch + positions + hidden + projection + specials
