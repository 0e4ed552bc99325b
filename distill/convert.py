"""Seeding a student from its teacher, and the split form of a mixer's projection that the stages train.

The mixer's V, K and Q rows are the teacher's value, key and query rows; everything else starts so that the mixer is a
plain linear attention: identity convolution, the same decay everywhere, a random gate (arXiv:2502.13145, section 3.2).
"""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmmamba.attention import Attention
from mmmamba.config import LayerType, StackConfig
from mmmamba.mixer import Mamba2Mixer
from mmmamba.model import MMMamba

GATE_GAIN = 2**-2.5
DT_RANGE = (0.001, 0.1)
# Nano's 1,545 rows are filled up to a multiple: rows that begin at odd addresses cannot be read in whole vectors.
ROWS = 8


class SplitProjection(nn.Module):
    """`in_proj` of a mixer as two parameters, so that V, K, Q can be frozen while gate and step size train."""

    def __init__(self, vkq: Tensor, gate_dt: Tensor) -> None:
        super().__init__()
        self.vkq = nn.Parameter(vkq.clone())
        self.gate_dt = nn.Parameter(gate_dt.clone())

    def forward(self, x: Tensor) -> Tensor:
        if self.vkq.requires_grad:
            rows = len(self.vkq) + len(self.gate_dt)
            if not (x.is_cuda and torch.is_grad_enabled() and rows % ROWS):
                return F.linear(x, self.weight)
            filled = torch.cat([self.vkq, self.gate_dt, self.vkq.new_zeros(-rows % ROWS, self.vkq.shape[1])])
            return F.linear(x, filled)[..., :rows]
        # Apart, or the gradient of the frozen rows would be computed with the others' and thrown away.
        return torch.cat([F.linear(x, self.vkq), F.linear(x, self.gate_dt)], dim=-1)

    @property
    def weight(self) -> Tensor:
        """Fused: rows V, K, Q, G, dt."""
        return torch.cat([self.vkq, self.gate_dt])


def vkq_rows(attention: Attention) -> Tensor:
    """The teacher's `in_proj` (grouped per kv head: query heads, key, value) as rows V, K, Q."""
    weight = attention.in_proj.weight
    rep = attention.num_heads // attention.num_kv_heads
    grouped = weight.view(attention.num_kv_heads, rep + 2, attention.head_dim, weight.shape[1])
    q, k, v = grouped.split([rep, 1, 1], dim=1)
    return torch.cat([t.reshape(-1, weight.shape[1]) for t in (v, k, q)])


@torch.no_grad()
def seed_mixer(attention: Attention, config: StackConfig, generator: torch.Generator) -> Mamba2Mixer:
    """A mixer that starts from `attention`; the output projection is shared with it, the rest is new memory, float32 at
    least: steps of an optimizer are lost in narrower weights.

    `generator` draws the gate (Xavier-uniform, gain 2^-2.5) and `dt_bias` (inverse softplus of a log-uniform step).
    """
    weight = attention.in_proj.weight
    wide = torch.promote_types(weight.dtype, torch.float32)
    with torch.device(weight.device):
        mixer = Mamba2Mixer(config)
    gate = torch.empty(config.hidden_size, config.hidden_size)
    nn.init.xavier_uniform_(gate, gain=GATE_GAIN, generator=generator)
    low, high = (math.log(d) for d in DT_RANGE)
    step = torch.exp(torch.rand(config.num_attention_heads, generator=generator) * (high - low) + low)
    mixer.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))  # softplus of it gives the step back
    gate_dt = torch.cat([gate, torch.zeros(config.num_attention_heads, config.hidden_size)])
    mixer.in_proj = SplitProjection(vkq_rows(attention).to(wide), gate_dt.to(weight.device, wide))
    mixer.A_log.fill_(1.0)
    mixer.conv.weight.zero_()
    mixer.conv.weight[:, :, -1] = 1.0
    mixer.conv.bias.zero_()
    mixer.out_proj = attention.out_proj
    return mixer


