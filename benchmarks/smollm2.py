"""SmolLM2-135M in transformers, beside which this project's models are timed: nano grew from it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmmamba import cost

BASELINE = "HuggingFaceTB/SmolLM2-135M"
# https://huggingface.co/HuggingFaceTB/SmolLM2-135M, config.json
BASELINE_CONFIG: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "tie_word_embeddings": True,
}


class TransformersSide:
    """A causal language model of transformers, with its growing cache."""

    grows = True

    def __init__(self, model: Any, name: str, weights: str, piece_size: int) -> None:
        from transformers import DynamicCache

        self.model, self.name, self.weights, self.piece_size = model, name, weights, piece_size
        self.weight_bytes = transformers_weight_bytes(model)
        self.cache: Any = DynamicCache(config=model.config)

    def _forward(self, ids: Tensor) -> Tensor:
        with torch.inference_mode():
            out = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        logits: Tensor = out.logits[:, -1]
        return logits

    def read(self, ids: Tensor) -> None:
        for piece in ids.split(self.piece_size, dim=1):
            self._forward(piece)

    def step(self, token: Tensor) -> Tensor:
        return self._forward(token[:, None]).argmax(dim=-1)

    def cache_bytes(self) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers if layer.is_initialized)

    def traffic_bytes(self) -> int:
        return self.cache_bytes()


def transformers_weight_bytes(model: nn.Module) -> cost.WeightCount:
    """All weights; and of those what a token reads: everything but the embedding table, unless it is the head too."""
    total = sum(p.nbytes for p in model.parameters())  # parameters() yields a shared tensor once
    table: Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
    head: Tensor = model.get_output_embeddings().weight  # type: ignore[operator]
    return cost.WeightCount(total, total + table[0].nbytes - (0 if head is table else table.nbytes))


def load_baseline(device: torch.device, dtype: torch.dtype, *, piece_size: int) -> TransformersSide:
    """SmolLM2-135M from the local Hugging Face cache, else with random weights: its speed does not depend on them."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    model: Any
    try:
        model = AutoModelForCausalLM.from_pretrained(BASELINE, dtype=dtype, local_files_only=True)
        weights = "checkpoint"
    except OSError:
        model = LlamaForCausalLM(LlamaConfig(**BASELINE_CONFIG))
        weights = "random"
    name = f"transformers {BASELINE.rpartition('/')[2]}"
    return TransformersSide(model.to(device, dtype).eval().requires_grad_(False), name, weights, piece_size)
