"""HoVLE and mmMamba: one network whose layers are softmax attention or Mamba-2 mixers, as the config lists them.

Image and text tokens pass a *holistic embedding* (a causal stack of its own) and then the language model. With
`pixel_shuffle_loc: post` the embedding stack sees four positions for each image token of the language model, so the two
stacks count positions apart.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmmamba.attention import Attention
from mmmamba.config import EmbeddingConfig, LanguageConfig, LayerType, ModelConfig, StackConfig
from mmmamba.layers import GatedMLP, RMSNorm, RopeTables, Rotary, pixel_shuffle
from mmmamba.mixer import Mamba2Mixer
from mmmamba.segments import Padding, Segments
from mmmamba.state import DecodeState, StackState

_MIXERS: dict[str, type[Attention] | type[Mamba2Mixer]] = {"mha": Attention, "mamba2": Mamba2Mixer}


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: StackConfig, layer_type: LayerType) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mixer = _MIXERS[layer_type](config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        x: Tensor,
        state: object,
        seqlen_offset: int,
        rope: RopeTables | None,
        segments: Segments | None = None,
        padding: Padding | None = None,
    ) -> Tensor:
        return self.finish(x, self.mixer(self.mixer_norm(x), state, seqlen_offset, rope, segments, padding))

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """What follows the mixer: both residual sums and the MLP. Training may run it by itself."""
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x))


class DecoderStack(nn.Module):
    """A run of blocks; `state` carries them from one call to the next."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(config, layer_type) for layer_type in config.layer_types)
        self.rotary = Rotary(config)
        self.needs_rope = "mha" in config.layer_types
        self.outputs: list[Tensor] | None = None  # a list, while training wants every layer's output in it

    def rope_tables(self, x: Tensor, seqlen_offset: int = 0, total_seqlen: int | None = None) -> RopeTables | None:
        """Rotary tables for x (batch, seqlen, hidden_size), or None in a stack without attention."""
        if not self.needs_rope:
            return None
        seqlen = x.shape[1]
        total = max(total_seqlen or 0, seqlen_offset + seqlen)
        return self.rotary.tables(seqlen_offset, seqlen, total_seqlen=total, device=x.device, dtype=x.dtype)

    def run(
        self,
        x: Tensor,
        state: StackState | None,
        total_seqlen: int | None = None,
        segments: Segments | None = None,
        padding: Padding | None = None,
    ) -> Tensor:
        """(batch, seqlen, hidden_size) to the same.

        Args:
            total_seqlen: the length that dynamic NTK scaling should assume when this call is a piece of a longer prompt
                (None: what has been seen so far).
            segments: of packed rows; only without a state.
            padding: of rows of different lengths; only in stacks without attention.
        """
        assert state is None or segments is None, "packed rows leave no state to go on from"
        offset = 0 if state is None else state.seqlen
        if segments is not None and self.needs_rope:
            rope: RopeTables | None = self.rotary.segment_tables(segments, x.dtype)
        else:
            rope = self.rope_tables(x, offset, total_seqlen)
        for i, layer in enumerate(self.layers):
            x = layer(x, None if state is None else state.layers[i], offset, rope, segments, padding)
            if self.outputs is not None:
                self.outputs.append(x)
        if state is not None:
            state.seqlen += x.shape[1]
        return x


