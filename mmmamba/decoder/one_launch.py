"""What `csrc/cuda/step.cu` is told: the weights of a linear model, and memory for what its blocks tell each other."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from mmmamba.decoder.layers import MambaLayer, ModelLayers, Unsupported
from mmmamba.kernels.weights import Weight

PIECE = 1024  # bytes of a row of weights that are copied at once
WARPS = 8  # that compute, in a block
TILE, GROUP = 16, 64
KINDS = {("dense", False): 0, ("int8", False): 1, ("int8", True): 2, ("int4", True): 3}  # (kind, in groups), as there
BITS = (16, 8, 8, 4)
# As `Watch` in `step.cu` writes a fault down.
LAST_PRODUCT = 4095
AWAITED = ("nothing", "room for weights", "weights", "x", "projected rows", "heads", "the gated MLP")
PRODUCTS = ("in_proj", "state", "out_proj", "gate and up", "down")


class Matrix(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in ("data", "scales", "zeros"))


class Layer(ctypes.Structure):
    _fields_ = (
        *((name, Matrix) for name in ("in_proj", "out_proj", "gate", "up", "down")),
        *((name, ctypes.c_void_p) for name in ("norm", "mlp_norm", "conv_weight", "conv_bias")),
        *((name, ctypes.c_void_p) for name in ("dt_bias", "A", "gate_norm")),
        *((name, ctypes.c_float) for name in ("eps", "mlp_eps", "gate_eps")),
        ("unit", ctypes.c_int),
    )


class Step(ctypes.Structure):
    _fields_ = (
        ("layers", ctypes.c_void_p),
        ("head", Matrix),
        *((name, ctypes.c_void_p) for name in ("norm", "x", "logits", "tables", "alive", "mail")),
        *((name, ctypes.c_void_p) for name in ("epoch", "tickets", "fault", "report")),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("num_layers", "head_unit", "table_stride")),
        *((name, ctypes.c_int) for name in ("hidden", "heads", "kv_heads", "inner", "vocab", "slots")),
    )


def kind_of(weight: Weight) -> int:
    """The number of the weight's kind in `step.cu`."""
    return KINDS[weight.kind, bool(weight.group_size) and weight.group_size != weight.shape[1]]


