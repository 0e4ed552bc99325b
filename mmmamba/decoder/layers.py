"""A model's weights as the decoding kernels read them, gathered once; nothing is copied but norms and small vectors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmmamba.attention import Attention
from mmmamba.kernels.gemv import MixerRows
from mmmamba.kernels.launch import MAX_TILE_BYTES
from mmmamba.kernels.weights import PHASES, Weight, from_packed, to_phases
from mmmamba.layers import Rotary
from mmmamba.mixer import GATE_NORM_EPS, Mamba2Mixer
from mmmamba.model import Block, DecoderStack, MMMamba

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_HEAD_DIM = 256
ALIGNMENT = 16  # bytes; the kernels' loads of states and caches are that wide


class Unsupported(ValueError):
    """A model that the fused decoder cannot run, with the reason."""


@dataclass(frozen=True)
class Norm:
    """Weight of an RMS norm: as it is, and in the phases of the residual stream."""

    weight: Tensor
    phased: Tensor
    eps: float


@dataclass(frozen=True)
class Mlp:
    norm: Norm
    gate: Weight
    up: Weight
    down: Weight


@dataclass(frozen=True)
class MambaLayer:
    norm: Norm
    in_proj: Weight
    rows: MixerRows
    A: Tensor
    gate_norm: Tensor
    out_proj: Weight
    mlp: Mlp
    num_kv_heads: int
    eps: float = GATE_NORM_EPS


@dataclass(frozen=True)
class AttentionLayer:
    norm: Norm
    in_proj: Weight
    out_proj: Weight
    mlp: Mlp
    num_heads: int
    num_kv_heads: int
    head_dim: int


Layer = MambaLayer | AttentionLayer


@dataclass(frozen=True)
class StackLayers:
    """Layers of a stack; `rotary` where one of them is attention; `unit` if the stack ends in rows of length 1."""

    layers: tuple[Layer, ...]
    rotary: Rotary | None
    unit: bool


@dataclass(frozen=True)
class ModelLayers:
    """Everything that decoding reads. Activations between layers are kept in `phases` (`weights.to_phases`) where few
    rows are decoded; `phases` are those that most weights want."""

    text: Weight
    special: Tensor | None
    stacks: tuple[StackLayers, StackLayers]
    norm: Norm
    head: Weight
    phases: int
    dtype: torch.dtype

    @property
    def hidden_size(self) -> int:
        return self.text.shape[1]

    @property
    def vocab_size(self) -> int:
        return self.head.shape[0]

    @property
    def layers(self) -> tuple[Layer, ...]:
        return self.stacks[0].layers + self.stacks[1].layers


def weight_of(module: nn.Module) -> Weight:
    """The weight of a linear layer or an embedding table, dense, or packed where the module has a `packed_weight()`.

    Raises: Unsupported for layers of other kinds, with a bias, or whose groups the kernels cannot read.
    """
    module = getattr(module, "table", module)  # a packed embedding table holds the layer that the output head may be
    packed = getattr(module, "packed_weight", None)
    plain = isinstance(module, nn.Linear | nn.Embedding) and type(module).__module__.startswith(("torch.", "mmmamba."))
    if getattr(module, "bias", None) is not None or not (plain or packed):
        raise Unsupported(f"{type(module).__name__} is no plain or packed linear layer without a bias")
    try:
        if packed:
            return from_packed(packed())
        return Weight("dense", _tensor(module, "weight").contiguous())
    except ValueError as error:
        raise Unsupported(str(error)) from error


def gather(model: MMMamba) -> ModelLayers:
    """Collect a frozen model's weights.

    Raises: Unsupported with the reason if the kernels cannot run this model.
    """
    if model.dtype not in DTYPES:
        raise Unsupported(f"the model is in {model.dtype}; bfloat16, float16 or float32 are needed")
    if model.embedding.stem.patch_embedding.weight.device != model.device:
        raise Unsupported("the model's parts are on several devices")
    first = weight_of(model.language.layers[0].get_submodule("mlp.w1"))
    phases = PHASES[first.kind]
    hidden = model.config.language.hidden_size
    if hidden % phases:
        phases = 1
    table, head = model.embedding.text, model.language.output
    stacks = tuple(_stack(stack, phases) for stack in (model.embedding, model.language))
    layers = ModelLayers(
        text=weight_of(table),
        special=None if model.embedding.special is None else model.embedding.special.weight.detach(),
        stacks=(stacks[0], stacks[1]),
        norm=_norm(model.language.norm, phases),
        head=weight_of(head),
        phases=phases,
        dtype=model.dtype,
    )
    for weight in _all_weights(layers):
        _check(weight, layers.dtype)
    return layers


def _all_weights(layers: ModelLayers) -> list[Weight]:
    """Everything that a product reads."""
    found = [layers.head]
    for layer in layers.layers:
        found += [layer.in_proj, layer.out_proj, layer.mlp.gate, layer.mlp.up, layer.mlp.down]
    return found


def _check(weight: Weight, dtype: torch.dtype) -> None:
    columns = weight.shape[1]
    if weight.kind == "dense" and weight.data.dtype != dtype:
        raise Unsupported(f"a weight is in {weight.data.dtype}, the model in {dtype}")
    if columns * dtype.itemsize > MAX_TILE_BYTES:
        raise Unsupported(f"rows of {columns} numbers are longer than a program holds ({MAX_TILE_BYTES} bytes)")


def _norm(module: nn.Module, phases: int) -> Norm:
    weight, eps = _tensor(module, "weight"), module.eps
    assert isinstance(eps, float), "a norm has one"
    return Norm(weight, to_phases(weight, phases) if phases > 1 else weight, eps)


def _tensor(module: nn.Module, name: str) -> Tensor:
    tensor = getattr(module, name)
    assert isinstance(tensor, Tensor), f"{type(module).__name__}.{name} is one"
    return tensor.detach()


def _stack(stack: DecoderStack, phases: int) -> StackLayers:
    layers = tuple(_layer(block, phases) for block in stack.layers)
    return StackLayers(layers, stack.rotary if stack.needs_rope else None, bool(getattr(stack, "normalize", False)))


def _layer(block: nn.Module, phases: int) -> Layer:
    assert isinstance(block, Block)
    mixer, mlp = block.mixer, block.mlp
    gate, up, down = (weight_of(layer) for layer in (mlp.w1, mlp.w3, mlp.w2))
    if (gate.kind, gate.group_size) != (up.kind, up.group_size):
        raise Unsupported(f"gate and up projection of a layer are {gate.kind} and {up.kind}; both must be alike")
    common = {
        "norm": _norm(block.mixer_norm, phases),
        "in_proj": weight_of(mixer.in_proj),
        "out_proj": weight_of(mixer.out_proj),
        "mlp": Mlp(_norm(block.mlp_norm, phases), gate, up, down),
        "num_kv_heads": mixer.num_kv_heads,
    }
    if mixer.head_dim > MAX_HEAD_DIM or mixer.head_dim % 2:
        raise Unsupported(f"heads are {mixer.head_dim} wide; an even number up to {MAX_HEAD_DIM} is needed")
    if isinstance(mixer, Attention):
        return AttentionLayer(**common, num_heads=mixer.num_heads, head_dim=mixer.head_dim)  # type: ignore[arg-type]
    assert isinstance(mixer, Mamba2Mixer)
    if mixer.num_heads * mixer.head_dim**2 * 4 % ALIGNMENT:
        raise Unsupported(f"a state of {mixer.num_heads} heads of {mixer.head_dim} is no multiple of {ALIGNMENT} bytes")
    conv = mixer.conv
    rows = MixerRows(
        conv.weight.detach()[:, 0].contiguous(), conv.bias.detach(), mixer.dt_bias.detach().float(), mixer.splits[1]
    )
    A = -torch.exp(mixer.A_log.detach().float())
    return MambaLayer(**common, rows=rows, A=A, gate_norm=mixer.norm.weight.detach())  # type: ignore[arg-type]
