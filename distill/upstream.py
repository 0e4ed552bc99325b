"""Training checkpoints of the published code: mixers whose q, k, v, gate and step size are projections of their own.

Stage 2 stores frozen copies of the teacher's under `*_proj_shadow`; the teacher has them, so they are passed over.
"""

from __future__ import annotations

import copy
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from distill.convert import SplitProjection, make_student
from mmmamba.checkpoint import CheckpointError, TensorFiles
from mmmamba.config import LayerType
from mmmamba.keymap import UNUSED, from_published
from mmmamba.mixer import Mamba2Mixer
from mmmamba.model import MMMamba

_STACKS = {"embedding_model.encoder": "embedding", "language_model.model.layers": "language"}
_LAYER = re.compile(rf"({'|'.join(map(re.escape, _STACKS))})\.(\d+)\.attention\.(.+)")
_SHADOW = re.compile(r"[qkv]_proj_shadow\.weight")
_PARTS = (
    *("v_proj.weight", "k_proj.weight", "q_proj.weight", "g_proj.weight", "in_proj.weight"),
    *("conv1d.weight", "conv1d.bias", "A_log_bias", "dt_bias", "g_norm.weight", "o_proj.weight"),
)
_ATTENTION = ("wqkv.weight", "wo.weight")

Layers = dict[tuple[str, int], dict[str, Tensor]]


def load_upstream_student(teacher: MMMamba, path: str | Path, *, allow_changed: bool = False) -> MMMamba:
    """A student of `teacher` with the mixers that the published training code left in `path`.

    Layers that the checkpoint holds as attention stay the teacher's, so linear and hybrid are told apart by themselves.
    Everything that no stage trains is shared with the teacher in memory.

    Args:
        path: a safetensors file, or a directory of them.
        allow_changed: take over tensors outside of the mixers that are not the teacher's, as memory of the student's
            own (a last stage that trained everything), instead of raising.
    Raises: CheckpointError naming every tensor that is missing, unknown, of another shape, or not the teacher's.
    """
    stored = _read(Path(path))
    layers, others = _sorted(stored)
    fused = [key for key, parts in layers.items() if "wvkqgdt.weight" in parts]
    if fused:
        raise CheckpointError(
            f"{path} holds {len(fused)} fused layers (wvkqgdt): it is an inference checkpoint; read it with "
            "mmmamba.load_model"
        )
    types = [
        tuple(_layer_type(layers.get((stack, i), {})) for i in range(config.num_hidden_layers))
        for stack, config in zip(_STACKS.values(), teacher.config.stacks, strict=True)
    ]
    student = make_student(teacher, *types)
    problems: dict[str, list[str]] = {"missing": [], "unknown": [], "of another shape": [], "not the teacher's": []}
    shared = {name: tensor for name, tensor in student.named_parameters() if not _of_mixer(student, name)}
    for (stack, i), parts in layers.items():
        if i >= len(getattr(student, stack).layers):
            problems["unknown"] += [f"{stack} layer {i}"]
            continue
        prefix = f"{stack}.layers.{i}.mixer"
        mixer: Any = student.get_submodule(prefix)
        known = _PARTS if isinstance(mixer, Mamba2Mixer) else _ATTENTION
        problems["missing"] += [f"{prefix}: {part}" for part in known if part not in parts]
        problems["unknown"] += [f"{prefix}: {part}" for part in parts if part not in known]
        if isinstance(mixer, Mamba2Mixer):
            frozen = {"o_proj.weight": "out_proj.weight"}
            if all(part in parts for part in known):
                problems["of another shape"] += _fill(prefix, mixer, parts)
        else:
            frozen = {"wqkv.weight": "in_proj.weight", "wo.weight": "out_proj.weight"}
        # What is missing was named with its layer, so the teacher's stands in for it below.
        others |= {f"{prefix}.{name}": parts.get(part, shared[f"{prefix}.{name}"]) for part, name in frozen.items()}
    problems["unknown"] += [name for name in others if name not in shared]
    tied = teacher.config.language.tie_word_embeddings
    problems["missing"] += [n for n in shared if n not in others and not (tied and n == "language.output.weight")]
    for name in shared.keys() & others.keys():
        ours, theirs = shared[name], others[name]
        if ours.shape != theirs.shape:
            problems["of another shape"] += [f"{name} {list(theirs.shape)}, expected {list(ours.shape)}"]
        elif not torch.equal(ours.to(theirs), theirs):
            if allow_changed:
                _give_own(student, name, theirs.to(ours))
            else:
                problems["not the teacher's"] += [name]
    if any(problems.values()):
        found = (
            f"{len(names)} tensors {what}: {', '.join(sorted(names))}" for what, names in problems.items() if names
        )
        raise CheckpointError(
            f"{path} does not fit this teacher: {'; '.join(found)}. Pass the teacher that it was distilled from"
            + (
                ", or allow_changed=True (--allow-changed) if a stage trained these too"
                if problems["not the teacher's"]
                else ""
            )
        )
    return student


