"""Conversations drawn without end from a Llama-style language model, thousands of rows at once.

Every row is at a position of its own: a row whose conversation is over begins the next one at the next step, so none
waits for the slowest. What is not drawn (the opening of the user's turn, the template before the answer) is forced a
token at a step as well, which spares padding and prefill. State and choice stay on the device and have fixed shapes:
a step is one CUDA graph, and tokens come back by the chunk while the next chunk is on its way.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

MASK_ALIGNMENT = 16  # the memory-efficient attention copies a mask whose width is no multiple of it
WARM_UP_STEPS = 3


@dataclass(frozen=True)
class Script:
    """What a conversation is made of: a prompt, drawn tokens up to `end`, `reply`, drawn tokens up to `end`.

    Args:
        prompts: beginnings, one of which is taken by chance; all start with the same token and none holds `end`.
        reply: tokens between the question's `end` and the answer.
        max_question_tokens: a question without `end` after so many drawn tokens is given up.
        max_answer_tokens: an answer is cut after so many, `end` counted.
    """

    prompts: Sequence[Sequence[int]]
    reply: Sequence[int]
    end: int
    max_question_tokens: int = 64
    max_answer_tokens: int = 160

    @property
    def max_tokens(self) -> int:
        return max(map(len, self.prompts)) + self.max_question_tokens + len(self.reply) + self.max_answer_tokens


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. As in `generate`: the penalty first, then temperature, `top_k`, `top_p` of what is left."""

    temperature: float = 0.8
    top_p: float = 0.9
    top_k: int = 256  # stands in for the whole vocabulary, whose sort would cost more than the model
    repetition_penalty: float = 1.05


