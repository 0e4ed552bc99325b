"""Softmax attention with grouped kv heads and rotary positions: the teacher's layers, and those a hybrid keeps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from mmmamba.config import StackConfig
from mmmamba.kernels import infers_on_cuda, segment_attention
from mmmamba.layers import RopeTables, rotate
from mmmamba.segments import Padding, Segments
from mmmamba.state import KVState


class Attention(nn.Module):
    """Causal grouped-query attention. `in_proj` rows are grouped per kv head: its query heads, then key, then value."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        self.in_proj = nn.Linear(config.hidden_size, config.hidden_size + 2 * config.kv_dim, bias=False)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        x: Tensor,
        state: KVState | None,
        seqlen_offset: int,
        rope: RopeTables | None,
        segments: Segments | None = None,
        padding: Padding | None = None,
    ) -> Tensor:
        """(batch, seqlen, hidden_size) to the same; appends keys and values to `state`, to all rows equally many."""
        assert padding is None, "a cache has no rows of different lengths"
        return self.out_proj(self.mix(x, state, seqlen_offset, rope, segments))

    def mix(
        self,
        x: Tensor,
        state: KVState | None,
        seqlen_offset: int,
        rope: RopeTables | None,
        segments: Segments | None = None,
    ) -> Tensor:
        """Per-head outputs before the output projection, heads side by side: (batch, seqlen, hidden_size)."""
        return self.attend(self.in_proj(x), state, seqlen_offset, rope, segments)

    def attend(
        self,
        qkv: Tensor,
        state: KVState | None,
        seqlen_offset: int,
        rope: RopeTables | None,
        segments: Segments | None = None,
    ) -> Tensor:
        """What `mix` does behind the input projection: rows of `in_proj` to per-head outputs, heads side by side."""
        assert rope is not None, "attention layers need rotary tables"
        batch, seqlen, _ = qkv.shape
        rep = self.num_heads // self.num_kv_heads
        qkv = qkv.view(batch, seqlen, self.num_kv_heads, rep + 2, self.head_dim)
        q, k, v = qkv.split([rep, 1, 1], dim=3)
        q = q.reshape(batch, seqlen, self.num_heads, self.head_dim).transpose(1, 2)
        k, v = (t.squeeze(3).transpose(1, 2) for t in (k, v))  # (batch, num_kv_heads, seqlen, head_dim)

        q = rotate(q, rope.q_cos, rope.q_sin)
        if rope.keys_unrotated:
            if state is not None:
                k, v = state.append_(k, v, seqlen_offset)
            k = rotate(k, rope.k_cos, rope.k_sin)
        else:
            k = rotate(k, rope.k_cos, rope.k_sin)
            if state is not None:
                k, v = state.append_(k, v, seqlen_offset)

        if segments is not None:
            y = segment_attention(q, k, v, segments)
            return y.transpose(1, 2).reshape(batch, seqlen, -1)
        if seqlen == 1:
            # The query heads of a kv head as rows of one query: each key and value is read once.
            q = q.reshape(batch, self.num_kv_heads, rep, self.head_dim)
            y = F.scaled_dot_product_attention(q, k, v).reshape(batch, 1, -1)
            return y
        if seqlen_offset == 0:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=rep > 1)
        elif infers_on_cuda(q):
            # A piece of a long prompt. With a mask the GPU would write all scores; this bias only says where they end.
            k, v = (t.repeat_interleave(rep, dim=1) for t in (k, v))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(seqlen, k.shape[2]))
        else:
            total = seqlen_offset + seqlen
            mask = torch.ones(seqlen, total, dtype=torch.bool, device=qkv.device).tril(seqlen_offset)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=rep > 1)
        return y.transpose(1, 2).reshape(batch, seqlen, -1)
