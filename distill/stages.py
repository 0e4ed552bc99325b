"""The stages: what trains, and what one step computes. The loop around them is `trainer.train`.

teacher  the holistic embedding and the language model: cross-entropy on answers, KL to the base on text.
stage1   what is new in a mixer (gate, step size, decay, convolution, norm), each layer against its attention.
stage2   the same with V, K, Q.
stage3   the mixers end to end: KL(teacher || student) on the answers.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn

from distill.chunked_loss import Loss, chunked_loss
from distill.config import StageConfig
from distill.convert import make_student
from distill.inputs import Inputs, answer_hidden, hidden_states, layer_outputs, mean_weights
from distill.layer_step import Layers, LayerStep, choose
from distill.losses import MSE_SCALE, Objective, layer_mse, relative_error
from mmmamba.kernels import select_scan, select_segment_attention, training_chunk
from mmmamba.layers import RopeTables
from mmmamba.mixer import Mamba2Mixer
from mmmamba.model import Block, MMMamba
from mmmamba.segments import Padding, Segments

NEW_IN_MIXERS = frozenset(
    f"mixer.{name}" for name in ("in_proj.gate_dt", "conv.weight", "conv.bias", "A_log", "dt_bias", "norm.weight")
)
VKQ = "mixer.in_proj.vkq"
DECAY = frozenset(("mixer.A_log", "mixer.dt_bias"))
_NO_DECAY = ("A_log", "dt_bias", ".bias", "norm.weight", "position_embedding", "class_embedding")


class Stage(ABC):
    """What trains, and the forward and backward pass of a step."""

    model: MMMamba  # the network that the step runs
    trains: frozenset[str] | None = None  # kinds of parameters that train, and no others; None: undeclared
    all_tokens = False  # `prepare` gives every token a slot, not only those of answers
    mark_real = False  # `prepare` says which positions are padding

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

    def follow(self, lr_factor: float) -> None:  # noqa: B027 (most have nothing to do)
        """Hear the learning rate over its peak, 0 to 1, before a step."""

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
    prepare_to_compile(model)
    for module in model.modules():
        if isinstance(module, Block):
            module.compile(dynamic=False)


def _compile_around_mixers(model: nn.Module) -> None:
    """Blocks whose mixer runs a backward pass by itself, which no graph holds: what comes before and behind it."""
    for module in model.modules():
        if isinstance(module, Block) and isinstance(module.mixer, PairedMixer):
            module.mixer_norm = copy.copy(module.mixer_norm)  # the teacher's own is left as it was
            module.mixer_norm.compile(dynamic=False)
            module.finish = torch.compile(module.finish, dynamic=False)  # type: ignore[method-assign]
        elif isinstance(module, Block):
            module.compile(dynamic=False)


def prepare_to_compile(model: nn.Module) -> None:
    """Choose the kernels that train now: what a compiled graph calls must be known before it is traced."""
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    device = next(model.parameters()).device.type
    select_scan(device, training=True)
    # Autocast makes products narrow on every device.
    select_segment_attention(device, narrow=True)


def no_weight_decay(name: str) -> bool:
    """Whether a parameter is a scale, an offset or a position, which decay would only pull off."""
    return any(part in name for part in _NO_DECAY)


class TeacherStage(Stage):
    """Everything trains; the pretrained language model at a rate of its own. Packed rows hold pictures or none.

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
                hidden, head = answer_hidden(self.model, inputs), self.model.language.output.weight
                weights = mean_weights(inputs.weights)
                if inputs.is_image:
                    loss = chunked_loss(hidden, head, targets=inputs.targets, ce_weights=weights)
                else:
                    base = self._base_hidden(inputs), self.base.output.weight
                    loss = chunked_loss(hidden, head, teacher_hidden=base[0], teacher_head=base[1], kl_weights=weights)
            (weight * loss.total).backward()
            out["image_ce" if inputs.is_image else "text_kl"] = loss.ce if inputs.is_image else loss.kl
        return out

    @torch.no_grad()
    def _base_hidden(self, inputs: Inputs) -> Tensor:
        # Text: both stacks see the same tokens.
        segments = None if inputs.segments is None else inputs.segments[1]
        hidden = self.base(self.base_text(inputs.layout.stack_ids), segments=segments)
        return hidden.flatten(0, 1).index_select(0, inputs.positions)


