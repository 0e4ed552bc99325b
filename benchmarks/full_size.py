"""Models of the published size with random weights, whole or packed: speed does not depend on the values.

The shapes are those of HoVLE-2.6B and mmMamba-2.6B (arXiv:2412.16158, arXiv:2502.13145).
"""

from __future__ import annotations

import gc
import re
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmmamba.checkpoint import build_meta
from mmmamba.config import LayerType, ModelConfig
from mmmamba.kernels.weights import round_to_nearest
from mmmamba.model import MMMamba
from mmmamba.packing import PackedSpec, PackedWeight
from quantize.linear import PackedLinear, packed_linear

Kind = Literal["linear", "hybrid", "teacher"]
Scheme = Literal["bf16", "int8", "int4"]
KINDS: tuple[Kind, ...] = ("linear", "hybrid", "teacher")
SCHEMES: tuple[Scheme, ...] = ("bf16", "int8", "int4")
SIZES: dict[str, dict[str, int]] = {
    "2.6b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "vocab_size": 92553,
        "embedding_layers": 8,
        "language_layers": 24,
        "image_size": 448,
    },
    "nano": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49160,
        "embedding_layers": 8,
        "language_layers": 30,
        "image_size": 224,
    },
}
GROUP_SIZE = 64  # of int4
HYBRID_EVERY = 4  # one softmax layer in so many
_PACKED = re.compile(r"\.(in_proj|out_proj|w1|w2|w3)$|^language\.output$")


def config_of(kind: Kind, size: str = "2.6b", *, layers: tuple[int, int] | None = None) -> ModelConfig:
    """The configuration of a model of a size, or of its first layers: (embedding, language)."""
    shape = dict(SIZES[size])
    counts = (shape.pop("embedding_layers"), shape.pop("language_layers"))
    vocab, image_size = shape.pop("vocab_size"), shape.pop("image_size")
    counts = layers or counts
    common: dict[str, Any] = shape | {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "max_position_embeddings": 32768}
    raw: dict[str, Any] = {
        "model_type": "internvl_chat",
        "template": "internlm2-chat",
        "embedding_config": common
        | {
            "num_hidden_layers": counts[0],
            "num_channels": 3,
            "patch_size": 14,
            "image_size": image_size,
            "llm_vocab_size": vocab,
            "llm_hidden_size": shape["hidden_size"],
            "img_context_token_id": vocab - 7,
            "downsample_ratio": 0.5,
            "pixel_shuffle_loc": "post",
        },
        "llm_config": common | {"num_hidden_layers": counts[1], "vocab_size": vocab},
    }
    config = ModelConfig.from_dict(raw)
    return config.with_layer_types(*(layer_types(kind, count) for count in counts))


def layer_types(kind: Kind, count: int) -> tuple[LayerType, ...]:
    softmax: tuple[LayerType, ...] = ("mha",)
    linear: tuple[LayerType, ...] = ("mamba2",)
    if kind != "hybrid":
        return (softmax if kind == "teacher" else linear) * count
    return ((linear * (HYBRID_EVERY - 1) + softmax) * count)[:count]


@torch.no_grad()
def random_model(config: ModelConfig, device: torch.device, scheme: Scheme = "bf16", *, seed: int = 0) -> MMMamba:
    """A frozen model in bfloat16 whose activations stay of the size that a trained one's have; packed by rounding to
    the nearest where the scheme says so. Equal arguments give equal weights."""
    model = build_meta(config).to(torch.bfloat16).to_empty(device=device)
    draw = torch.Generator(device).manual_seed(seed)
    for name, p in model.named_parameters():
        if name.endswith(("A_log", "dt_bias")):
            p.data = torch.rand(p.shape, device=device, generator=draw) - (2.0 if name.endswith("dt_bias") else 0.0)
        elif p.ndim == 1:
            p.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            p.normal_(0.0, 1.0 if name.startswith("embedding.text") else p[0].numel() ** -0.5, generator=draw)
    model.eval().requires_grad_(False)
    if scheme != "bf16":
        for name, module in list(model.named_modules()):
            if _PACKED.search(name) and isinstance(module, nn.Linear):
                parent, _, attribute = name.rpartition(".")
                # As `quantize` does it, the output head keeps 8 bits.
                bits: Literal["int8", "int4"] = "int8" if name == "language.output" else scheme
                setattr(model.get_submodule(parent), attribute, _rounded(module.weight, bits))
    return model


def _rounded(dense: Tensor, kind: Literal["int8", "int4"]) -> PackedLinear:
    """A layer packed without a search for better scales: that takes time, and speed does not depend on them."""
    weight = round_to_nearest(dense, kind, group_size=GROUP_SIZE)
    assert weight.scales is not None and weight.zeros is not None  # noqa: PT018 (for the type checker)
    spec = PackedSpec(8 if kind == "int8" else 4, weight.group_size, weight.shape)
    return packed_linear(PackedWeight(weight.data.flatten(), weight.scales.flatten(), weight.zeros.flatten(), spec))


def free_memory() -> None:
    """Give back what models and states that are no longer held took on a GPU."""
    gc.collect()
    torch.cuda.empty_cache()
