"""The stages: what trains, and what one step computes. The loop around them is `trainer.train`.

teacher  the holistic embedding and the language model: cross-entropy on answers, KL to the base on text.
stage1   what is new in a mixer (gate, step size, decay, convolution, norm), each layer against its attention.
stage2   the same with V, K, Q.
stage3   the mixers end to end: KL(teacher || student) on the answers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn

from distill.convert import make_student
from distill.data.batches import Batch, pixel_values
from distill.losses import MSE_SCALE, layer_mse, token_kl
from mmmamba.layers import RopeTables
from mmmamba.mixer import Mamba2Mixer
from mmmamba.model import Block, MMMamba

# Longer than any training row: one chunk, whose masked products compile into few kernels.
TRAINING_CHUNK = 512
_NO_DECAY = ("A_log", "dt_bias", ".bias", "norm.weight", "position_embedding", "class_embedding")


class Stage(Protocol):
    def parameters(self) -> dict[str, nn.Parameter]:
        """Everything that trains, by name."""

    def learning_rate(self, name: str) -> str:
        """The field of StageConfig that holds a parameter's peak rate."""

    def step(self, batches: list[tuple[float, Batch]]) -> dict[str, Tensor]:
        """Forward and backward over weighted batches; leaves gradients, returns what to log."""


def device_pixels(batch: Batch, device: torch.device) -> Tensor | None:
    """The batch's tiles as the model takes them, normalised on the device; None for text."""
    return None if batch.pixels is None else pixel_values(batch.pixels.to(device, non_blocking=True))