class PairedMixer(nn.Module):
    """Stands in for a teacher's attention: passes its output on, and trains a mixer to give the same for the same.

    The backward pass of a layer runs at once, so that no activations outlive it. Args: written_out: take `LayerStep`
    where it fits, instead of autograd.
    """

    def __init__(
        self, attention: Any, mixer: Mamba2Mixer, num_layers: int, *, compiled: bool, written_out: bool
    ) -> None:
        super().__init__()
        self.attention = attention
        self.mixer = mixer
        self.scale = MSE_SCALE / num_layers
        self.weight = 1.0
        self.loss = torch.zeros(())
        self.real: Tensor | None = None  # of packed rows: the positions that count
        self.step = LayerStep(attention, mixer) if written_out else None

        def compile_(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
            return torch.compile(fn, dynamic=False) if compiled else fn

        self._mix, self._attend, self._error = map(compile_, (attention.mix, attention.attend, self._mse))

    def _mse(self, x: Tensor, target: Tensor, segments: Segments | None, real: Tensor | None) -> Tensor:
        return layer_mse(self.mixer.mix(x, None, 0, None, segments), target, real)

    def forward(
        self,
        x: Tensor,
        state: object,
        seqlen_offset: int,
        rope: RopeTables | None,
        segments: Segments | None = None,
        padding: Padding | None = None,
    ) -> Tensor:
        assert padding is None, "as in the attention that it stands for"
        factor = self.weight * self.scale
        if self.step is not None and self.step.fits(x):
            with torch.no_grad():
                qkv = self.attention.in_proj(x)
                target = self._attend(qkv, None, seqlen_offset, rope, segments)
                self.loss = self.step.run(x, qkv, target, segments, self.real, factor)
            return self.attention.out_proj(target)
        with torch.no_grad():
            target = self._mix(x, None, seqlen_offset, rope, segments)
        with torch.enable_grad():
            loss = self._error(x.detach(), target, segments, self.real)
            (factor * loss).backward()
        self.loss = loss.detach()
        return self.attention.out_proj(target)


class LayerStage(Stage):
    """Stages 1 and 2: one pass of the teacher feeds the mixers of all layers.

    Args:
        train_decay: whether decays and step sizes (`A_log`, `dt_bias`) train too.
        written_out: whether layers run as `LayerStep` has them or by autograd.
    """

    def __init__(
        self,
        teacher: MMMamba,
        student: MMMamba,
        *,
        train_vkq: bool,
        compiled: bool,
        train_decay: bool = True,
        written_out: bool = False,
    ) -> None:
        pairs = list(paired_layers(teacher, student))
        student.requires_grad_(False)
        for _, layer in pairs:
            _train_mixer(layer.mixer, train_decay)
            layer.mixer.in_proj.vkq.requires_grad_(train_vkq)
        self.trains = _trained_kinds(train_vkq=train_vkq, train_decay=train_decay)
        if compiled:
            prepare_to_compile(student)
        self.written_out = written_out
        options = {"compiled": compiled, "written_out": written_out}
        self.model = _with_mixers(
            teacher, {id(t.mixer): PairedMixer(t.mixer, s.mixer, len(pairs), **options) for t, s in pairs}
        )
        if compiled:
            _compile_around_mixers(self.model)
        stacks = (self.model.embedding, self.model.language)
        of_stacks = [[m for m in stack.modules() if isinstance(m, PairedMixer)] for stack in stacks]
        self.paired = [paired for found in of_stacks for paired in found]
        self.in_language = [False] * len(of_stacks[0]) + [True] * len(of_stacks[1])

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
            for paired, in_language in zip(self.paired, self.in_language, strict=True):
                paired.weight = weight
                paired.real = None if inputs.real is None else inputs.real[in_language]
            with torch.no_grad(), self.autocast():
                hidden_states(self.model, inputs)
            losses = torch.stack([paired.loss for paired in self.paired])
            out["image_mse" if inputs.is_image else "text_mse"] = MSE_SCALE * losses.mean()
        return out


class LogitsStage(Stage):
    """Stage 3: the student's answers against the teacher's, token by token.

    Args:
        objective: what is minimised; by default the divergence on answers, their mean.
        train_decay: whether decays and step sizes (`A_log`, `dt_bias`) train too.
    """

    def __init__(
        self,
        teacher: MMMamba,
        student: MMMamba,
        *,
        compiled: bool,
        objective: Objective = Objective(),  # noqa: B008 (immutable)
        train_decay: bool = True,
    ) -> None:
        self.teacher = teacher.requires_grad_(False)
        self.model = student.requires_grad_(False)
        self.objective = objective
        self.all_tokens = objective.all_tokens
        self.mark_real = objective.hidden_weight > 0
        # On the device, where a captured step reads it anew every time.
        self._hidden_weight = torch.full((), objective.hidden_weight, device=next(student.parameters()).device)
        self._error = torch.compile(relative_error, dynamic=False) if compiled else relative_error
        self.trains = _trained_kinds(train_vkq=True, train_decay=train_decay)
        for _, layer in paired_layers(teacher, student):
            _train_mixer(layer.mixer, train_decay)
        if compiled:
            compile_blocks(teacher)
            compile_blocks(student)

    def parameters(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def follow(self, lr_factor: float) -> None:
        self._hidden_weight.fill_(self.objective.hidden_weight * lr_factor)

    def compute(self, batches: list[tuple[float, Inputs]]) -> dict[str, Tensor]:
        out = {}
        for weight, inputs in batches:
            kind = "image" if inputs.is_image else "text"
            with self.autocast():
                with torch.no_grad():
                    teacher, wanted = self._run(self.teacher, inputs)
                student, found = self._run(self.model, inputs)
                loss = self._loss(student, teacher, inputs)
            total = loss.total
            if found:
                error = self._hidden_error(found, wanted, inputs)
                total = total + self._hidden_weight * error
                out[f"{kind}_hidden"] = error.detach()
            (weight * total).backward()
            out[f"{kind}_kl"] = loss.kl
            if self.objective.ce_weight:
                out[f"{kind}_ce"] = loss.ce
        return out

    def _run(self, model: MMMamba, inputs: Inputs) -> tuple[Tensor, list[list[Tensor]]]:
        """Hidden states of answers, and behind every layer of both stacks if these are to be the same, too."""
        return layer_outputs(model, inputs) if self.objective.hidden_weight else (answer_hidden(model, inputs), [])

    def _hidden_error(self, found: list[list[Tensor]], wanted: list[list[Tensor]], inputs: Inputs) -> Tensor:
        # Stack by stack: what is wrong behind the embedding's few layers is wrong in all of the language model's.
        stacks = []
        for i, (mine, theirs) in enumerate(zip(found, wanted, strict=True)):
            real = None if inputs.real is None else inputs.real[i]
            errors = [self._error(s, t, real) for s, t in zip(mine, theirs, strict=True)]
            stacks.append(torch.stack(errors).mean())
        return torch.stack(stacks).mean()

    def _loss(self, student: Tensor, teacher: Tensor, inputs: Inputs) -> Loss:
        objective = self.objective
        of_mean = objective.reduction == "mean"
        answers = None
        if objective.ce_weight:
            answers = mean_weights(inputs.answers) if of_mean else inputs.answers
        return chunked_loss(
            student,
            self.model.language.output.weight,
            teacher_hidden=teacher,
            teacher_head=self.teacher.language.output.weight,
            kl_weights=mean_weights(inputs.weights) if of_mean else inputs.weights,
            targets=None if answers is None else inputs.targets,
            ce_weights=answers,
            temperature=objective.temperature,
            ce_factor=objective.ce_weight,
        )


def student_stage(
    name: str,
    teacher: MMMamba,
    student: MMMamba,
    config: StageConfig,
    *,
    compiled: bool,
    captured: bool = False,
    layers: Layers = "auto",
) -> Stage:
    """Stage 1, 2 or 3 by its name, as its config wants it; `layers`: how those of stages 1 and 2 run.

    Args: captured: whether its step will be captured as a CUDA graph.
    Raises: ValueError if they cannot run so here.
    """
    shared: dict[str, bool] = {"compiled": compiled, "train_decay": config.train_decay}
    if name == "stage3":
        return LogitsStage(teacher, student, objective=config.objective, **shared)
    device = next(student.parameters()).device
    shared["written_out"] = choose(layers, device, compiled=compiled, captured=captured)
    return LayerStage(teacher, student, train_vkq=name == "stage2", **shared)


def _trained_kinds(*, train_vkq: bool, train_decay: bool) -> frozenset[str]:
    kinds = NEW_IN_MIXERS | ({VKQ} if train_vkq else frozenset())
    return kinds if train_decay else kinds - DECAY


def _train_mixer(mixer: Any, train_decay: bool) -> None:
    """Let a mixer train, the output projection that it shares with the teacher's attention apart."""
    mixer.requires_grad_(True)
    mixer.out_proj.requires_grad_(False)
    mixer.A_log.requires_grad_(train_decay)
    mixer.dt_bias.requires_grad_(train_decay)
    mixer.chunk_size = training_chunk(mixer.head_dim)


def paired_layers(teacher: MMMamba, student: MMMamba) -> Iterator[tuple[Any, Any]]:
    """Layers in which the student has a mixer of its own: (teacher's block, student's block), embedding first."""
    for name in ("embedding", "language"):
        for t, s in zip(getattr(teacher, name).layers, getattr(student, name).layers, strict=True):
            if t.mixer is not s.mixer and isinstance(s.mixer, Mamba2Mixer):
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
