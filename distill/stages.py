"""The stages: what trains, and what one step computes. The loop around them is `trainer.train`.

teacher  the holistic embedding and the language model: cross-entropy on answers, KL to the base on text.
stage1   what is new in a mixer (gate, step size, decay, convolution, norm), each layer against its attention.
stage2   the same with V, K, Q.
stage3   the mixers end to end: KL(teacher || student) on the answers.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn

from distill.convert import make_student
from distill.inputs import Inputs, answer_hidden, hidden_states, weighted_mean
from distill.losses import MSE_SCALE, layer_mse, token_kl
from mmmamba.layers import RopeTables
from mmmamba.mixer import Mamba2Mixer
from mmmamba.model import Block, MMMamba

# Longer than any training row: one chunk, whose masked products compile into few kernels.
TRAINING_CHUNK = 512
_NO_DECAY = ("A_log", "dt_bias", ".bias", "norm.weight", "position_embedding", "class_embedding")


class Stage(ABC):
    """What trains, and the forward and backward pass of a step."""

    model: MMMamba  # the network that the step runs
    trains: frozenset[str] | None = None  # kinds of parameters that train, and no others; None: undeclared

    @abstractmethod
    def parameters(self) -> dict[str, nn.Parameter]:
        """Everything that trains, by name."""

    @abstractmethod
    def compute(self, batches: list[tuple[float, Inputs]]) -> dict[str, Tensor]:
        """Forward and backward over weighted batches on the model's device; leaves gradients, returns what to log.

        Looks at no values on the device and allocates nothing of varying size, so that it can be captured.
        """

    def learning_rate(self, name: str) -> str:
        """The field of StageConfig that holds a parameter's peak rate."""
        return "lr"

    def kind(self, name: str) -> str:
        """The group of a parameter, as `trains` names it: its place in a layer, whatever the layer."""
        return "mixer." + name.rpartition(".mixer.")[2] if ".mixer." in name else name

    def networks(self) -> list[nn.Module]:
        """Everything with weights that a step runs; some may share them."""
        return [value for value in vars(self).values() if isinstance(value, nn.Module)]

    def autocast(self) -> torch.autocast:
        # No cache of cast weights: it would hold on to tensors of a captured graph.
        return torch.autocast(self.model.device.type, torch.bfloat16, cache_enabled=False)


def compile_blocks(model: nn.Module) -> None:
    """Compile layer by layer: one small graph a shape serves all layers of a type."""
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    for module in model.modules():
        if isinstance(module, Block):
            module.compile(dynamic=False)


def no_weight_decay(name: str) -> bool:
    """Whether a parameter is a scale, an offset or a position, which decay would only pull off."""
    return any(part in name for part in _NO_DECAY)


def mixer_kinds(*, vkq: bool, decay: bool = True) -> frozenset[str]:
    """What trains in a student's mixers: all that is new in them, V, K, Q or not, decays and step sizes or not."""
    names = ["in_proj.gate_dt", "conv.weight", "conv.bias", "norm.weight"]
    names += ["in_proj.vkq"] * vkq + ["A_log", "dt_bias"] * decay
    return frozenset(f"mixer.{name}" for name in names)