def draw_tokens(logits: Tensor, history: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """Draw one token a row, without waiting for the device.

    Args:
        logits: (rows, vocab_size), any float dtype; not changed.
        history: (rows, n) int64, tokens that the repetition penalty applies to (Keskar et al., arXiv:1909.05858).
        uniform: (rows,) float32 in [0, 1); 0 draws the most likely token.
    Returns: (rows,) int64.
    """
    scores = logits.to(torch.float32, copy=True)
    seen, penalty = scores.gather(1, history), sampling.repetition_penalty
    scores.scatter_(1, history, torch.where(seen < 0, seen * penalty, seen / penalty))
    best, tokens = scores.topk(min(sampling.top_k, scores.shape[1]))
    probs = (best / sampling.temperature).softmax(dim=-1)
    total = probs.cumsum(dim=-1)
    # A token stays unless those before it hold top_p already, so the most likely one always does.
    kept = total.masked_fill(total - probs >= sampling.top_p, 0).amax(dim=-1, keepdim=True)
    chosen = (total < uniform[:, None] * kept).sum(dim=-1, keepdim=True)
    return tokens.gather(1, chosen).squeeze(1)


@dataclass(frozen=True)
class _Layer:
    mixer_norm: Tensor
    qkv: Tensor  # ((num_heads + 2 * num_kv_heads) * head_dim, hidden)
    out: Tensor
    mlp_norm: Tensor
    gate_up: Tensor  # (2 * intermediate, hidden)
    down: Tensor
    keys: Tensor  # (rows, num_kv_heads, max_seqlen, head_dim), as values
    values: Tensor


class RowDecoder:
    """One token a row through a transformers `LlamaForCausalLM`, each row at its own position.

    Written out because of the number of launches: about 15 a layer, where transformers' modules take 45.

    Raises: ValueError if the model is no Llama, or one with biases.
    """

    def __init__(self, base: Any, rows: int, max_seqlen: int) -> None:
        config = base.config
        if config.model_type != "llama" or config.attention_bias or config.mlp_bias or config.hidden_act != "silu":
            raise ValueError(f"the base is a {config.model_type}; draw from a Llama-style model without biases")
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.eps = config.rms_norm_eps
        self.embedding, self.norm = base.model.embed_tokens.weight, base.model.norm.weight
        self.head = base.lm_head.weight
        device, dtype = self.embedding.device, self.embedding.dtype
        self.head_dim = base.model.layers[0].self_attn.head_dim
        self.max_seqlen = -(-max_seqlen // MASK_ALIGNMENT) * MASK_ALIGNMENT
        self.row = torch.arange(rows, device=device)
        positions = torch.arange(self.max_seqlen, device=device)
        cos, sin = (table[0] for table in base.model.rotary_emb(self.embedding[:1], position_ids=positions[None]))
        # The sign of rotate_half, so that a rotation is two products and a roll.
        sign = torch.ones(self.head_dim, device=device, dtype=dtype)
        sign[: self.head_dim // 2] = -1
        self.cos, self.sin = cos, sin * sign  # (max_seqlen, head_dim)
        self.masks = torch.zeros(self.max_seqlen, self.max_seqlen, device=device, dtype=dtype)
        self.masks.masked_fill_(positions[None] > positions[:, None], float("-inf"))  # row: what a position may see
        cache = (rows, self.num_kv_heads, self.max_seqlen, self.head_dim)
        self.layers = [
            _Layer(
                mixer_norm=layer.input_layernorm.weight,
                qkv=torch.cat([getattr(layer.self_attn, f"{name}_proj").weight for name in "qkv"]),
                out=layer.self_attn.o_proj.weight,
                mlp_norm=layer.post_attention_layernorm.weight,
                gate_up=torch.cat([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight]),
                down=layer.mlp.down_proj.weight,
                keys=torch.zeros(cache, device=device, dtype=dtype),
                values=torch.zeros(cache, device=device, dtype=dtype),
            )
            for layer in base.model.layers
        ]

    def step(self, token: Tensor, position: Tensor) -> Tensor:
        """Logits (rows, vocab_size) after `token` (rows,) at `position` (rows,); writes the caches there.

        A row that goes back to position 0 forgets: what its caches hold further on is masked until it is overwritten.
        """
        rows, turned = len(token), self.num_heads + self.num_kv_heads
        cos, sin = self.cos[position][:, None], self.sin[position][:, None]  # (rows, 1, head_dim)
        mask = self.masks[position][:, None, None]  # (rows, 1, 1, max_seqlen)
        x = F.embedding(token, self.embedding)
        for layer in self.layers:
            qkv = F.linear(self._normed(x, layer.mixer_norm), layer.qkv).view(rows, -1, self.head_dim)
            qk = qkv[:, :turned]
            qk = torch.addcmul(qk * cos, qk.roll(self.head_dim // 2, -1), sin)
            layer.keys[self.row, :, position] = qk[:, self.num_heads :]
            layer.values[self.row, :, position] = qkv[:, turned:]
            # Heads that share keys stand as a sequence: (rows, num_kv_heads, group, head_dim) needs no repeated keys.
            q = qk[:, : self.num_heads].unflatten(1, (self.num_kv_heads, -1))
            y = F.scaled_dot_product_attention(q, layer.keys, layer.values, attn_mask=mask)
            x = torch.addmm(x, y.reshape(rows, -1), layer.out.t())
            gate, up = F.linear(self._normed(x, layer.mlp_norm), layer.gate_up).chunk(2, dim=-1)
            x = torch.addmm(x, F.silu(gate) * up, layer.down.t())
        return F.linear(self._normed(x, self.norm), self.head)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], weight, self.eps)


@dataclass(frozen=True)
class Drawn:
    """A finished conversation: all its tokens, forced ones too, and the step at which it was begun."""

    tokens: list[int]
    begun: int


class Sampler:
    """Draws conversations of `script` in `rows` rows; the same generator gives the same ones.

    Args:
        base: a transformers `LlamaForCausalLM`, on the device and in the dtype to draw in.
        generator: on that device.
        graph: capture a step in a CUDA graph, where there is CUDA.
    Raises: ValueError if the script's prompts do not begin alike, or as `RowDecoder`.
    """

    @torch.inference_mode()
    def __init__(
        self,
        base: Any,
        script: Script,
        rows: int,
        generator: torch.Generator,
        *,
        sampling: Sampling | None = None,
        graph: bool = True,
    ) -> None:
        if len({prompt[0] for prompt in script.prompts}) != 1 or any(script.end in p for p in script.prompts):
            raise ValueError("prompts must begin with the same token and not hold the end token")
        self.script, self.sampling, self.generator = script, sampling or Sampling(), generator
        self.model = RowDecoder(base, rows, script.max_tokens)
        device = self.model.embedding.device
        self.start = script.prompts[0][0]
        width = max(map(len, script.prompts))
        self.prompts = torch.tensor([[*p, *[script.end] * (width - len(p))] for p in script.prompts], device=device)
        self.prompt_tokens = torch.tensor([len(p) for p in script.prompts], device=device)
        self.reply = torch.tensor(script.reply, device=device)

        def integers() -> Tensor:
            return torch.empty(rows, dtype=torch.int64, device=device)

        self.token, self.position = integers(), integers()  # what the next step reads, and where
        self.prompt, self.ended = integers(), integers()  # which prompt; where the question ended, or -1
        self.drawn = integers()  # the last step's tokens, inverted (~token) where a conversation is over
        self.history = torch.empty(rows, self.model.max_seqlen, dtype=torch.int64, device=device)
        self.uniform = torch.empty(2, rows, device=device)  # chooses a token, and the next prompt
        self._open = [[self.start] for _ in range(rows)]
        self._begun = [0] * rows
        self.steps = 0  # read back so far
        self._graph = self._capture() if graph and device.type == "cuda" else None
        self._begin()

    @property
    def oldest(self) -> int:
        """The step at which the oldest conversation was begun of those not finished among the steps read back."""
        return min(self._begun)

    def stream(self, chunk: int = 32) -> Iterator[list[Drawn]]:
        """Without end, what was finished in `chunk` steps: also questions that were given up (`end` is not in them)."""
        waiting = self._launch(chunk)
        while True:
            following = self._launch(chunk)  # under way while the caller works on what was waiting
            yield self._read(*waiting)
            waiting = following

    def _begin(self) -> None:
        self.uniform.uniform_(generator=self.generator)
        self.prompt.copy_(self._any_prompt())
        self.token.fill_(self.start)
        self.position.zero_()
        self.ended.fill_(-1)
        # Unused places repeat a token that is in every history, to which the penalty applies only once.
        self.history.fill_(self.start)

    def _any_prompt(self) -> Tensor:
        count = len(self.prompts)
        return (self.uniform[1] * count).long().clamp_(max=count - 1)  # a product may round up to `count`

    def _step(self) -> None:
        # Only the memory-efficient attention takes a mask and reads keys as they lie.
        kernel = sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
        with kernel if self.token.is_cuda else nullcontext():
            logits = self.model.step(self.token, self.position)
        drawn = draw_tokens(logits, self.history, self.uniform[0], self.sampling)

        position = self.position + 1  # of the token to choose
        prompt_tokens = self.prompt_tokens[self.prompt]
        in_prompt = position < prompt_tokens
        answering = self.ended >= 0
        replied = position - self.ended - 1  # tokens of the reply, then of the answer, before this one
        in_reply = answering & (replied < len(self.reply))
        token = torch.where(in_prompt, self.prompts[self.prompt, position.clamp(max=self.prompts.shape[1] - 1)], drawn)
        token = torch.where(in_reply, self.reply[replied.clamp(0, len(self.reply) - 1)], token)

        ends = ~in_prompt & ~in_reply & (token == self.script.end)
        asked = position - prompt_tokens + 1
        answered = replied - len(self.reply) + 1
        over = torch.where(
            answering,
            ends | (answered >= self.script.max_answer_tokens),
            ~ends & (asked >= self.script.max_question_tokens),
        )
        self.drawn.copy_(torch.where(over, ~token, token))
        # masked_fill where a number is put in: torch.where would copy it to the device, which a graph cannot hold.
        self.ended.copy_(torch.where(ends, position, self.ended).masked_fill(over, -1))
        self.prompt.copy_(torch.where(over, self._any_prompt(), self.prompt))
        self.position.copy_(position.masked_fill(over, 0))
        self.token.copy_(token.masked_fill(over, self.start))
        self.history.masked_fill_(over[:, None], self.start)
        self.history.scatter_(1, self.position[:, None], self.token[:, None])

    def _capture(self) -> Any:
        """The step as a CUDA graph, or None with a warning; leaves a state to be begun anew."""
        self._begin()
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_STEPS):  # libraries choose algorithms and allocate at their first calls
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        try:
            with torch.cuda.graph(graph):
                self._step()
        except RuntimeError as error:
            warnings.warn(f"steps run without a CUDA graph, which is slower: {error}", stacklevel=3)
            return None
        return graph

    @torch.inference_mode()
    def _launch(self, steps: int) -> tuple[Tensor, Any]:
        """Run steps; their tokens (steps, rows) on the host, and the event after which they are there."""
        tokens = torch.empty(steps, len(self.token), dtype=torch.int64, device=self.token.device)
        for i in range(steps):
            self.uniform.uniform_(generator=self.generator)
            if self._graph is None:
                self._step()
            else:
                self._graph.replay()
            tokens[i].copy_(self.drawn)
        if not tokens.is_cuda:
            return tokens, None
        host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
        host.copy_(tokens, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return host, event

    def _read(self, tokens: Tensor, event: Any) -> list[Drawn]:
        if event is not None:
            event.synchronize()
        finished = []
        for row, drawn in enumerate(tokens.t().tolist()):
            for step, token in enumerate(drawn, self.steps + 1):
                if token >= 0:
                    self._open[row].append(token)
                else:
                    finished.append(Drawn([*self._open[row], ~token], self._begun[row]))
                    self._open[row], self._begun[row] = [self.start], step
        self.steps += len(tokens)
        return finished
