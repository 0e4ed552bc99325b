"""One token at a time through a linear model on the CPU, all layers in one call of `kernels/csrc/decode_cpu.c`.

Same interface and results as the plain path, which reads the same weights through torch. `cpu_decoder_for` is the one
place that chooses, and says once what and why.
"""

from __future__ import annotations

import ctypes
import logging
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mmmamba.kernels.native import Linear, load_native, native_linear, refusal_of
from mmmamba.mixer import GATE_NORM_EPS, Mamba2Mixer
from mmmamba.model import Block, MMMamba
from mmmamba.packing import PackedWeight
from mmmamba.state import DecodeState, MambaState

log = logging.getLogger(__name__)


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, Linear) for name in ("in_proj", "out_proj", "w1", "w3", "w2")),
        *((name, ctypes.c_void_p) for name in ("mixer_norm", "mlp_norm", "gate_norm")),
        *((name, ctypes.c_void_p) for name in ("conv_weight", "conv_bias", "a_log", "dt_bias")),
        *((name, ctypes.c_float) for name in ("norm_eps", "gate_eps")),
        *((name, ctypes.c_int32) for name in ("num_heads", "num_kv_heads", "head_dim")),
    )


class _Model(ctypes.Structure):
    _fields_ = (
        ("layers", ctypes.POINTER(_Layer)),
        *((name, ctypes.c_int32) for name in ("num_layers", "hidden_size", "max_cols", "max_rows", "normalize_after")),
        ("final_eps", ctypes.c_float),
        ("final_norm", ctypes.c_void_p),
        ("head", Linear),
    )


class Unsupported(ValueError):
    """A model that this decoder cannot run, with the reason."""