class TeacherStage(Stage):
    """Everything trains; the pretrained language model at a rate of its own.

    The base that text is held to is the language model as it comes in, without the embedding stack (the identity then).
    """

    trains = frozenset(
        f"embedding.{part}" for part in ("text", "special", "stem", "layers", "shuffle_proj")
    ) | frozenset(f"language.{part}" for part in ("layers", "norm", "output"))

    def __init__(self, model: MMMamba, *, compiled: bool) -> None:
        self.model = model.train().requires_grad_(True)
        model.embedding.stem.class_embedding.requires_grad_(False)
        self.base_text = copy.deepcopy(model.embedding.text).to(torch.bfloat16).requires_grad_(False)
        self.base = copy.deepcopy(model.language).to(torch.bfloat16).requires_grad_(False)
        if compiled:
            compile_blocks(model)
            compile_blocks(self.base)

    def parameters(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def learning_rate(self, name: str) -> str:
        return "lr_language" if name.startswith("language.") or name == "embedding.text.weight" else "lr"

    def kind(self, name: str) -> str:
        return ".".join(name.split(".")[:2])

    def compute(self, batches: list[tuple[float, Inputs]]) -> dict[str, Tensor]:
        out = {}
        for weight, inputs in batches:
            with self.autocast():
                logits = self.model.language.output(answer_hidden(self.model, inputs))
                if inputs.is_image:
                    losses = F.cross_entropy(logits.float(), inputs.targets, reduction="none")
                else:
                    losses = token_kl(logits, self._base_logits(inputs))
                loss = weighted_mean(losses, inputs)
            (weight * loss).backward()
            out["image_ce" if inputs.is_image else "text_kl"] = loss.detach()
        return out

    @torch.no_grad()
    def _base_logits(self, inputs: Inputs) -> Tensor:
        hidden = self.base(self.base_text(inputs.layout.stack_ids))  # text: both stacks see the same tokens
        return self.base.output(hidden.flatten(0, 1).index_select(0, inputs.positions))


class PairedMixer(nn.Module):
    """Stands in for a teacher's attention: passes its output on, and trains a mixer to give the same for the same.

    The backward pass of a layer runs at once, so that no activations outlive it.
    """

    def __init__(self, attention: Any, mixer: Mamba2Mixer, num_layers: int, *, compiled: bool) -> None:
        super().__init__()
        self.attention = attention
        self.mixer = mixer
        self.scale = MSE_SCALE / num_layers
        self.weight = 1.0
        self.loss = torch.zeros(())
        self._attend = torch.compile(attention.mix, dynamic=False) if compiled else attention.mix
        self._error = torch.compile(self._mse, dynamic=False) if compiled else self._mse

    def _mse(self, x: Tensor, target: Tensor) -> Tensor:
        return layer_mse(self.mixer.mix(x, None, 0, None), target)

    def forward(self, x: Tensor, state: object, seqlen_offset: int, rope: RopeTables | None) -> Tensor:
        with torch.no_grad():
            target = self._attend(x, None, seqlen_offset, rope)
        with torch.enable_grad():
            loss = self._error(x.detach(), target)
            (self.weight * self.scale * loss).backward()
        self.loss = loss.detach()
        return self.attention.out_proj(target)


class LayerStage(Stage):
    """Stages 1 and 2: one pass of the teacher feeds the mixers of all layers."""

    def __init__(self, teacher: MMMamba, student: MMMamba, *, train_vkq: bool, compiled: bool) -> None:
        pairs = list(paired_layers(teacher, student))
        student.requires_grad_(False)
        self.trains = mixer_kinds(vkq=train_vkq)
        self.model = _with_mixers(
            teacher, {id(t.mixer): PairedMixer(t.mixer, s.mixer, len(pairs), compiled=compiled) for t, s in pairs}
        )
        self.paired = [m for m in self.model.modules() if isinstance(m, PairedMixer)]
        for paired in self.paired:
            mixer: Any = paired.mixer
            mixer.requires_grad_(True)
            mixer.out_proj.requires_grad_(False)
            mixer.in_proj.vkq.requires_grad_(train_vkq)
            mixer.chunk_size = TRAINING_CHUNK

    def parameters(self) -> dict[str, nn.Parameter]:
        return {
            f"{i}.mixer.{name}": p
            for i, paired in enumerate(self.paired)
            for name, p in paired.mixer.named_parameters()
            if p.requires_grad
        }

    def compute(self, batches: list[tuple[float, Inputs]]) -> dict[str, Tensor]:
        out = {}
        for weight, inputs in batches:
            for paired in self.paired:
                paired.weight = weight
            with torch.no_grad(), self.autocast():
                hidden_states(self.model, inputs)
            losses = torch.stack([paired.loss for paired in self.paired])
            out["image_mse" if inputs.is_image else "text_mse"] = MSE_SCALE * losses.mean()
        return out


class LogitsStage(Stage):
    """Stage 3: the student's answers against the teacher's, token by token."""

    def __init__(self, teacher: MMMamba, student: MMMamba, *, compiled: bool) -> None:
        self.trains = mixer_kinds(vkq=True)
        self.teacher = teacher.requires_grad_(False)
        self.model = student.requires_grad_(False)
        for _, layer in paired_layers(teacher, student):
            layer.mixer.requires_grad_(True)
            layer.mixer.out_proj.requires_grad_(False)
            layer.mixer.chunk_size = TRAINING_CHUNK
        if compiled:
            compile_blocks(teacher)
            compile_blocks(student)

    def parameters(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def compute(self, batches: list[tuple[float, Inputs]]) -> dict[str, Tensor]:
        out = {}
        for weight, inputs in batches:
            with self.autocast():
                with torch.no_grad():
                    teacher = self.teacher.language.output(answer_hidden(self.teacher, inputs))
                student = self.model.language.output(answer_hidden(self.model, inputs))
                loss = weighted_mean(token_kl(student, teacher), inputs)
            (weight * loss).backward()
            out["image_kl" if inputs.is_image else "text_kl"] = loss.detach()
        return out


def paired_layers(teacher: MMMamba, student: MMMamba) -> Iterator[tuple[Any, Any]]:
    """Layers that differ between the two: (teacher's block, student's block), embedding first."""
    for name in ("embedding", "language"):
        for t, s in zip(getattr(teacher, name).layers, getattr(student, name).layers, strict=True):
            if t.mixer is not s.mixer:
                yield t, s


def _with_mixers(teacher: MMMamba, replace: dict[int, PairedMixer]) -> MMMamba:
    """A view of the teacher with some mixers replaced; everything else is shared."""
    types = tuple(stack.layer_types for stack in teacher.config.stacks)
    view = make_student(teacher, *types)  # no mamba2 layer in it: a structural copy
    for name in ("embedding", "language"):
        stack: Any = getattr(view, name)
        layers = []
        for layer in stack.layers:
            if id(layer.mixer) in replace:
                mixer = replace[id(layer.mixer)]
                layer = copy.copy(layer)
                layer._modules = dict(layer._modules) | {"mixer": mixer}
            layers.append(layer)
        stack.layers = nn.ModuleList(layers)
    return view