def refusal_of(model: ModelLayers, *, piece: int, warps: int) -> str:
    """Why the model cannot be decoded in one launch, or nothing.

    Args: piece: bytes of a row that are copied at once; warps: that compute, in a block.
    """
    layers = model.layers
    if any(not isinstance(layer, MambaLayer) for layer in layers):
        return "it has layers of attention"
    if model.dtype != torch.bfloat16:
        return f"it computes in {model.dtype}"
    first = layers[0]
    assert isinstance(first, MambaLayer), "all are"
    heads, dim, inner = first.A.shape[0], first.gate_norm.shape[0], first.mlp.gate.shape[0]
    if dim & (dim - 1) or not 8 <= dim <= 256 or warps * 32 % (dim // 8) or dim % (warps * 256 // dim):
        return f"its heads are {dim} wide"
    for layer in layers:
        assert isinstance(layer, MambaLayer), "all are"
        sizes = (layer.A.shape[0], layer.num_kv_heads, layer.gate_norm.shape[0], layer.mlp.gate.shape[0])
        if sizes != (heads, first.num_kv_heads, dim, inner):
            return "its layers differ in size"
        if heads * dim != model.hidden_size or 2 * layer.rows.conv_weight.shape[0] != layer.rows.conv_weight.numel():
            return "its convolution or its heads are of another shape"
        weights = (layer.in_proj, layer.out_proj, layer.mlp.gate, layer.mlp.up, layer.mlp.down)
        if {kind_of(weight) for weight in weights} != {kind_of(first.in_proj)}:
            return "its weights are of several kinds"
        if reason := next((reason for weight in weights if (reason := _refusal_of_weight(weight, piece))), ""):
            return reason
        if reason := _refusal_of_vectors(layer):
            return reason
    if model.hidden_size % TILE or inner % TILE or model.hidden_size // TILE > -(-first.in_proj.shape[0] // TILE):
        return "its rows are no multiple of 16"
    for kind in {kind_of(first.in_proj), kind_of(model.head)} - {0, 1}:
        groups = piece * 8 // (GROUP * BITS[kind])
        if groups % 8 or groups % (2 * warps):
            return f"{groups} groups in a piece cannot be shared by {warps} warps"
    return _refusal_of_weight(model.head, piece)


def _refusal_of_vectors(layer: MambaLayer) -> str:
    narrow = (layer.norm.weight, layer.mlp.norm.weight, layer.gate_norm, layer.rows.conv_weight, layer.rows.conv_bias)
    for vectors, dtype in ((narrow, torch.bfloat16), ((layer.rows.dt_bias, layer.A), torch.float32)):
        for vector in vectors:
            if vector.dtype != dtype or not vector.is_contiguous() or vector.data_ptr() % 16:
                return f"a vector of a layer is in {vector.dtype} (not {dtype}), or not aligned"
    return ""


def _refusal_of_weight(weight: Weight, piece: int) -> str:
    kind = kind_of(weight)
    columns = weight.shape[1]
    row_bytes = columns * BITS[kind] // 8
    if weight.kind != "dense":
        assert weight.scales is not None, "packed"
        assert weight.zeros is not None, "packed"
        if (weight.scales.dtype, weight.zeros.dtype) != (torch.float16, torch.float16):
            return f"scales are {weight.scales.dtype}"
        if weight.group_size not in (columns, GROUP):
            return f"groups hold {weight.group_size} weights"
    if columns % (32 if kind == 0 else GROUP) or columns % 8 or (kind >= 2 and row_bytes % piece):
        return f"rows of {columns} weights are no whole number of pieces"
    tensors = [t for t in (weight.data, weight.scales, weight.zeros) if t is not None]
    if any(t.data_ptr() % 16 or not t.is_contiguous() for t in tensors):
        return "a weight is not aligned"
    return ""


class OneLaunch:
    """A model for `step.cu`, and its memory for `rows` conversations.

    `step` is its argument, with x, logits, tables and alive left to be filled in; `keep` what its addresses lie in.
    Raises: Unsupported for a model that it cannot decode.
    """

    def __init__(
        self,
        model: ModelLayers,
        rows: int,
        device: torch.device,
        *,
        piece: int | None = None,
        warps: int | None = None,
    ) -> None:
        piece, warps = piece or PIECE, warps or WARPS
        if reason := refusal_of(model, piece=piece, warps=warps):
            raise Unsupported(f"no decoding in one launch: {reason}")
        first = model.layers[0]
        assert isinstance(first, MambaLayer), "as `refusal_of` has it"
        self.rows, self.piece, self.warps = rows, piece, warps
        self.layer_kind, self.head_kind = kind_of(first.in_proj), kind_of(model.head)
        self.hidden, self.inner = model.hidden_size, first.mlp.gate.shape[0]
        self.num_layers = len(model.layers)
        units = [False]
        for stack in model.stacks:
            units += [False] * (len(stack.layers) - 1) + [stack.unit]
        described = (Layer * self.num_layers)()
        for i, layer in enumerate(model.layers):
            assert isinstance(layer, MambaLayer), "as `refusal_of` has it"
            described[i] = _layer(layer, units[i])
        on_host = torch.frombuffer(bytearray(bytes(described)), dtype=torch.uint8)
        mixer = -(-first.in_proj.shape[0] // 2) * 2
        letters = rows * (self.hidden // 2 + self.inner // 2 + self.hidden + mixer)
        on_card = device.type == "cuda"
        self.keep = {
            "layers": on_host.to(device),
            "mail": torch.zeros(letters, dtype=torch.int64, device=device),
            "numbers": torch.tensor([1, 0, 0], dtype=torch.int32, device=device),
            # The kernel writes here once it has given up: the host looks without waiting.
            "report": torch.zeros(1, dtype=torch.int32, pin_memory=on_card),
        }
        numbers = self.keep["numbers"].data_ptr()
        self.step = Step(
            layers=self.keep["layers"].data_ptr(),
            head=_matrix(model.head),
            norm=model.norm.weight.data_ptr(),
            mail=self.keep["mail"].data_ptr(),
            epoch=numbers,
            tickets=numbers + 4,
            fault=numbers + 8,
            report=self.keep["report"].data_ptr(),
            eps=model.norm.eps,
            num_layers=self.num_layers,
            head_unit=int(units[-1]),
            hidden=self.hidden,
            heads=first.A.shape[0],
            kv_heads=first.num_kv_heads,
            inner=self.inner,
            vocab=model.vocab_size,
        )

    @property
    def defines(self) -> dict[str, int]:
        """Constants that the source is compiled with."""
        kinds = {"LAYER_KIND": self.layer_kind, "HEAD_KIND": self.head_kind}
        return {"ROWS": self.rows, "WARPS": self.warps, "PIECE": self.piece, **kinds}

    def bind(self, x: Tensor, logits: Tensor, tables: Tensor, alive: Tensor) -> None:
        """Where tokens come from and logits go: (rows, hidden), (rows, vocab), (2 * layers, rows or more), (rows,)."""
        self.step.x, self.step.logits = x.data_ptr(), logits.data_ptr()
        self.step.tables, self.step.table_stride = tables.data_ptr(), tables.stride(0)
        self.step.alive = alive.data_ptr()

    @property
    def fault(self) -> str:
        """Who waited in vain for what in a launch that has ended, or nothing. Waits for nothing itself."""
        return fault_of(int(self.keep["report"].item()) & 0xFFFFFFFF)

    def fit(self, available: int, blocks: int) -> int:
        """Choose as many slots as `available` bytes of shared memory hold beside the rest; bytes that are used."""
        slot = self.slot_bytes
        fixed = self._fixed_bytes(blocks)
        # Two barriers of 8 bytes a slot, in even numbers.
        self.step.slots = (available - fixed - 32) // (slot + 16)
        if self.step.slots < 4:
            raise ValueError(f"{available} bytes of shared memory hold {self.step.slots} slots; 4 are needed")
        return fixed + 32 + self.step.slots * (slot + 16)

    @property
    def slot_bytes(self) -> int:
        """A piece of 16 rows, padded, and the scales of its groups."""
        sizes = []
        for kind in (self.layer_kind, self.head_kind):
            block = (32 if kind == 0 else GROUP) * BITS[kind] // 8
            scales = TILE * (self.piece // block) * 2 if kind >= 2 else 0
            sizes.append(TILE * (self.piece + block) + 2 * scales)
        return -(-max(sizes) // 128) * 128

    def _fixed_bytes(self, blocks: int) -> int:
        columns, rows = max(self.hidden, self.inner), self.rows
        tiles = min(4 if rows > 2 else 8, 32 * self.warps // (8 * rows))
        own = -(-(self.hidden // TILE) // blocks) * rows * TILE
        floats = 2 * tiles * rows * TILE * self.warps + 4 * rows * self.warps + rows * (columns // GROUP) + own
        return rows * (columns * 2 + 16) + 16 + self.num_layers * ctypes.sizeof(Layer) + 4 * floats


def fault_of(code: int) -> str:
    """A fault in words, or nothing for 0."""
    if not code:
        return ""
    product, block, what = LAST_PRODUCT - (code >> 20), code >> 8 & 0xFFF, code & 0xFF
    layer, which = divmod(product - 2, len(PRODUCTS))
    return f"block {block} waited in vain for {AWAITED[what]} at {PRODUCTS[which]} of layer {layer} ({code:#x})"


def _matrix(weight: Weight) -> Matrix:
    scales, zeros = (0 if t is None else t.data_ptr() for t in (weight.scales, weight.zeros))
    return Matrix(weight.data.data_ptr(), scales, zeros)


def _layer(layer: MambaLayer, unit: bool) -> Layer:
    rows = layer.rows
    vectors: dict[str, Any] = {
        "norm": layer.norm.weight,
        "mlp_norm": layer.mlp.norm.weight,
        "conv_weight": rows.conv_weight,
        "conv_bias": rows.conv_bias,
        "dt_bias": rows.dt_bias,
        "A": layer.A,
        "gate_norm": layer.gate_norm,
    }
    matrices = {"gate": layer.mlp.gate, "up": layer.mlp.up, "down": layer.mlp.down}
    return Layer(
        in_proj=_matrix(layer.in_proj),
        out_proj=_matrix(layer.out_proj),
        **{name: _matrix(weight) for name, weight in matrices.items()},
        **{name: tensor.data_ptr() for name, tensor in vectors.items()},
        eps=layer.norm.eps,
        mlp_eps=layer.mlp.norm.eps,
        gate_eps=layer.eps,
        unit=int(unit),
    )