def answer_positions(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Flat positions whose next token is to be learned, and those tokens. Computed on the CPU, sent without waiting."""
    seqlen = batch.input_ids.shape[1]
    rows, columns = batch.loss_mask[:, 1:].nonzero(as_tuple=True)
    targets = batch.input_ids[rows, columns + 1]
    return (rows * seqlen + columns).to(device, non_blocking=True), targets.to(device, non_blocking=True)


def answer_hidden(model: MMMamba, batch: Batch, positions: Tensor) -> Tensor:
    """Hidden states at the answer positions, (n, hidden_size)."""
    pixels = device_pixels(batch, positions.device)
    hidden = model.hidden_states(batch.input_ids, pixels)
    return hidden.flatten(0, 1)[positions]


def compile_blocks(model: nn.Module) -> None:
    """Compile layer by layer: one small graph a shape serves all layers of a type."""
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    for module in model.modules():
        if isinstance(module, Block):
            module.compile(dynamic=False)


def no_weight_decay(name: str) -> bool:
    return any(part in name for part in _NO_DECAY)


class TeacherStage:
    """Everything trains; the pretrained language model at a rate of its own."""

    def __init__(self, model: MMMamba, *, compiled: bool) -> None:
        self.model = model.train().requires_grad_(True)
        model.embedding.stem.class_embedding.requires_grad_(False)
        # The base for text: the language model as it was, in bf16 and without the embedding stack (identity then).
        self.base_text = copy.deepcopy(model.embedding.text).to(torch.bfloat16).requires_grad_(False)
        self.base = copy.deepcopy(model.language).to(torch.bfloat16).requires_grad_(False)
        if compiled:
            compile_blocks(model)
            compile_blocks(self.base)

    def parameters(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def learning_rate(self, name: str) -> str:
        return "lr_language" if name.startswith("language.") or name == "embedding.text.weight" else "lr"

    def step(self, batches: list[tuple[float, Batch]]) -> dict[str, Tensor]:
        device = self.model.device
        out = {}
        for weight, batch in batches:
            positions, targets = answer_positions(batch, device)
            with torch.autocast(device.type, torch.bfloat16):
                logits = self.model.language.output(answer_hidden(self.model, batch, positions))
                if batch.pixels is None:
                    with torch.no_grad():
                        ids = batch.input_ids.to(device, non_blocking=True)
                        base = self.base(self.base_text(ids)).flatten(0, 1)[positions]
                        base_logits = self.base.output(base)
                    loss = token_kl(logits, base_logits).mean()
                    out["text_kl"] = loss.detach()
                else:
                    loss = F.cross_entropy(logits.float(), targets)
                    out["image_ce"] = loss.detach()
            (weight * loss).backward()
        return out


class PairedMixer(nn.Module):
    """Stands in for a teacher's attention: passes its output on, and trains a mixer to give the same from the same input.

    The backward pass of a layer runs at once, so that no activations outlive it.
    """

    def __init__(self, attention: nn.Module, mixer: Mamba2Mixer, num_layers: int, *, compiled: bool) -> None:
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


class LayerStage:
    """Stages 1 and 2: one pass of the teacher feeds the mixers of all layers."""

    def __init__(self, teacher: MMMamba, student: MMMamba, *, train_vkq: bool, compiled: bool) -> None:
        pairs = list(paired_layers(teacher, student))
        student.requires_grad_(False)
        self.model = _with_mixers(
            teacher, {id(t.mixer): PairedMixer(t.mixer, s.mixer, len(pairs), compiled=compiled) for t, s in pairs}
        )
        self.paired = [m for m in self.model.modules() if isinstance(m, PairedMixer)]
        for paired in self.paired:
            paired.mixer.requires_grad_(True)
            paired.mixer.out_proj.requires_grad_(False)
            paired.mixer.in_proj.vkq.requires_grad_(train_vkq)
            paired.mixer.chunk_size = TRAINING_CHUNK

    def parameters(self) -> dict[str, nn.Parameter]:
        return {
            f"{i}.{name}": p
            for i, paired in enumerate(self.paired)
            for name, p in (("mixer." + n, p) for n, p in paired.mixer.named_parameters())
            if p.requires_grad
        }

    def learning_rate(self, name: str) -> str:
        return "lr"

    def step(self, batches: list[tuple[float, Batch]]) -> dict[str, Tensor]:
        device = self.model.device
        out = {}
        for weight, batch in batches:
            for paired in self.paired:
                paired.weight = weight
            pixels = device_pixels(batch, device)
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
                self.model.hidden_states(batch.input_ids, pixels)
            kind = "text" if batch.pixels is None else "image"
            out[f"{kind}_mse"] = MSE_SCALE * torch.stack([p.loss for p in self.paired]).mean()
        return out


class LogitsStage:
    """Stage 3: the student's answers against the teacher's, token by token."""

    def __init__(self, teacher: MMMamba, student: MMMamba, *, compiled: bool) -> None:
        self.teacher = teacher.requires_grad_(False)
        self.student = student.requires_grad_(False)
        for _, layer in paired_layers(teacher, student):
            layer.mixer.requires_grad_(True)
            layer.mixer.out_proj.requires_grad_(False)
            layer.mixer.chunk_size = TRAINING_CHUNK
        if compiled:
            compile_blocks(teacher)
            compile_blocks(student)

    def parameters(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.student.named_parameters() if p.requires_grad}

    def learning_rate(self, name: str) -> str:
        return "lr"

    def step(self, batches: list[tuple[float, Batch]]) -> dict[str, Tensor]:
        device = self.student.device
        out = {}
        for weight, batch in batches:
            positions, _ = answer_positions(batch, device)
            with torch.autocast(device.type, torch.bfloat16):
                with torch.no_grad():
                    teacher = self.teacher.language.output(answer_hidden(self.teacher, batch, positions))
                student = self.student.language.output(answer_hidden(self.student, batch, positions))
                loss = token_kl(student, teacher).mean()
            (weight * loss).backward()
            out["text_kl" if batch.pixels is None else "image_kl"] = loss.detach()
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
    for stack in (view.embedding, view.language):
        layers = []
        for layer in stack.layers:
            if id(layer.mixer) in replace:
                mixer = replace[id(layer.mixer)]
                layer = copy.copy(layer)
                layer._modules = dict(layer._modules) | {"mixer": mixer}
            layers.append(layer)
        stack.layers = nn.ModuleList(layers)
    return view
