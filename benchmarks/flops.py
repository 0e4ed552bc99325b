"""Useful floating-point operations of a training step: what the mathematics asks for, whatever is computed twice.

Products of weights count 2 a weight and token forward, as many for the gradient of their input where anything before
them learns, and as many for their own where they train. Attention counts the pairs of tokens that see each other, the
scan the pairs within its chunks and the states between them; their backward passes count twice the forward one, without
the tiles that kernels make again. Norms, convolutions, softmax and optimizer count nothing.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from benchmarks.kernels import Shape
from distill.inputs import Inputs
from distill.memory import mixer_parameters
from mmmamba.config import EmbeddingConfig, ModelConfig, StackConfig
from mmmamba.cost import teacher_config
from mmmamba.kernels import training_chunk


class Flops(NamedTuple):
    """layers: products of weights in blocks.  head: logits where they are computed.  image: stem and pixel shuffle.
    attention: scores and their values.  scan: the recurrence."""

    layers: float = 0.0
    head: float = 0.0
    image: float = 0.0
    attention: float = 0.0
    scan: float = 0.0

    @property
    def total(self) -> float:
        return sum(self)

    def __add__(self, other: Flops) -> Flops:  # type: ignore[override]
        return Flops(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, factor: float) -> Flops:
        return Flops(*(factor * value for value in self))


def step_flops(name: str, student: ModelConfig, batches: list[tuple[float, Inputs]]) -> Flops:
    """Of one step of a stage over its batches; `student` is the network that stage 3 trains (its teacher's config, in
    the teacher's stage)."""
    total = Flops()
    for _, inputs in batches:
        total += _of_batch(name, student, inputs)
    return total


def _of_batch(name: str, student: ModelConfig, inputs: Inputs) -> Flops:
    teacher = teacher_config(student)
    forward = _network(teacher, inputs)
    head = Flops(head=2.0 * inputs.positions.numel() * student.language.vocab_size * student.language.hidden_size)
    if name == "teacher":
        base = Flops() if inputs.is_image else _stack(teacher.language, inputs, 1) + head
        return (forward + head).times(3) + base
    if name == "stage3":
        return forward + _network(student, inputs) + _backward(student, inputs) + head.times(3)
    last = teacher.language
    tokens = inputs.shape[0] * inputs.shape[1]
    # Nobody asks what the last layer makes of its attention.
    unasked = Flops(layers=2.0 * tokens * (last.hidden_size**2 + 3 * last.hidden_size * last.intermediate_size))
    return forward + unasked.times(-1) + _mixers(student, inputs, train_vkq=name == "stage2")


def _tokens(stack: StackConfig, inputs: Inputs) -> int:
    batch, seqlen = inputs.shape
    return inputs.layout.stack_ids.numel() if isinstance(stack, EmbeddingConfig) else batch * seqlen


def _pairs(number: int, inputs: Inputs) -> float:
    """Pairs of tokens that attention sees: those of a segment, of a row without segments."""
    if inputs.segments is None:
        batch = inputs.shape[0]
        length = (inputs.layout.stack_ids.numel() if number == 0 else batch * inputs.shape[1]) // batch
        return batch * length * (length + 1) / 2
    lengths: Tensor = inputs.segments[number].cu_seqlens.diff().double()
    return float((lengths * (lengths + 1) / 2).sum())


def _attention(stack: StackConfig, number: int, inputs: Inputs) -> Flops:
    """Forward, of one layer: scores, and values by them."""
    return Flops(attention=4.0 * stack.hidden_size * _pairs(number, inputs))


def _scan(stack: StackConfig, inputs: Inputs) -> Flops:
    """Forward, of one layer."""
    batch = inputs.shape[0]
    heads, kv_heads = stack.num_attention_heads, stack.num_key_value_heads
    seqlen = _tokens(stack, inputs) // batch
    return Flops(scan=Shape(batch, seqlen, heads, kv_heads, stack.head_dim, training_chunk(stack.head_dim)).flops()[0])


def _in_weights(stack: StackConfig, layer_type: str) -> int:
    rows = stack.mixer_dim if layer_type == "mamba2" else stack.hidden_size + 2 * stack.kv_dim
    return rows * stack.hidden_size


def _rest_weights(stack: StackConfig) -> int:
    """Output projection and MLP."""
    return stack.hidden_size**2 + 3 * stack.hidden_size * stack.intermediate_size


def _stack(stack: StackConfig, inputs: Inputs, number: int) -> Flops:
    """Forward."""
    total = Flops()
    for layer_type in stack.layer_types:
        weights = _in_weights(stack, layer_type) + _rest_weights(stack)
        total += Flops(layers=2.0 * _tokens(stack, inputs) * weights)
        total += _scan(stack, inputs) if layer_type == "mamba2" else _attention(stack, number, inputs)
    return total


def _stem(config: ModelConfig, inputs: Inputs) -> tuple[Flops, Flops]:
    """Forward: patches, and the pixel shuffle's projection."""
    if inputs.pixels is None:
        return Flops(), Flops()
    embedding, tiles = config.embedding, len(inputs.pixels)
    hidden = embedding.hidden_size
    patch = embedding.num_channels * embedding.patch_size**2
    stem = Flops(image=2.0 * tiles * embedding.patches_per_tile * patch * hidden)
    return stem, Flops(image=2.0 * tiles * embedding.tokens_per_tile * 5 * hidden**2)


def _network(config: ModelConfig, inputs: Inputs) -> Flops:
    """Forward, without the head."""
    stem, shuffle = _stem(config, inputs)
    return stem + shuffle + _stack(config.embedding, inputs, 0) + _stack(config.language, inputs, 1)


def _backward(student: ModelConfig, inputs: Inputs) -> Flops:
    """Of stage 3, without the head: mixers get gradients, everything behind the first of them passes them on."""
    total = Flops()
    learning = False
    for number, stack in enumerate(student.stacks):
        tokens = 2.0 * _tokens(stack, inputs)
        for layer_type in stack.layer_types:
            mixer = layer_type == "mamba2"
            passes_on = learning  # nothing before the first mixer asks for a gradient
            learning = learning or mixer
            if mixer:
                total += Flops(layers=tokens * _in_weights(stack, layer_type)) + _scan(stack, inputs).times(2)
            elif learning:
                total += _attention(stack, number, inputs).times(2)
            if learning:
                total += Flops(layers=tokens * _rest_weights(stack))
            if passes_on:
                total += Flops(layers=tokens * _in_weights(stack, layer_type))
        if isinstance(stack, EmbeddingConfig) and learning and stack.pixel_shuffle_loc == "post":
            total += _stem(student, inputs)[1]
    return total


def _mixers(student: ModelConfig, inputs: Inputs, *, train_vkq: bool) -> Flops:
    """Forward and backward of stages 1 and 2, each mixer by itself. In stage 1 its V, K and Q are the teacher's, whose
    product is in the teacher's pass already, whether it is made once or twice."""
    total = Flops()
    for stack in student.stacks:
        tokens = 2.0 * _tokens(stack, inputs)
        vkq, _ = mixer_parameters(stack)
        own = _in_weights(stack, "mamba2")
        one = Flops(layers=tokens * 2 * (own if train_vkq else own - vkq)) + _scan(stack, inputs).times(3)
        total += one.times(stack.layer_types.count("mamba2"))
    return total
