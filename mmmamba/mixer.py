"""The Mamba-2 mixer as mmMamba uses it: x, B, C are the values, keys and queries of the attention that it replaces."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmmamba.config import StackConfig
from mmmamba.kernels import FusedOps, Impl, fused_ops, ssd_scan, ssm_step
from mmmamba.layers import RopeTables
from mmmamba.segments import Padding, Segments
from mmmamba.state import D_CONV, MambaState

GATE_NORM_EPS = 1e-5


class GatedRMSNorm(nn.Module):
    """RMSNorm(y) * weight * SiLU(gate) over each head, in float32 at least."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_dim))

    def forward(self, y: Tensor, gate: Tensor) -> Tensor:
        wide = torch.promote_types(y.dtype, torch.float32)
        normed = F.rms_norm(y.to(wide), y.shape[-1:], self.weight.to(wide), eps=GATE_NORM_EPS)
        return (normed * F.silu(gate.to(wide))).to(y.dtype)


class CausalConv(nn.Module):
    """Depthwise causal convolution of width D_CONV over the sequence; stored as a Conv1d's weight and bias."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim, 1, D_CONV))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(
        self,
        x: Tensor,
        state: MambaState | None,
        segments: Segments | None = None,
        padding: Padding | None = None,
    ) -> Tensor:
        """(batch, seqlen, dim) to the same, continued from `state.conv_state`, which moves on, or begun anew in every
        segment."""
        seqlen = x.shape[1]
        if state is None:
            padded = F.pad(x, (0, 0, D_CONV - 1, 0))
        else:
            padded = torch.cat([state.conv_state.mT, x], dim=1)
            state.conv_state.copy_(_last_inputs(padded, padding).mT)
        taps = self.weight[:, 0]  # (dim, D_CONV)
        # Shifted products instead of conv1d: no transposes, and a depthwise conv1d is slow on CPUs.
        out: Tensor = self.bias
        for i in range(D_CONV):
            tokens, back = padded[:, i : i + seqlen], D_CONV - 1 - i
            if segments is not None and back:
                tokens = torch.where((segments.positions >= back)[..., None], tokens, 0.0)
            out = out + tokens * taps[:, i]
        return out


def _last_inputs(padded: Tensor, padding: Padding | None) -> Tensor:
    """What the next token's convolution looks back at, (batch, D_CONV - 1, dim): the ends of rows that have D_CONV - 1
    inputs from before in front, padded (batch, D_CONV - 1 + seqlen, dim)."""
    if padding is None:
        return padded[:, 1 - D_CONV :]
    at = padding.lengths[:, None] + torch.arange(D_CONV - 1, device=padded.device)
    return padded.take_along_dim(at[..., None], dim=1)


class Mamba2Mixer(nn.Module):
    """mmMamba's mixer (arXiv:2502.13145, section 3): no rotary, no D.

    `in_proj` rows are V, K, Q, G and one step size per head. V, K (`num_kv_heads`) and Q (`num_heads`) pass a depthwise
    causal convolution and SiLU before the kv heads are shared; dt = softplus(dt + dt_bias), A = -exp(A_log).
    """

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        self.splits = (config.conv_dim, config.hidden_size, config.num_attention_heads)
        self.conv_splits = (config.kv_dim, config.kv_dim, config.hidden_size)
        self.in_proj: nn.Module = nn.Linear(config.hidden_size, config.mixer_dim, bias=False)
        self.conv = CausalConv(config.conv_dim)
        self.A_log = nn.Parameter(torch.ones(config.num_attention_heads))
        self.dt_bias = nn.Parameter(torch.zeros(config.num_attention_heads))
        self.norm = GatedRMSNorm(config.head_dim)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        # A chunk about as long as the state is wide balances the work inside chunks against that between them.
        self.chunk_size = max(64, config.head_dim)
        self.impl: Impl = "auto"

    def forward(
        self,
        x: Tensor,
        state: MambaState | None,
        seqlen_offset: int,
        rope: RopeTables | None,
        segments: Segments | None = None,
        padding: Padding | None = None,
    ) -> Tensor:
        """(batch, seqlen, hidden_size) to the same; advances `state` in place. Positions are not used."""
        return self.out_proj(self.mix(x, state, seqlen_offset, rope, segments, padding))

    def mix(
        self,
        x: Tensor,
        state: MambaState | None,
        seqlen_offset: int,
        rope: RopeTables | None,
        segments: Segments | None = None,
        padding: Padding | None = None,
    ) -> Tensor:
        """Per-head outputs before the output projection, heads side by side: (batch, seqlen, hidden_size)."""
        ops = fused_ops(x)
        if ops is not None and segments is None:
            return self._mix_fused(ops, x, state, padding)
        batch, seqlen, _ = x.shape
        vkq, gate, dt = self.in_proj(x).split(self.splits, dim=-1)
        vkq = F.silu(self.conv(vkq, state, segments, padding))
        v, k, q = vkq.split(self.conv_splits, dim=-1)
        v, k = (t.reshape(batch, seqlen, self.num_kv_heads, self.head_dim) for t in (v, k))
        q, gate = (t.reshape(batch, seqlen, self.num_heads, self.head_dim) for t in (q, gate))
        wide = torch.promote_types(x.dtype, torch.float32)
        dt = F.softplus(dt.to(wide) + self.dt_bias.to(wide))
        if padding is not None:
            dt = dt * padding.real[..., None]  # a step of no length leaves the state as it is
        A = -torch.exp(self.A_log.to(wide))

        if state is not None and seqlen == 1:
            y = ssm_step(v[:, 0], dt[:, 0], A, k[:, 0], q[:, 0], state.ssm_state)[:, None]
        else:
            initial = None if state is None else state.ssm_state
            ids = None if segments is None else segments.ids
            y, final = ssd_scan(
                v,
                dt,
                A,
                k,
                q,
                initial,
                segment_ids=ids,
                chunk_size=self.chunk_size,
                need_state=state is not None,
                impl=self.impl,
            )
            if state is not None:
                state.ssm_state.copy_(final)
        return self.norm(y, gate).reshape(batch, seqlen, -1)

    def _mix_fused(self, ops: FusedOps, x: Tensor, state: MambaState | None, padding: Padding | None = None) -> Tensor:
        """As `mix`, with everything between products and scan in one launch each."""
        batch, seqlen, _ = x.shape
        u = self.in_proj(x)
        conv_dim, hidden, _ = self.splits
        conv_state = x.new_zeros(batch, conv_dim, D_CONV - 1) if state is None else state.conv_state
        taps = self.conv.weight[:, 0].contiguous()
        lengths = None if padding is None else padding.lengths
        vkq, dt = ops.mix_inputs(u, conv_state, taps, self.conv.bias, self.dt_bias, hidden, lengths)
        v, k, q = (t.unflatten(-1, (-1, self.head_dim)) for t in vkq.split(self.conv_splits, dim=-1))
        A = -torch.exp(self.A_log.float())
        if state is not None and seqlen == 1:
            y = ssm_step(v[:, 0], dt[:, 0], A, k[:, 0], q[:, 0], state.ssm_state)[:, None]
        else:
            initial = None if state is None else state.ssm_state
            given = {"chunk_size": self.chunk_size, "need_state": state is not None, "impl": self.impl}
            y, final = ssd_scan(v, dt, A, k, q, initial, **given)  # type: ignore[arg-type]
            if state is not None:
                state.ssm_state.copy_(final)
        gate = u[..., conv_dim : conv_dim + hidden]
        return ops.gated_norm(y.contiguous(), gate, self.norm.weight, GATE_NORM_EPS)
