"""`csrc/cuda/step.cu` on a CPU, one fiber a thread of the device, beside the plain path."""

from __future__ import annotations

import ctypes
import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmmamba.decoder.layers import MambaLayer, ModelLayers, gather
from mmmamba.decoder.one_launch import Layer, OneLaunch, Step
from mmmamba.kernels.weights import Kind, Weight, round_to_nearest
from mmmamba.model import MMMamba
from tests.helpers import random_model, tiny_raw

SOURCE = Path(__file__).parent / "cuda_host" / "run.cpp"
VOCAB = 93  # the last tile is not whole, and its rows are odd
GROUP = 64
PATIENCE = 100_000  # rounds of the emulator until a wait is given up; a token takes a few thousand


def model_of(hidden: int, inner: int, heads: int, kv_heads: int, *, unit: bool, layers: int = 1) -> MMMamba:
    """A random linear model in bfloat16, `layers` in each stack."""
    shape = {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": layers,
        "layers_block_type": ["mamba2"] * layers,
    }
    embedding = shape | {"llm_hidden_size": hidden, "llm_vocab_size": VOCAB, "img_context_token_id": VOCAB - 3}
    raw = tiny_raw(embedding=embedding, language=shape | {"vocab_size": VOCAB}, normalize_encoder_output=unit)
    return random_model(raw, dtype=torch.bfloat16)


def packed(model: MMMamba, kind: Kind, head: Kind, head_group: int | None) -> ModelLayers:
    """The model's weights in 8 or 4 bits; the model itself gets what they stand for."""

    def pack(weight: Weight, kind: Kind, group: int | None = None) -> Weight:
        if kind == "dense":
            return weight
        narrow = round_to_nearest(weight.data, kind) if group is None else _in_groups(weight.data, group)
        weight.data.copy_(narrow.dequantize())
        return narrow

    def layer(of: object) -> MambaLayer:
        assert isinstance(of, MambaLayer)
        mlp = replace(of.mlp, gate=pack(of.mlp.gate, kind), up=pack(of.mlp.up, kind), down=pack(of.mlp.down, kind))
        return replace(of, in_proj=pack(of.in_proj, kind), out_proj=pack(of.out_proj, kind), mlp=mlp)

    layers = gather(model)
    first, last = (replace(stack, layers=tuple(map(layer, stack.layers))) for stack in layers.stacks)
    return replace(layers, stacks=(first, last), head=pack(layers.head, head, head_group))


def _in_groups(dense: Tensor, size: int) -> Weight:
    rows, columns = dense.shape
    whole = round_to_nearest(dense.reshape(-1, size), "int8")
    assert whole.scales is not None and whole.zeros is not None  # noqa: PT018 (for the type checker)
    return Weight("int8", whole.data.view(rows, columns), whole.scales.view(rows, -1), whole.zeros.view(rows, -1), size)


@cache
def built(directory: Path, defines: tuple[tuple[str, int], ...]) -> ctypes.CDLL:
    """The kernel for a CPU. Raises: CalledProcessError if it does not compile."""
    library = directory / ("step_" + "_".join(str(value) for _, value in defines) + ".so")
    flags = [f"-D{name}={value}" for name, value in defines]
    options = ["-O2", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off"]
    subprocess.run(["g++", *options, *flags, str(SOURCE), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.run_step.restype = ctypes.c_uint32
    return loaded


class Emulated:
    """A model's tokens through the emulated kernel, `rows` conversations at once."""

    def __init__(
        self,
        model: MMMamba,
        layers: ModelLayers,
        directory: Path,
        rows: int,
        *,
        blocks: int,
        piece: int,
        warps: int = 2,
        **more: int,
    ) -> None:
        self.layers, self.blocks, self.warps = layers, blocks, warps
        self.one = OneLaunch(layers, rows, torch.device("cpu"), piece=piece, warps=self.warps)
        self.library = built(directory, tuple((self.one.defines | {"PATIENCE": PATIENCE} | more).items()))
        assert self.library.size_of_step() == ctypes.sizeof(Step)
        assert self.library.size_of_layer() == ctypes.sizeof(Layer)
        assert -(-self.library.slot_bytes() // 128) * 128 == self.one.slot_bytes
        # A ring that goes round many times.
        self.shared = self.one.fit(self.one._fixed_bytes(blocks) + 32 + 5 * (self.one.slot_bytes + 16), blocks)
        self.state = model.new_state(rows)
        self.x = torch.zeros(rows, layers.hidden_size, dtype=torch.bfloat16)
        self.logits = torch.full((rows, layers.vocab_size), float("nan"), dtype=torch.bfloat16)
        self.alive = torch.ones(rows, dtype=torch.int32)
        found = [t for stack in self.state.stacks for of in stack.layers for t in (of.conv_state, of.ssm_state)]
        addresses = [[t[row].data_ptr() for row in range(rows)] for t in found]
        self.tables = torch.tensor(addresses, dtype=torch.int64)
        self.one.bind(self.x, self.logits, self.tables, self.alive)

    def step(self, ids: Tensor, *, seed: int = 1, absent: int = -1) -> Tensor:
        """Logits (rows, vocab) after one token more; block `absent` never begins."""
        self.x.copy_(self.layers.text.data[ids])
        arguments: list[Any] = [ctypes.byref(self.one.step), self.blocks, 32 * (self.warps + 1)]
        self.library.run_step(*arguments, ctypes.c_longlong(self.shared), ctypes.c_uint32(seed), absent)
        return self.logits.float()


def difference(a: Tensor, b: Tensor) -> float:
    """Relative RMS."""
    return float(((a - b).square().mean() / b.square().mean()).sqrt())