def make_student(
    teacher: MMMamba, embedding_types: tuple[LayerType, ...], language_types: tuple[LayerType, ...], *, seed: int = 0
) -> MMMamba:
    """A student seeded from `teacher`; what no stage trains is shared with it in memory."""
    student = copy.copy(teacher)
    student._modules = dict(teacher._modules)
    student.config = teacher.config.with_layer_types(embedding_types, language_types)
    generator = torch.Generator().manual_seed(seed)
    for name, stack_config in zip(("embedding", "language"), student.config.stacks, strict=True):
        stack = copy.copy(getattr(teacher, name))
        stack._modules = dict(stack._modules)
        stack.config = stack_config
        stack.needs_rope = "mha" in stack_config.layer_types
        layers = []
        for layer, layer_type in zip(stack.layers, stack_config.layer_types, strict=True):
            if layer_type == "mamba2":
                layer = copy.copy(layer)
                layer._modules = dict(layer._modules)
                layer._compiled_call_impl = None  # that of the teacher's layer, if it was compiled
                layer.mixer = seed_mixer(layer.mixer, stack_config, generator)
            layers.append(layer)
        stack.layers = nn.ModuleList(layers)
        student._modules[name] = stack
    return student


@torch.no_grad()
def load_mixers_(student: MMMamba, trained: MMMamba) -> MMMamba:
    """Put the mixers of a finished student, whose projections are in their stored form, into one from `make_student`.

    Raises: ValueError if the two have other layers, or anything outside the mixers is not the same: it would be another
        teacher's student.
    """
    if trained.config != student.config:
        raise ValueError(
            f"the trained student is {trained.config.kind} and its config another than the recipe makes; take the "
            "recipe with its layers"
        )
    theirs, ours = trained.state_dict(), student.state_dict()
    for name, module in student.named_modules():
        if isinstance(module, Mamba2Mixer):
            assert isinstance(module.in_proj, SplitProjection), "a student in training"
            weight, rows = theirs.pop(f"{name}.in_proj.weight"), module.in_proj.vkq.shape[0]
            module.in_proj.vkq.copy_(weight[:rows])
            module.in_proj.gate_dt.copy_(weight[rows:])
            for part, own in module.state_dict().items():
                if not part.startswith(("in_proj.", "out_proj.")):
                    own.copy_(theirs.pop(f"{name}.{part}"))
    if other := [name for name, tensor in theirs.items() if not torch.equal(tensor.to(ours[name]), ours[name])]:
        raise ValueError(
            f"the trained student has another {other[0]} than the teacher, and {len(other) - 1} more; pass the teacher "
            "that it was distilled from"
        )
    return student


def fused_copy(student: MMMamba) -> MMMamba:
    """The student with every mixer's projection in its stored form; it may train on, everything else is shared."""
    view = copy.copy(student)
    view._modules = dict(student._modules)
    for name in ("embedding", "language"):
        stack = copy.copy(getattr(student, name))
        stack._modules = dict(stack._modules)
        layers = []
        for layer in stack.layers:
            if isinstance(layer.mixer, Mamba2Mixer):
                layer, mixer = copy.copy(layer), copy.copy(layer.mixer)
                mixer._modules = dict(mixer._modules)
                layer._modules = dict(layer._modules) | {"mixer": mixer}
            layers.append(layer)
        stack.layers = nn.ModuleList(layers)
        view._modules[name] = stack
    return fuse_(view)


@torch.no_grad()
def fuse_(student: MMMamba) -> MMMamba:
    """Put every mixer's projection into its stored form, one Linear; in place."""
    for module in student.modules():
        if isinstance(module, Mamba2Mixer) and isinstance(module.in_proj, SplitProjection):
            weight = module.in_proj.weight
            fused = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            fused.weight = nn.Parameter(weight.detach().clone())
            module.in_proj = fused
    return student
