"""Decoding as it is published, on the weights of a model of ours: the baselines of `benchmarks.decode` on CUDA.

    PublishedStudent    mmMamba's way: library matrix products and mamba-ssm's step (the recurrence in torch where the
                        package does not import), the whole token in one CUDA graph
    HuggingFaceTeacher  HoVLE's way: eager, keys and values grown by concatenation, kv heads repeated for query heads

Both draw greedily and leave out what would only slow them down (checks, copies of logits).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmmamba.kernels import ssm_step_ref
from mmmamba.layers import rotate
from mmmamba.mixer import GATE_NORM_EPS
from mmmamba.model import MMMamba
from mmmamba.state import DecodeState, KVState, MambaState


def load_upstream_step() -> tuple[Callable[..., Tensor] | None, str]:
    """mamba-ssm's step, or None with the reason why it cannot be had."""
    try:
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update
    except Exception as error:  # as in `kernels.upstream`: whatever a broken build raises means "not here"
        return None, f"mamba-ssm does not import: {type(error).__name__}: {error}"
    return selective_state_update, ""


class PublishedStudent:
    """A linear model's decoding in a CUDA graph; `state` (batch rows) is advanced in place, its counts are not."""

    def __init__(self, model: MMMamba, state: DecodeState) -> None:
        self.model, self.state = model, state
        self.upstream, reason = load_upstream_step()
        self.name = "the published way (CUDA graph)" + (", recurrence in torch" if self.upstream is None else "")
        self.reason = reason
        self.token = torch.zeros(state.batch, dtype=torch.int64, device=model.device)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), torch.inference_mode():
            for _ in range(3):
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.graph(self._graph):
            self._step()

    def step(self) -> None:
        self._graph.replay()

    def _step(self) -> None:
        model = self.model
        x = F.embedding(self.token, model.embedding.text.weight)
        for stack, stack_state in zip((model.embedding, model.language), self.state.stacks, strict=True):
            for layer, state in zip(stack.layers, stack_state.layers, strict=True):
                block: Any = layer
                assert isinstance(state, MambaState), "the published student is linear"
                x = x + block.mixer.out_proj(self._mix(block.mixer, block.mixer_norm(x), state))
                x = x + block.mlp(block.mlp_norm(x))
        logits = model.language.output(model.language.norm(x))
        self.token.copy_(logits.argmax(dim=-1))

    def _mix(self, mixer: Any, x: Tensor, state: MambaState) -> Tensor:
        batch, heads, dim = len(x), mixer.num_heads, mixer.head_dim
        rep = heads // mixer.num_kv_heads
        vkq, gate, dt = mixer.in_proj(x).split(mixer.splits, dim=-1)
        taps = mixer.conv.weight[:, 0]
        mixed = F.silu(state.conv_state[..., 0] * taps[:, 0] + vkq * taps[:, 1] + mixer.conv.bias)
        state.conv_state[..., 0].copy_(vkq)
        v, k, q = mixed.split(mixer.conv_splits, dim=-1)
        v, k, q = v.view(batch, -1, dim), k.view(batch, -1, dim), q.view(batch, heads, dim)
        A = -torch.exp(mixer.A_log.float())
        if self.upstream is None:
            y = ssm_step_ref(v, F.softplus(dt.float() + mixer.dt_bias), A, k, q, state.ssm_state)
        else:
            v, k = (t.repeat_interleave(rep, dim=1) for t in (v, k))
            y = self.upstream(
                state.ssm_state,
                v,
                dt[:, :, None].expand(batch, heads, dim),
                A[:, None, None].expand(heads, dim, dim),
                k,
                q,
                torch.zeros(heads, dim, device=x.device),
                dt_bias=mixer.dt_bias[:, None].expand(heads, dim),
                dt_softplus=True,
            )
        normed = F.rms_norm(y.float(), (dim,), mixer.norm.weight.float(), GATE_NORM_EPS)
        return (normed * F.silu(gate.view(batch, heads, dim).float())).to(x.dtype).reshape(batch, -1)


class HuggingFaceTeacher:
    """A teacher's decoding at a constant context: each step's keys and values are put behind those of `state`, and
    dropped again."""

    name = "the Hugging Face way (torch.cat, repeated kv)"

    def __init__(self, model: MMMamba, state: DecodeState) -> None:
        self.model, self.state = model, state
        self.token = torch.zeros(state.batch, dtype=torch.int64, device=model.device)

    @torch.inference_mode()
    def step(self) -> None:
        model = self.model
        x = F.embedding(self.token, model.embedding.text.weight)[:, None]
        for stack, stack_state in zip((model.embedding, model.language), self.state.stacks, strict=True):
            rope = stack.rope_tables(x, stack_state.seqlen)
            assert rope is not None, "a teacher has attention"
            for layer, state in zip(stack.layers, stack_state.layers, strict=True):
                block: Any = layer
                assert isinstance(state, KVState), "a teacher keeps keys and values"
                x = x + block.mixer.out_proj(_attend(block.mixer, block.mixer_norm(x), state, stack_state.seqlen, rope))
                x = x + block.mlp(block.mlp_norm(x))
        logits = model.language.output(model.language.norm(x)).float()
        self.token.copy_(logits[:, -1].argmax(dim=-1))


def _attend(mixer: Any, x: Tensor, state: KVState, seqlen: int, rope: Any) -> Tensor:
    batch = len(x)
    rep = mixer.num_heads // mixer.num_kv_heads
    qkv = mixer.in_proj(x).view(batch, 1, mixer.num_kv_heads, rep + 2, mixer.head_dim)
    q = qkv[:, :, :, :rep].reshape(batch, 1, mixer.num_heads, mixer.head_dim).transpose(1, 2)
    k, v = (qkv[:, :, :, i].transpose(1, 2) for i in (rep, rep + 1))
    q, k = rotate(q, rope.q_cos, rope.q_sin), rotate(k, rope.q_cos, rope.q_sin)
    k, v = torch.cat([state.k_cache[:, :, :seqlen], k], dim=2), torch.cat([state.v_cache[:, :, :seqlen], v], dim=2)
    k, v = (t.repeat_interleave(rep, dim=1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, 1, -1)