def _read(path: Path) -> dict[str, Tensor]:
    if path.is_file():
        if path.suffix != ".safetensors":
            raise CheckpointError(
                f"{path} is no safetensors file; loading anything else can run code: convert it first"
            )
        return load_file(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} is not there; pass a safetensors file or a directory of them")
    with ExitStack() as stack:
        files = TensorFiles(path, stack)
        return {name: files.read(name, torch.float32) for name in files.names()}


def _sorted(stored: dict[str, Tensor]) -> tuple[Layers, dict[str, Tensor]]:
    """(attention tensors by (stack, layer) and their name inside, the others under our names or their own)."""
    layers: Layers = {}
    others: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        if match := _LAYER.fullmatch(name):
            if not _SHADOW.fullmatch(match[3]):
                layers.setdefault((_STACKS[match[1]], int(match[2])), {})[match[3]] = tensor
        elif name != UNUSED:
            others[from_published(name) or name] = tensor
    return layers, others


def _layer_type(parts: dict[str, Tensor]) -> LayerType:
    return "mha" if "wqkv.weight" in parts else "mamba2"


def _of_mixer(student: MMMamba, name: str) -> bool:
    """Whether a parameter is a mixer's own: its output projection is the teacher's."""
    prefix, found, rest = name.partition(".mixer.")
    return (
        bool(found)
        and not rest.startswith("out_proj")
        and isinstance(student.get_submodule(f"{prefix}.mixer"), Mamba2Mixer)
    )


@torch.no_grad()
def _fill(prefix: str, mixer: Any, parts: dict[str, Tensor]) -> list[str]:
    """Put a layer's tensors into its mixer; returns those of another shape."""
    assert isinstance(mixer.in_proj, SplitProjection)
    wrong = []
    for name, parameter, tensors in (
        ("v_proj, k_proj, q_proj", mixer.in_proj.vkq, [parts[f"{p}_proj.weight"] for p in "vkq"]),
        ("g_proj, in_proj", mixer.in_proj.gate_dt, [parts["g_proj.weight"], parts["in_proj.weight"]]),
        ("conv1d.weight", mixer.conv.weight, [parts["conv1d.weight"]]),
        ("conv1d.bias", mixer.conv.bias, [parts["conv1d.bias"]]),
        ("A_log_bias", mixer.A_log, [parts["A_log_bias"]]),
        ("dt_bias", mixer.dt_bias, [parts["dt_bias"]]),
        ("g_norm.weight", mixer.norm.weight, [parts["g_norm.weight"]]),
    ):
        rows = sum(t.shape[0] for t in tensors)
        if any((rows, *t.shape[1:]) != tuple(parameter.shape) for t in tensors):
            shapes = ", ".join(str(list(t.shape)) for t in tensors)
            wrong.append(f"{prefix}: {name} {shapes}, expected {list(parameter.shape)} together")
        else:
            parameter.copy_(torch.cat(tensors))
    return wrong


def _give_own(student: MMMamba, name: str, tensor: Tensor) -> None:
    """Replace a parameter that is shared with the teacher, along with the modules on the way to it."""
    *path, last = name.split(".")
    module: nn.Module = student
    for part in path:
        child = copy.copy(module.get_submodule(part))
        child._modules, child._parameters = dict(child._modules), dict(child._parameters)
        module._modules[part] = child
        module = child
    module._parameters[last] = nn.Parameter(tensor, requires_grad=False)