class ImageStem(nn.Module):
    """Tiles to patch tokens: a strided convolution and learned positions (row 0 of which is unused)."""

    def __init__(self, config: EmbeddingConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.grid = config.grid
        dim = config.hidden_size
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, dim))  # published, never read
        self.patch_embedding = nn.Conv2d(config.num_channels, dim, config.patch_size, stride=config.patch_size)
        self.position_embedding = nn.Parameter(torch.zeros(1, config.patches_per_tile + 1, dim))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(num_tiles, channels, side, side) to (num_tiles, patches, hidden_size), row by row."""
        conv = self.patch_embedding
        n, channels, side, _ = pixel_values.shape
        grid = side // self.patch_size
        # A convolution whose windows do not overlap is one matrix product over them, on every device a fast one.
        patches = pixel_values.to(conv.weight.dtype).reshape(n, channels, grid, self.patch_size, grid, self.patch_size)
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(n, grid * grid, -1)
        x = F.linear(patches, conv.weight.flatten(1), conv.bias)
        positions = self.position_embedding[:, 1:]
        if grid != self.grid:
            square = positions.view(1, self.grid, self.grid, -1).permute(0, 3, 1, 2)
            wide = square.to(torch.promote_types(square.dtype, torch.float32))
            resized = F.interpolate(wide, size=(grid, grid), mode="bicubic", align_corners=False)
            positions = resized.to(square.dtype).flatten(2).mT
        return x + positions


class TokenLayout(NamedTuple):
    """How the tokens of the language model lie in the embedding stack; indices run over the flattened batch."""

    stack_ids: Tensor  # (batch, stack_seqlen), image tokens repeated
    stack_text: Tensor  # positions of other tokens in the embedding stack
    stack_image: Tensor  # positions of image tokens in the embedding stack
    first: Tensor  # for every token of the language model its (first) position in the embedding stack
    image: Tensor  # positions of image tokens among the language model's


def token_layout(input_ids: Tensor, image_token_id: int, repeat: int) -> TokenLayout:
    """Repeat every image token `repeat` times: input_ids (batch, seqlen), on any device (on the CPU it costs a GPU no
    synchronisation).

    Raises: ValueError if the rows hold different numbers of image tokens.
    """
    batch = input_ids.shape[0]
    is_image = input_ids == image_token_id
    repeats = torch.where(is_image, repeat, 1)
    if batch > 1:
        _image_tokens_per_row(is_image)
    stack_ids = input_ids.flatten().repeat_interleave(repeats.flatten()).view(batch, -1)
    first = repeats.flatten().cumsum(0) - repeats.flatten()
    stack_image = (stack_ids == image_token_id).flatten()
    return TokenLayout(
        stack_ids,
        (~stack_image).nonzero().squeeze(1),
        stack_image.nonzero().squeeze(1),
        first,
        is_image.flatten().nonzero().squeeze(1),
    )


def _image_tokens_per_row(is_image: Tensor) -> int:
    """Image tokens in each row of (batch, seqlen).  Raises: ValueError if the rows differ."""
    counts = is_image.sum(dim=1).tolist()
    if min(counts) != max(counts):
        raise ValueError(f"rows hold different numbers of image tokens ({counts}); run them one at a time")
    return counts[0]


class TokenEmbedding(nn.Embedding):
    """An embedding table that is left alone on the meta device: a draw of nothing there imports all of torch._dynamo,
    which would double the time that a small model takes to load."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class HolisticEmbedding(DecoderStack):
    """Image and text tokens to the inputs of the language model (HoVLE, arXiv:2412.16158)."""

    def __init__(self, config: EmbeddingConfig, *, normalize: bool = False) -> None:
        super().__init__(config)
        self.config = config
        self.normalize = normalize
        dim = config.hidden_size
        self.text = TokenEmbedding(config.llm_vocab_size, dim)
        self.special = TokenEmbedding(config.num_special_tokens, dim) if config.num_special_tokens else None
        self.stem = ImageStem(config)
        self.shuffle_proj = nn.Sequential(nn.Linear(4 * dim, dim), nn.GELU(), nn.Linear(dim, dim))

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        state: DecodeState | None = None,
        total_seqlen: int | None = None,
    ) -> Tensor:
        """Embed tokens (batch, seqlen) and tiles (num_tiles, channels, side, side), rows of the batch in order.

        With a state, a call may end inside a tile: the whole tile is embedded at once, and what belongs to tokens yet
        to come is kept in `state.pending`. A call that begins inside a tile takes those and needs no pixels for it.

        Returns: (batch, seqlen, hidden_size).
        Raises: ValueError if image tokens and tiles do not match.
        """
        batch, seqlen = input_ids.shape
        is_image = input_ids == self.config.img_context_token_id
        waiting = 0 if state is None else min(state.pending.shape[1], seqlen)
        if waiting and not bool(is_image[:, :waiting].all()):
            raise ValueError(
                f"{waiting} image tokens of a tile are still to come, but the next input holds other tokens; "
                "pass the rest of the image tokens first"
            )
        rest = input_ids[:, waiting:]
        out = [] if state is None else [state.pending[:, :waiting]]
        if rest.shape[1]:
            missing = self.missing_tail(is_image[:, waiting:], pixel_values, batch, may_cut=state is not None)
            if missing:
                rest = F.pad(rest, (0, missing), value=self.config.img_context_token_id)
            out.append(self._embed(rest, pixel_values, state, total_seqlen))
        elif pixel_values is not None:
            raise ValueError(
                f"{len(pixel_values)} tiles were passed for image tokens that have their embeddings already"
            )
        x = torch.cat(out, dim=1) if len(out) > 1 else out[0]
        if state is not None:
            state.pending = torch.cat([x[:, seqlen:], state.pending[:, waiting:]], dim=1)
            state.num_image_tokens += int(is_image[0].sum())
            x = x[:, :seqlen]
        return x

    def missing_tail(self, is_image: Tensor, pixel_values: Tensor | None, batch: int, *, may_cut: bool) -> int:
        """Image tokens to add at the end so that the last tile is whole."""
        num_tokens = _image_tokens_per_row(is_image)
        num_tiles = 0 if pixel_values is None else len(pixel_values)
        if pixel_values is None or not num_tiles:
            if num_tokens:
                raise ValueError(f"input_ids hold {num_tokens} image tokens, but pixel_values is None; pass the tiles")
            return 0
        side = pixel_values.shape[-1]
        step = 2 * self.config.patch_size
        channels = self.config.num_channels
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != (channels, side, side) or side % step:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}; use (num_tiles, {channels}, side, side) with a "
                f"side that is a multiple of {step}"
            )
        per_tile = (side // step) ** 2
        missing = -num_tokens % per_tile
        if missing and not (may_cut and bool(is_image[:, -1].all())):
            raise ValueError(f"input_ids hold {num_tokens} image tokens a row, not a multiple of {per_tile} a tile")
        needed = batch * (num_tokens + missing) // per_tile
        if needed != num_tiles:
            raise ValueError(
                f"input_ids hold {batch} x {num_tokens} image tokens, which is {needed} tiles of {per_tile}; "
                f"pixel_values holds {num_tiles}"
            )
        return missing

    def _embed(
        self, input_ids: Tensor, pixel_values: Tensor | None, state: DecodeState | None, total_seqlen: int | None
    ) -> Tensor:
        layout = token_layout(input_ids, self.config.img_context_token_id, self.config.stack_tokens_per_image_token)
        device = self.stem.position_embedding.device
        layout = TokenLayout(*(t.to(device, non_blocking=True) for t in layout))
        if pixel_values is not None:
            pixel_values = pixel_values.to(device, non_blocking=True)
        batch, seqlen = input_ids.shape
        return self.embed_layout(layout, (batch, seqlen), pixel_values, state, total_seqlen)

    def embed_layout(
        self,
        layout: TokenLayout,
        shape: tuple[int, int],
        pixel_values: Tensor | None,
        state: DecodeState | None = None,
        total_seqlen: int | None = None,
        segments: Segments | None = None,
        padding: Padding | None = None,
    ) -> Tensor:
        """As `forward` for whole tiles whose layout is known, everything on this model's device: looks at no values, so
        that training can capture it. `shape` is (batch, seqlen) of the language model; `segments` are those of packed
        rows, `padding` that of rows of different lengths, as this stack counts their tokens."""
        batch, seqlen = shape
        dim = self.config.hidden_size
        post = self.config.pixel_shuffle_loc == "post"
        if pixel_values is None:
            x = self._text_embeddings(layout.stack_ids)
        else:
            patches = self.stem(pixel_values)
            if not post:
                patches = self.shuffle_proj(pixel_shuffle(patches))
            # Only text is looked up: thousands of equal image ids in one lookup make its backward pass slow.
            text = self._text_embeddings(layout.stack_ids.flatten().index_select(0, layout.stack_text))
            flat = text.new_empty(layout.stack_ids.numel(), dim).index_copy(0, layout.stack_text, text)
            flat = flat.index_copy(0, layout.stack_image, patches.reshape(-1, dim).to(flat.dtype))
            x = flat.view(batch, -1, dim)

        x = self.run(x, None if state is None else state.embedding, total_seqlen, segments, padding)

        if post and pixel_values is not None:
            flat = x.reshape(-1, dim)
            image = flat.index_select(0, layout.stack_image).view(len(pixel_values), -1, dim)
            image = self.shuffle_proj(pixel_shuffle(image)).reshape(-1, dim)
            x = flat.index_select(0, layout.first).index_copy(0, layout.image, image.to(x.dtype))
            x = x.view(batch, seqlen, dim)
        if self.normalize:
            x = x / x.norm(dim=-1, keepdim=True)
        return x

    def _text_embeddings(self, ids: Tensor) -> Tensor:
        if self.special is None:
            return self.text(ids)
        vocab = self.text.num_embeddings
        special = ids >= vocab
        return torch.where(
            special[..., None], self.special((ids - vocab).clamp(min=0)), self.text(ids.clamp(max=vocab - 1))
        )


class LanguageModel(DecoderStack):
    """Decoder stack, final norm and output head."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__(config)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self,
        x: Tensor,
        state: DecodeState | None = None,
        total_seqlen: int | None = None,
        segments: Segments | None = None,
        padding: Padding | None = None,
    ) -> Tensor:
        """Inputs of the language model to normed hidden states, both (batch, seqlen, hidden_size)."""
        return self.norm(self.run(x, None if state is None else state.language, total_seqlen, segments, padding))


class MMMamba(nn.Module):
    """The whole network. `config.kind` says whether it is the teacher (HoVLE), linear or hybrid.

    `source` is the directory it was loaded from (it holds the tokenizer), or None for a model made in memory; `scheme`
    is the one of `quantize` that its weights are packed by, or None.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.source: Path | None = None
        self.scheme: str | None = None
        self.embedding = HolisticEmbedding(config.embedding, normalize=config.normalize_encoder_output)
        self.language = LanguageModel(config.language)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Share the output head with the text embeddings where the config says so."""
        text = self.embedding.text
        # A packed table is tied already.
        if self.config.language.tie_word_embeddings and isinstance(text, nn.Embedding):
            self.language.output.weight = text.weight

    @property
    def device(self) -> torch.device:
        return self.language.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.language.norm.weight.dtype

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        state: DecodeState | None = None,
        *,
        total_seqlens: tuple[int, int] | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Logits for every position, or for the last one only.

        Args:
            input_ids: (batch, seqlen), int64. Image tokens (`img_context_token_id`) stand where tiles go, as many as
                the language model sees (`config.tokens_per_tile` a tile); all rows hold equally many.
            pixel_values: (num_tiles, channels, side, side), tiles of all rows in order, or None for text.
            state: what has been seen so far; advanced in place. None starts anew and keeps nothing.
            total_seqlens: (embedding stack, language model), the lengths that dynamic NTK scaling should assume when
                this call is a piece of a longer prompt.
        Returns: (batch, seqlen or 1, vocab_size).
        Raises: ValueError if image tokens and tiles do not match, or if the state is another model's.
        """
        hidden = self.hidden_states(input_ids, pixel_values, state, total_seqlens=total_seqlens)
        return self.language.output(hidden[:, -1:] if last_only else hidden)

    def hidden_states(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        state: DecodeState | None = None,
        *,
        total_seqlens: tuple[int, int] | None = None,
    ) -> Tensor:
        """As `forward`, but stops before the output head: (batch, seqlen, hidden_size)."""
        if input_ids.ndim != 2 or input_ids.shape[1] == 0:
            raise ValueError(
                f"input_ids has shape {tuple(input_ids.shape)}; use (batch, seqlen) with at least one token"
            )
        if state is not None:
            self._check_state(state, input_ids.shape[0])
        totals = (None, None) if total_seqlens is None else total_seqlens
        x = self.embedding(input_ids, pixel_values, state, totals[0])
        return self.language(x, state, totals[1])

    def new_state(self, batch: int = 1) -> DecodeState:
        """An empty state on this model's device, in its dtype."""
        return DecodeState.allocate(self.config, batch=batch, device=self.device, dtype=self.dtype)

    def _check_state(self, state: DecodeState, batch: int) -> None:
        if state.fingerprint != self.config.fingerprint():
            raise ValueError(
                f"the state belongs to another model (fingerprint {state.fingerprint}, this {self.config.kind} model "
                f"has {self.config.fingerprint()}); allocate one with model.new_state()"
            )
        if state.batch != batch:
            raise ValueError(f"the state holds {state.batch} rows, input_ids {batch}; they must be equal")