class CpuDecoder:
    """Addresses of a model's weights, in the form that the library reads. The large ones are not copied; norms and the
    like are, if they are not in float32."""

    def __init__(self, model: MMMamba, lib: ctypes.CDLL) -> None:
        self._model, self._lib = model.embedding, lib
        self.dtype = model.dtype
        self._fingerprint = model.config.fingerprint()
        self._image_id = model.config.embedding.img_context_token_id
        self._kept: list[object] = []  # what the addresses below point to
        self._copied: list[Tensor] = []  # what was converted to float32
        blocks = [*model.embedding.layers, *model.language.layers]
        layers = (_Layer * len(blocks))(*(self._layer(block) for block in blocks))
        head = self._linear(model.language.output)
        linears = [getattr(layer, name) for layer in layers for name in ("in_proj", "out_proj", "w1", "w3", "w2")]
        norm = model.language.norm
        self.vocab_size = head.rows
        self._described = _Model(
            layers=layers,
            num_layers=len(blocks),
            hidden_size=head.cols,
            max_cols=max(linear.cols for linear in (*linears, head)),
            max_rows=max(linear.rows for linear in linears),
            normalize_after=len(model.embedding.layers) if model.embedding.normalize else 0,
            final_eps=norm.eps,
            final_norm=self._floats(norm.weight),
            head=head,
        )
        self._kept.append(layers)
        self._versions = self._versions_now()

    def is_current(self) -> bool:
        """Whether nothing was written to tensors that this decoder holds a copy of."""
        return self._versions == self._versions_now()

    def _versions_now(self) -> int:
        return sum(t._version for t in self._copied)

    def fits(self, token: Tensor, state: DecodeState) -> bool:
        """Whether this call can be made here: one row of text, and a state that is this model's."""
        return (
            token.shape == (1,)
            and state.batch == 1
            and state.fingerprint == self._fingerprint
            and state.pending.shape[1] == 0
            and state.pending.dtype == self.dtype
            and state.pending.device.type == "cpu"
            and int(token) != self._image_id
        )

    @torch.inference_mode()
    def decode_one_token(self, token: Tensor, state: DecodeState) -> Tensor:
        """As `generate.decode_one_token`: one token (1,), logits (1, vocab_size) in the model's dtype."""
        x = self._model._text_embeddings(token).float().contiguous()
        logits = torch.empty(1, self.vocab_size)
        convs, ssms = [], []
        for stack in state.stacks:
            for layer in stack.layers:
                assert isinstance(layer, MambaState), "the fingerprint says so"
                for tensor, dtype in ((layer.conv_state, self.dtype), (layer.ssm_state, torch.float32)):
                    assert tensor.dtype == dtype, f"state in {tensor.dtype}"
                    assert tensor.is_contiguous(), f"state with strides {tensor.stride()}"
                convs.append(layer.conv_state.data_ptr())
                ssms.append(layer.ssm_state.data_ptr())
        pointers = ctypes.c_void_p * len(convs)
        failed = self._lib.mmmamba_step(
            ctypes.byref(self._described),
            x.data_ptr(),
            pointers(*convs),
            pointers(*ssms),
            int(self.dtype == torch.bfloat16),
            logits.data_ptr(),
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError("no memory for the buffers of a decoding step")
        for stack in state.stacks:
            stack.seqlen += 1
        return logits.to(self.dtype)

    def _layer(self, block: nn.Module) -> _Layer:
        assert isinstance(block, Block)
        mixer, mlp = block.mixer, block.mlp
        assert isinstance(mixer, Mamba2Mixer)
        return _Layer(
            in_proj=self._linear(mixer.in_proj),
            out_proj=self._linear(mixer.out_proj),
            w1=self._linear(mlp.w1),
            w3=self._linear(mlp.w3),
            w2=self._linear(mlp.w2),
            mixer_norm=self._floats(block.mixer_norm.weight),
            mlp_norm=self._floats(block.mlp_norm.weight),
            gate_norm=self._floats(mixer.norm.weight),
            conv_weight=self._floats(mixer.conv.weight),
            conv_bias=self._floats(mixer.conv.bias),
            a_log=self._floats(mixer.A_log),
            dt_bias=self._floats(mixer.dt_bias),
            norm_eps=block.mixer_norm.eps,
            gate_eps=GATE_NORM_EPS,
            num_heads=mixer.num_heads,
            num_kv_heads=mixer.num_kv_heads,
            head_dim=mixer.head_dim,
        )

    def _linear(self, module: nn.Module) -> Linear:
        weight = weight_of(module)
        self._kept.append(weight)
        return native_linear(weight)

    def _floats(self, tensor: Tensor) -> int:
        floats = tensor.detach().float().contiguous()
        if floats.data_ptr() != tensor.data_ptr() and not tensor.is_inference():  # those cannot be written to
            self._copied.append(tensor)
        self._kept.append(floats)
        return floats.data_ptr()


def weight_of(module: nn.Module) -> Tensor | PackedWeight:
    """What a linear layer multiplies with: the tensor, or a packed weight where the module has one (`packed_weight`).

    Raises: Unsupported for other layers, those with a bias, and weights that the library cannot read.
    """
    packed = getattr(module, "packed_weight", None)
    if getattr(module, "bias", None) is not None or not (isinstance(module, nn.Linear) or packed):
        raise Unsupported(f"{type(module).__name__} is no plain or packed linear layer without a bias")
    weight: Tensor | PackedWeight = packed() if packed else module.weight.detach()  # type: ignore[operator]
    if reason := refusal_of(weight):
        raise Unsupported(reason)
    return weight


def make_cpu_decoder(model: MMMamba) -> CpuDecoder:
    """A decoder for a frozen linear model on the CPU.

    Raises: Unsupported with the reason if it cannot run this model, or nothing can be built here.
    """
    if model.device.type != "cpu" or model.dtype not in (torch.float32, torch.bfloat16):
        raise Unsupported(f"the model is on {model.device} in {model.dtype}; cpu in float32 or bfloat16 is needed")
    kinds = {type(block.mixer).__name__ for stack in (model.embedding, model.language) for block in stack.layers}
    if kinds != {"Mamba2Mixer"}:
        raise Unsupported(f"a {model.config.kind} model has attention layers")
    for module in _linears(model):
        weight_of(module)  # before anything is built
    lib, reason = load_native()
    if lib is None:
        raise Unsupported(reason)
    return CpuDecoder(model, lib)


def _linears(model: MMMamba) -> list[nn.Module]:
    names = "mixer.in_proj", "mixer.out_proj", "mlp.w1", "mlp.w3", "mlp.w2"
    blocks = [*model.embedding.layers, *model.language.layers]
    inner = [block.get_submodule(name) for block in blocks for name in names]
    return [*inner, model.language.output]


class _Choice(NamedTuple):
    """`made_for`: layers, and the address and dtype of a weight, that tell whether the model is still the same."""

    made_for: tuple[object, ...]
    decoder: CpuDecoder | None


_choices: WeakKeyDictionary[nn.Module, _Choice] = WeakKeyDictionary()


def cpu_decoder_for(model: object) -> CpuDecoder | None:
    """The decoder of a model, or None where the plain path is to be taken. Made on first use, and again when the
    model has other weights; models that train take the plain path."""
    if not isinstance(model, MMMamba):
        return None
    probe = model.language.norm.weight
    if model.training or probe.requires_grad or probe.device.type != "cpu":
        _choices.pop(model, None)  # it would keep the weights that the model had
        return None
    # Weights that were moved, converted or quantized lie elsewhere; those written to are read where they lie.
    layers = model.language.output, model.language.layers[0].get_submodule("mlp.w1")
    made_for = *layers, probe.data_ptr(), probe.dtype
    choice = _choices.get(model)
    if choice is None or choice.made_for != made_for or not (choice.decoder is None or choice.decoder.is_current()):
        try:
            decoder, reason = make_cpu_decoder(model), ""
        except Unsupported as error:
            decoder, reason = None, str(error)
        log.info("decoder: %s", f"plain ({reason})" if decoder is None else "one call a token (decode_cpu.c)")
        choice = _choices[model] = _Choice(made_for, decoder)
    return choice.decoder
