"""What a student's stage needs on a device, from shapes alone: to be read before a run and not after its first step.

Counts what eager code keeps; compiled layers keep less. The allocator and the context come on top, about a tenth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from distill.chunked_loss import CHUNK_ELEMENTS, HEAD_ROWS
from distill.config import Recipe
from mmmamba.config import EmbeddingConfig, LayerType, ModelConfig, StackConfig
from mmmamba.cost import count_parameters, teacher_config
from mmmamba.kernels import training_chunk
from mmmamba.state import D_CONV

StudentStage = Literal["stage1", "stage2", "stage3"]
WIDE = 4  # bytes of what trains, its gradient, its moments, and the residual stream
NARROW = 2  # bytes of what autocast computes in
_LOSS_MATRICES = 5  # of chunk_tokens x vocab_size, in float32


@dataclass(frozen=True)
class StageMemory:
    """Bytes at the fullest moment.

    weights: of teacher and student, what they share once.      gradients, optimizer: of what trains (AdamW).
    activations: kept for the backward pass.    loss: logits of a chunk, hidden states and their gradient.
    workspace: of the layer that is being computed.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    workspace: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.loss + self.workspace

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {value / 2**30:.2f}" for name, value in vars(self).items())
        return f"about {self.total / 2**30:.1f} GiB: {parts}"


def mixer_parameters(stack: StackConfig) -> tuple[int, int]:
    """Parameters of one mixer's own, (V, K, Q rows, the others); the output projection is the teacher's."""
    hidden, heads = stack.hidden_size, stack.num_attention_heads
    others = (hidden + heads) * hidden + stack.conv_dim * (D_CONV + 1) + 2 * heads + stack.head_dim
    return stack.conv_dim * hidden, others


def stage_memory(
    student: ModelConfig,
    stage: StudentStage,
    *,
    rows: int,
    seqlen: int,
    tiles: int = 0,
    weight_bytes: int = WIDE,
    checkpointing: bool = False,
    scan: Literal["triton", "chunked"] = "triton",
    hidden_error: bool = False,
    chunk_size: int | None = None,
    loss_tokens: int | None = None,
    loss_chunk: int | None = None,
) -> StageMemory:
    """Bytes of a step over `rows` rows of `seqlen` tokens, with `tiles` tiles in all.

    Args:
        weight_bytes: of a number of the frozen weights; 2 if they are kept in bf16, as the residual stream then is.
        hidden_error: whether stage 3 compares hidden states, for which those of the teacher are kept.
        chunk_size: of the scan; None: as training has it.
        loss_tokens: tokens that count in stage 3; None: all.       loss_chunk: as `chunked_loss` takes it.
    """
    language = student.language
    table = language.vocab_size * language.hidden_size
    unused = 0 if language.tie_word_embeddings else table  # stored by the authors, loaded by nobody
    shared = count_parameters(teacher_config(student)).total - unused
    own = trained = saved = most = 0
    learning = False  # behind the first layer that trains all keep something for the backward pass
    for stack in student.stacks:
        tokens = rows * seqlen
        if isinstance(stack, EmbeddingConfig):
            tokens += tiles * student.tokens_per_tile * (stack.stack_tokens_per_image_token - 1)
        vkq, others = mixer_parameters(stack)
        for layer_type in stack.layer_types:
            if layer_type == "mamba2":
                own += vkq + others
                trained += others + (vkq if stage != "stage1" else 0)
                learning = True
            chunk = min(chunk_size or training_chunk(stack.head_dim), tokens // rows)
            layer = _layer_bytes(stack, layer_type, tokens, rows, chunk, scan, weight_bytes)
            most = max(most, layer)
            if stage == "stage3" and learning:
                saved += tokens * stack.hidden_size * min(weight_bytes, WIDE) if checkpointing else layer
            if hidden_error:
                saved += tokens * stack.hidden_size * weight_bytes
    loss = 0
    if stage == "stage3":
        count = rows * seqlen if loss_tokens is None else loss_tokens
        chunk = min(count, loss_chunk or max(128, CHUNK_ELEMENTS // language.vocab_size // 128 * 128))
        loss = _LOSS_MATRICES * chunk * language.vocab_size * WIDE + 3 * count * language.hidden_size * WIDE
        loss += table * NARROW if weight_bytes > NARROW or language.vocab_size % HEAD_ROWS else 0
    # A layer's values and as many gradients; stages 1 and 2 keep no more than that.
    workspace = 2 * most
    return StageMemory(shared * weight_bytes + own * WIDE, trained * WIDE, 2 * trained * WIDE, saved, loss, workspace)


def step_memory(
    recipe: Recipe,
    stage: StudentStage,
    student: ModelConfig,
    *,
    scan: Literal["triton", "chunked"] = "triton",
) -> StageMemory:
    """Bytes of a step as a recipe has it: of the larger of its two batches, which run one after the other."""
    config = recipe.stages[stage]
    needs = []
    tiles_a_row = recipe.pictures
    if recipe.packed:
        tiles_a_row = recipe.packed_tiles or recipe.image_seqlen // student.tokens_per_tile
    for rows, seqlen, tiles, slots in (
        (config.image_batch, recipe.image_seqlen, config.image_batch * tiles_a_row, config.image_answer_tokens),
        (config.text_batch, recipe.text_seqlen, 0, config.text_answer_tokens),
    ):
        if rows:
            needs.append(
                stage_memory(
                    student,
                    stage,
                    rows=rows,
                    seqlen=seqlen,
                    tiles=tiles,
                    weight_bytes=NARROW if recipe.frozen_dtype == "bfloat16" else WIDE,
                    checkpointing=config.activation_checkpointing,
                    scan=scan,
                    hidden_error=config.hidden_weight > 0,
                    loss_tokens=None if slots is None else rows * slots,
                )
            )
    return max(needs, key=lambda need: need.total)


def _layer_bytes(
    stack: StackConfig, layer_type: LayerType, tokens: int, rows: int, chunk: int, scan: str, weight_bytes: int
) -> int:
    """What one layer keeps for its backward pass under autocast, the casts of its weights included."""
    hidden, inner, heads, kv = stack.hidden_size, stack.intermediate_size, stack.num_attention_heads, stack.kv_dim
    per_token = 2 * WIDE * (hidden + 1)  # what goes into the two norms
    per_token += 3 * NARROW * inner  # gate, its SiLU, the other factor
    weights = 3 * hidden * inner + hidden**2
    fixed = 0
    if layer_type == "mha":
        per_token += NARROW * (2 * hidden + 2 * kv) + WIDE * heads
        weights += (hidden + 2 * kv) * hidden
    else:
        per_token += NARROW * hidden + (NARROW + WIDE) * stack.conv_dim  # into the projection, convolution and SiLU
        per_token += 5 * WIDE * hidden + 3 * WIDE * heads  # gated norm, step sizes
        weights += stack.mixer_dim * hidden
        per_token += NARROW * stack.conv_dim  # x, B, C
        if scan == "chunked":
            # Two decay matrices in float32, scores and weights; x with its decays.
            per_token += heads * chunk * 2 * (WIDE + NARROW) + WIDE * hidden
        elif tokens // rows > chunk:
            fixed = (tokens // chunk + rows) * heads * stack.head_dim**2 * WIDE
    return tokens * per_token + fixed + (weights * NARROW if weight_bytes > NARROW else 0)
