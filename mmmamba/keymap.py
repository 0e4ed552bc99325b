"""Names of tensors in the published checkpoints, and ours. Every quirk of the published layouts lives here."""

from __future__ import annotations

import re

from mmmamba.config import ModelConfig

# Stored by the authors, read by nobody: text comes in through `llm_text_embeddings`.
UNUSED = "language_model.model.tok_embeddings.weight"
_UNUSED_SOURCE = "embedding.text.weight"  # what `save_model` writes there, so that the authors' code loads the file

_STACKS = {"embedding_model.encoder.": "embedding.layers.", "language_model.model.layers.": "language.layers."}

# Inside a layer: published name -> ours. The projections are named after the layer type; both names are read anywhere,
# so that a teacher and its student can share one stored tensor.
_LAYER = {
    "attention_norm.weight": "mixer_norm.weight",
    "ffn_norm.weight": "mlp_norm.weight",
    "feed_forward.w1.weight": "mlp.w1.weight",
    "feed_forward.w2.weight": "mlp.w2.weight",
    "feed_forward.w3.weight": "mlp.w3.weight",
    "attention.wqkv.weight": "mixer.in_proj.weight",
    "attention.wo.weight": "mixer.out_proj.weight",
    "attention.wvkqgdt.weight": "mixer.in_proj.weight",
    "attention.o_proj.weight": "mixer.out_proj.weight",
    "attention.conv1d.weight": "mixer.conv.weight",
    "attention.conv1d.bias": "mixer.conv.bias",
    "attention.A_log_bias": "mixer.A_log",
    "attention.dt_bias": "mixer.dt_bias",
    "attention.g_norm_swish_gate.weight": "mixer.norm.weight",
}
_ATTENTION_ONLY = ("attention.wqkv.weight", "attention.wo.weight")
_MIXER_ONLY = ("attention.wvkqgdt.weight", "attention.o_proj.weight")

_OTHER = {
    "embedding_model.llm_text_embeddings.weight": "embedding.text.weight",
    "embedding_model.special_text_embeddings.weight": "embedding.special.weight",
    "embedding_model.vision_embeddings.class_embedding": "embedding.stem.class_embedding",
    "embedding_model.vision_embeddings.patch_embedding.weight": "embedding.stem.patch_embedding.weight",
    "embedding_model.vision_embeddings.patch_embedding.bias": "embedding.stem.patch_embedding.bias",
    "embedding_model.vision_embeddings.position_embedding": "embedding.stem.position_embedding",
    "embedding_model.pixel_shuffle_proj.0.weight": "embedding.shuffle_proj.0.weight",
    "embedding_model.pixel_shuffle_proj.0.bias": "embedding.shuffle_proj.0.bias",
    "embedding_model.pixel_shuffle_proj.2.weight": "embedding.shuffle_proj.2.weight",
    "embedding_model.pixel_shuffle_proj.2.bias": "embedding.shuffle_proj.2.bias",
    "language_model.model.norm.weight": "language.norm.weight",
    "language_model.output.weight": "language.output.weight",
}
_OTHER_BACK = {ours: published for published, ours in _OTHER.items()}


def from_published(name: str) -> str | None:
    """Our name for a published tensor, or None if no such tensor is known."""
    for published, ours in _STACKS.items():
        if match := re.fullmatch(re.escape(published) + r"(\d+)\.(.+)", name):
            layer, rest = match.groups()
            return f"{ours}{layer}.{_LAYER[rest]}" if rest in _LAYER else None
    return _OTHER.get(name)


def to_published(name: str, config: ModelConfig) -> str:
    """The published name of one of our tensors; projections are named after their layer's type."""
    for published, ours in _STACKS.items():
        if match := re.fullmatch(re.escape(ours) + r"(\d+)\.(.+)", name):
            layer, rest = match.groups()
            stack = config.embedding if ours.startswith("embedding") else config.language
            other = _MIXER_ONLY if stack.layer_types[int(layer)] == "mha" else _ATTENTION_ONLY
            inner = next(p for p, o in _LAYER.items() if o == rest and p not in other)
            return f"{published}{layer}.{inner}"
    return _OTHER_BACK[name]


def unused_tensors(config: ModelConfig) -> dict[str, str]:
    """Published tensors that are written but never read: name -> our tensor whose values are written."""
    return {} if config.language.tie_word_embeddings else {UNUSED: _UNUSED_SOURCE}
