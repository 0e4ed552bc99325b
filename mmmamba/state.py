"""Decoding state: a value that the caller owns, so that two conversations cannot mix and a turn can be undone.

A `mamba2` layer keeps a fixed number of bytes at any length; an `mha` layer keeps keys and values, growing in blocks.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmmamba.config import ModelConfig, StackConfig
from mmmamba.kernels.reference import state_dtype

D_CONV = 2  # width of the mixer's convolution in every published checkpoint
KV_BLOCK = 256  # positions by which a key-value cache grows


@dataclass
class MambaState:
    """`conv_state` (batch, conv_dim, D_CONV - 1): inputs before the convolution. `ssm_state` (batch, num_heads,
    head_dim, d_state), float32."""

    conv_state: Tensor
    ssm_state: Tensor

    @classmethod
    def allocate(cls, stack: StackConfig, batch: int, device: torch.device | str, dtype: torch.dtype) -> MambaState:
        heads, dim = stack.num_attention_heads, stack.head_dim
        return cls(
            torch.zeros(batch, stack.conv_dim, D_CONV - 1, device=device, dtype=dtype),
            torch.zeros(batch, heads, dim, dim, device=device, dtype=state_dtype(dtype)),
        )

    def tensors(self) -> dict[str, Tensor]:
        return {"conv_state": self.conv_state, "ssm_state": self.ssm_state}


@dataclass
class KVState:
    """`k_cache`, `v_cache` (batch, num_kv_heads, capacity, head_dim); the stack's `seqlen` says how much is filled."""

    k_cache: Tensor
    v_cache: Tensor

    @classmethod
    def allocate(cls, stack: StackConfig, batch: int, device: torch.device | str, dtype: torch.dtype) -> KVState:
        shape = (batch, stack.num_key_value_heads, 0, stack.head_dim)
        return cls(torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype))

    def append_(self, k: Tensor, v: Tensor, seqlen: int) -> tuple[Tensor, Tensor]:
        """Write new keys and values (batch, num_kv_heads, n, head_dim) at `seqlen`; returns views of all so far."""
        end = seqlen + k.shape[2]
        if end > self.k_cache.shape[2]:
            self.move_(seqlen, end)
        self.k_cache[:, :, seqlen:end] = k
        self.v_cache[:, :, seqlen:end] = v
        return self.k_cache[:, :, :end], self.v_cache[:, :, :end]

    def move_(self, seqlen: int, end: int) -> None:
        """To memory of its own with room for `end` positions, in whole blocks; `seqlen` of them are filled."""
        capacity = -(-end // KV_BLOCK) * KV_BLOCK
        # A plain tensor even under `prefill`'s inference mode: such tensors could not be written to outside of it.
        with torch.inference_mode(False):
            self.k_cache, self.v_cache = (
                torch.cat([t[:, :, :seqlen], t.new_zeros(*t.shape[:2], capacity - seqlen, t.shape[3])], dim=2)
                for t in (self.k_cache, self.v_cache)
            )

    def tensors(self) -> dict[str, Tensor]:
        return {"k_cache": self.k_cache, "v_cache": self.v_cache}


LayerState = MambaState | KVState
_LAYER_STATES: dict[str, type[MambaState] | type[KVState]] = {"mamba2": MambaState, "mha": KVState}


@dataclass
class StackState:
    """State of one stack; `seqlen` counts the positions that this stack has seen."""

    layers: list[LayerState]
    seqlen: int = 0

    @classmethod
    def allocate(cls, stack: StackConfig, batch: int, device: torch.device | str, dtype: torch.dtype) -> StackState:
        return cls([_LAYER_STATES[t].allocate(stack, batch, device, dtype) for t in stack.layer_types])


@dataclass
class DecodeState:
    """Everything a conversation needs to go on. The two stacks count positions apart (`post` pixel shuffle)."""

    fingerprint: str
    embedding: StackState
    language: StackState
    # Image embeddings already computed for a tile whose later tokens have not been asked for: (batch, n, hidden_size).
    pending: Tensor
    num_image_tokens: int = 0
    stacks: tuple[StackState, StackState] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.stacks = (self.embedding, self.language)

    @classmethod
    def allocate(
        cls,
        config: ModelConfig,
        *,
        batch: int = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> DecodeState:
        """An empty state for `batch` conversations that advance together; `dtype` is the model's."""
        if batch < 1:
            raise ValueError(f"batch={batch} must be 1 or more")
        embedding, language = (StackState.allocate(stack, batch, device, dtype) for stack in config.stacks)
        pending = torch.zeros(batch, 0, config.language.hidden_size, device=device, dtype=dtype)
        return cls(config.fingerprint(), embedding, language, pending)

    @property
    def batch(self) -> int:
        return self.pending.shape[0]

    @property
    def seqlen(self) -> int:
        """Positions of the language model seen so far, text and image tokens."""
        return self.language.seqlen

    @property
    def num_text_tokens(self) -> int:
        return self.seqlen - self.num_image_tokens

    @property
    def nbytes(self) -> int:
        """Bytes held, caches at their allocated size."""
        return sum(t.nbytes for t in self.tensors().values())

    @property
    def cache_nbytes(self) -> int:
        """Bytes of keys and values, what is filled of them: this grows with every token."""
        named = self.tensors().items()
        filled = {name: self.stacks[name.startswith("language")].seqlen for name, _ in named}
        return sum(t[:, :, : filled[name]].nbytes for name, t in named if name.endswith("_cache"))

    @property
    def recurrent_nbytes(self) -> int:
        """Bytes of recurrent state: the same at any length."""
        return sum(t.nbytes for name, t in self.tensors().items() if not name.endswith("_cache"))

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state by name."""
        named = {"pending": self.pending}
        for stack_name, stack in zip(("embedding", "language"), self.stacks, strict=True):
            for i, layer in enumerate(stack.layers):
                named |= {f"{stack_name}.{i}.{name}": t for name, t in layer.tensors().items()}
        return named

    def clone(self) -> DecodeState:
        """A copy that shares no memory: advancing one leaves the other as it was."""

        def copy(stack: StackState) -> StackState:
            layers = [type(layer)(**{k: t.clone() for k, t in layer.tensors().items()}) for layer in stack.layers]
            return StackState(layers, stack.seqlen)

        return DecodeState(
            self.fingerprint, copy(self.embedding), copy(self.language), self.pending.clone(), self.num_image_tokens
        )

    def reserve_(self, seqlens: tuple[int, int]) -> None:
        """Room in the caches for so many positions of (embedding stack, language model): a long prompt that is read in
        pieces then moves them once, not with every piece."""
        for stack, end in zip(self.stacks, seqlens, strict=True):
            for layer in stack.layers:
                if isinstance(layer, KVState) and end > layer.k_cache.shape[2]:
                    layer.move_(stack.seqlen, end)

    def fork(self) -> DecodeState:
        """A state to go on from, leaving this one as it is: like `clone`, but keys and values are shared, not copied.

        The fork sees the caches cut to their filled length. That leaves no room in them, so its first new token moves
        it to memory of its own, while this state may go on writing behind what the fork sees.
        """

        def cut(layer: LayerState, seqlen: int) -> LayerState:
            if isinstance(layer, KVState):
                return KVState(layer.k_cache[:, :, :seqlen], layer.v_cache[:, :, :seqlen])
            return MambaState(layer.conv_state.clone(), layer.ssm_state.clone())

        embedding, language = (StackState([cut(x, s.seqlen) for x in s.layers], s.seqlen) for s in self.stacks)
        return DecodeState(self.fingerprint, embedding, language, self.pending.clone(), self.num_image_tokens)

    def share_(self, later: DecodeState) -> None:
        """Let this state see its keys and values in the caches of `later`, which went on from it; frees its own.

        Snapshots of every turn of a conversation then cost one cache, not one each. Recurrent states stay as they are.
        """
        for mine, theirs in zip(self.stacks, later.stacks, strict=True):
            if theirs.seqlen < mine.seqlen:
                raise ValueError(f"a state of {theirs.seqlen} positions did not go on from one of {mine.seqlen}")
            for layer, longer in zip(mine.layers, theirs.layers, strict=True):
                if isinstance(layer, KVState) and isinstance(longer, KVState):
                    layer.k_cache, layer.v_cache = (t[:, :, : mine.seqlen] for t in (longer.k_cache, longer.v_cache))

    def storages(self) -> dict[int, int]:
        """Address -> bytes of the memory held, each piece once: what several states share can be counted once."""
        pieces = (t.untyped_storage() for t in self.tensors().values())
        return {piece.data_ptr(): piece.nbytes() for piece in pieces if piece.nbytes()}

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> DecodeState:
        """The state on another device, or for a model in another dtype (recurrent states keep theirs, float32); shares
        memory with this one where nothing changes."""

        def moved(name: str, t: Tensor) -> Tensor:
            return t.to(device) if name == "ssm_state" else t.to(device, dtype)

        def move(stack: StackState) -> StackState:
            layers = [type(layer)(**{k: moved(k, t) for k, t in layer.tensors().items()}) for layer in stack.layers]
            return StackState(layers, stack.seqlen)

        return DecodeState(
            self.fingerprint,
            move(self.embedding),
            move(self.language),
            moved("pending", self.pending),
            self.num_image_tokens,
        )

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; caches are cut to their filled length."""
        tensors = {
            name: (t[:, :, : self.stacks[name.startswith("language")].seqlen] if name.endswith("_cache") else t)
            for name, t in self.tensors().items()
        }
        counts = {
            "fingerprint": self.fingerprint,
            "embedding_seqlen": self.embedding.seqlen,
            "language_seqlen": self.language.seqlen,
            "num_image_tokens": self.num_image_tokens,
        }
        save_file({k: t.contiguous() for k, t in tensors.items()}, path, metadata={"mmmamba_state": json.dumps(counts)})

    @classmethod
    def load(cls, path: str | Path, config: ModelConfig, *, device: torch.device | str = "cpu") -> DecodeState:
        """Read a state written by `save`.

        Raises: ValueError if the file is no state, or one of a model with other shapes or layer types.
        """
        try:
            file = safe_open(path, "pt", device=str(device))
        except SafetensorError as error:
            raise ValueError(f"{path} is not a decoding state; use a file written by DecodeState.save") from error
        with file as f:
            meta = (f.metadata() or {}).get("mmmamba_state")
            if meta is None:
                raise ValueError(f"{path} is not a decoding state; use a file written by DecodeState.save")
            counts = json.loads(meta)
            if counts["fingerprint"] != config.fingerprint():
                raise ValueError(
                    f"{path} is the state of another model (fingerprint {counts['fingerprint']}, this "
                    f"{config.kind} model has {config.fingerprint()}); load it with the model that wrote it"
                )
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (not a dict)
        _check_shapes(path, tensors, counts, config)

        def stack_state(name: str, stack: StackConfig) -> StackState:
            layers: list[LayerState] = []
            for i, layer_type in enumerate(stack.layer_types):
                kind = _LAYER_STATES[layer_type]
                layers.append(kind(**{f: tensors[f"{name}.{i}.{f}"] for f in kind.__dataclass_fields__}))
            return StackState(layers, counts[f"{name}_seqlen"])

        return cls(
            counts["fingerprint"],
            stack_state("embedding", config.embedding),
            stack_state("language", config.language),
            tensors["pending"],
            counts["num_image_tokens"],
        )


def _check_shapes(path: str | Path, tensors: dict[str, Tensor], counts: dict[str, int], config: ModelConfig) -> None:
    """A file may come from anywhere.  Raises: ValueError if a tensor is missing or has a shape that no state has."""
    expected = DecodeState.allocate(config, batch=len(tensors.get("pending", ())) or 1, device="meta").tensors()
    for name, t in expected.items():
        shape = list(t.shape)
        if name.endswith("_cache"):
            shape[2] = counts[f"{name.split('.')[0]}_seqlen"]
        elif name == "pending" and name in tensors and tensors[name].ndim == 3:
            shape[1] = tensors[name].shape[1]
        if name not in tensors or list(tensors[name].shape) != shape:
            found = list(tensors[name].shape) if name in tensors else "missing"
            raise ValueError(f"{path} is damaged: {name} is {found}, expected {shape}; save the state again")
