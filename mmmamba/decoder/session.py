"""Rows of several conversations that are decoded together, each from the state that its owner keeps."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mmmamba.decoder.layers import ALIGNMENT
from mmmamba.decoder.workspace import Workspace, inv_freq
from mmmamba.kernels.sampler import MAX_STOPS, DrawKind
from mmmamba.sampling import SamplingParams
from mmmamba.state import DecodeState, KVState, LayerState, MambaState

RING = 4  # drawn tokens that may be on their way to the host


class Binding:
    """States in the rows of a workspace: their addresses in its tables, room in their caches, their lengths."""

    def __init__(self, space: Workspace, states: Sequence[DecodeState]) -> None:
        self.space, self.states = space, states
        self.num_rows = sum(state.batch for state in states)
        # Tokens that each state will have seen when everything launched so far is done: (embedding, language).
        self.seqlens = [[stack.seqlen for stack in state.stacks] for state in states]
        self._limits = [0.0, 0.0]  # positions that both stacks have room for in every row

    @property
    def is_full(self) -> bool:
        """Whether a cache has no place for one position more."""
        return any(n >= limit for seqlens in self.seqlens for n, limit in zip(seqlens, self._limits, strict=True))

    def make_room(self) -> None:
        """Caches with a place for one position more, all tensors where the kernels can read them, and tables that say
        where. Costs a copy to the device when something has moved."""
        for state, seqlens in zip(self.states, self.seqlens, strict=True):
            for stack, seqlen in zip(state.stacks, seqlens, strict=True):
                for layer in stack.layers:
                    _settle(layer, seqlen)
        for i in range(len(self.space.turns)):
            self.space.reserve_turns(i, 1 + max(seqlens[i] for seqlens in self.seqlens))
        self._limits = [_limit(self.states, i) for i in range(len(self.space.turns))]
        # Where everything lies: all that the tables depend on.
        known = [(t.data_ptr(), t.stride(1)) for state in self.states for t in state.tensors().values()]
        if known != self.space.bound:
            self.space.bound = known
            addresses = to_device(self._addresses(), torch.int64, self.space.device)
            self.space.tables.copy_(addresses, non_blocking=True)

    def _addresses(self) -> list[list[int]]:
        """(entries, rows) of `Workspace.tables`; rows that are not in use read the first one's memory."""
        entries: list[list[int]] = []
        for i in range(len(self.states[0].stacks)):
            for layers in zip(*(state.stacks[i].layers for state in self.states), strict=True):
                for column in zip(*(row for layer in layers for row in _rows(layer)), strict=True):
                    spare = self.space.rows - self.num_rows
                    entries.append([*column, *column[:1] * spare])
        return entries

    def write_seqlens(self) -> None:
        """Tell the device how much every row has seen."""
        self.space.draws.seqlens.copy_(self.by_row(self.seqlens, torch.int32), non_blocking=True)

    def write_frequencies(self) -> None:
        """Rotary frequencies of the next position, where they move with the length (dynamic scaling)."""
        for i, (turns, stack) in enumerate(zip(self.space.turns, self.space.model.stacks, strict=True)):
            rotary = stack.rotary
            if turns is None or rotary is None or not turns.unrotated:
                continue
            totals = [seqlens[i] + 1 for seqlens in self.seqlens]
            if max(totals) <= rotary.max_positions and not self.space.stretched[i]:
                continue
            self.space.stretched[i] = max(totals) > rotary.max_positions
            frequencies = [inv_freq(stack, total).tolist() for total in totals]
            turns.inv_freq.copy_(self.by_row(frequencies, torch.float32).T, non_blocking=True)

    def by_row(self, values: Sequence[Sequence[float]], dtype: torch.dtype) -> Tensor:
        """Values (a state, n) to (n, rows) on the device; rows that are not in use get zeros."""
        rows = [list(v) for v, state in zip(values, self.states, strict=True) for _ in range(state.batch)]
        rows += [[0] * len(rows[0])] * (self.space.rows - self.num_rows)
        columns = [list(column) for column in zip(*rows, strict=True)]
        return to_device(columns, dtype, self.space.device)


class Session:
    """Conversations that go on together: `begin` draws their first tokens, `advance` feeds what was drawn and draws
    the next, `take` waits for tokens. Nothing but `take` waits for the device.

    A row that draws a stop token is not advanced any more. The states count what they were fed as soon as that is
    known: after `take` and `advance` have both passed the token. Close a session before its states go elsewhere.
    """

    def __init__(
        self,
        space: Workspace,
        states: Sequence[DecodeState],
        params: Sequence[SamplingParams],
        stop_token_ids: Sequence[int],
        banned: Tensor | None,
        give_back: Callable[[Workspace], None],
    ) -> None:
        self._space, self._give_back = space, give_back
        self.states = states
        self._binding = Binding(space, states)
        self._kind = DrawKind(
            greedy=all(p.is_greedy for p in params),
            penalty=any(p.repetition_penalty != 1 for p in params),
            top_k=any(p.top_k > 0 and not p.is_greedy for p in params),
            top_p=any(p.top_p < 1 and not p.is_greedy for p in params),
        )
        self._stops = frozenset(stop_token_ids)
        self._going = [True] * len(states)
        self._num_rows = self._binding.num_rows
        self._ring = torch.zeros(RING, space.rows, dtype=torch.int64, pin_memory=space.device.type == "cuda")
        self._on_the_way: deque[tuple[int, torch.cuda.Event | None]] = deque()
        self._unsettled: deque[list[int]] = deque()  # tokens taken, whose feeding is not counted yet
        self._published = self._steps = self._settled = 0
        self._prepare(params, banned)

    def _prepare(self, params: Sequence[SamplingParams], banned: Tensor | None) -> None:
        draws, binding, device = self._space.draws, self._binding, self._space.device
        binding.make_room()
        binding.write_seqlens()
        numbers = [(0.0 if p.is_greedy else p.temperature, p.top_p, p.min_p, p.repetition_penalty) for p in params]
        draws.numbers.copy_(binding.by_row(numbers, torch.float32).T, non_blocking=True)
        whole = binding.by_row([(p.top_k, 1) for p in params], torch.int64)
        draws.top_k.copy_(whole[0])
        draws.alive.copy_(whole[1])
        seeds = []
        for p, state in zip(params, self.states, strict=True):
            seed = random.getrandbits(62) if p.seed is None else p.seed
            seeds += [seed + row for row in range(state.batch)]  # rows of one state are conversations of their own
        draws.seed[: len(seeds)].copy_(to_device(seeds, torch.int64, device), non_blocking=True)
        stops = [*self._stops, *[-1] * (MAX_STOPS - len(self._stops))]
        draws.stops.copy_(to_device(stops, torch.int64, device), non_blocking=True)
        draws.count.zero_()
        draws.banned.zero_()
        if banned is not None:
            draws.banned.copy_(banned)
        if self._kind.penalty:
            draws.seen.zero_()

    def begin(self, logits: Tensor) -> None:
        """Draw the first tokens from the logits (rows, vocab_size) of what the states have seen."""
        self._space.logits[: self._num_rows].copy_(logits)
        self._space.draw(self._kind)
        self._publish()

    def advance(self) -> None:
        """Feed the tokens drawn last and draw the next."""
        if self._binding.is_full:
            self._binding.make_room()
        self._binding.write_frequencies()
        self._space.run(self._kind)
        for going, seqlens in zip(self._going, self._binding.seqlens, strict=True):
            seqlens[0] += going
            seqlens[1] += going
        self._steps += 1
        self._publish()
        self._settle()

    def take(self) -> list[int]:
        """Tokens drawn first of those not taken yet, one a row (of a row that has stopped, its stop token again).

        Raises: RuntimeError if a launch did not come to its end (`Workspace.check`).
        """
        slot, event = self._on_the_way.popleft()
        if event is not None:
            event.synchronize()
        self._space.check()
        tokens: list[int] = self._ring[slot, : self._num_rows].tolist()
        self._unsettled.append(tokens)
        self._settle()
        return tokens

    @property
    def done(self) -> bool:
        """Whether every row is known to have stopped."""
        return not any(self._going)

    def close(self) -> None:
        """Count what was fed and leave the workspace to others."""
        if self._space.owner is not self:
            return
        self._space.owner = None
        while self._settled + len(self._unsettled) < self._steps:
            self.take()
        self._space.check()
        self._give_back(self._space)  # after a fault nobody gets it

    def _publish(self) -> None:
        """Send the tokens drawn last to the host."""
        slot = self._published % RING
        assert len(self._on_the_way) < RING, "tokens are drawn faster than they are taken"
        self._ring[slot].copy_(self._space.draws.token, non_blocking=True)
        event = None
        if self._ring.is_pinned():
            event = torch.cuda.Event()
            event.record()
        self._on_the_way.append((slot, event))
        self._published += 1

    def _settle(self) -> None:
        while self._unsettled and self._settled < self._steps:
            tokens = iter(self._unsettled.popleft())
            self._settled += 1
            for i, state in enumerate(self.states):
                own = [next(tokens) for _ in range(state.batch)]
                self._going[i] = self._going[i] and not self._stops & set(own)
                if self._going[i]:
                    for stack in state.stacks:
                        stack.seqlen += 1


def to_device(values: Sequence[object], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of host values, sent without waiting."""
    on_host = torch.tensor(values, dtype=dtype)
    return on_host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else on_host


def _settle(layer: LayerState, seqlen: int) -> None:
    """Tensors of one layer laid out as the kernels read them, with room for one position more."""
    if isinstance(layer, KVState):
        caches = (layer.k_cache, layer.v_cache)
        if seqlen + 1 > caches[0].shape[2] or not all(_is_readable(t, t.shape[3]) for t in caches):
            layer.move_(seqlen, seqlen + 1)
    elif not (layer.conv_state.is_contiguous() and layer.ssm_state.is_contiguous() and _is_aligned(layer.ssm_state)):
        with torch.inference_mode(False):  # as in `KVState.move_`
            layer.conv_state = layer.conv_state.clone(memory_format=torch.contiguous_format)
            layer.ssm_state = layer.ssm_state.clone(memory_format=torch.contiguous_format)


def _limit(states: Sequence[DecodeState], stack: int) -> float:
    """Positions that the smallest cache of a stack has room for; without end where there is none."""
    layers = [layer for state in states for layer in state.stacks[stack].layers]
    return min((layer.k_cache.shape[2] for layer in layers if isinstance(layer, KVState)), default=float("inf"))


def _is_aligned(t: Tensor) -> bool:
    return t.data_ptr() % ALIGNMENT == 0


def _is_readable(cache: Tensor, dim: int) -> bool:
    """A cache (batch, num_kv_heads, capacity, head_dim), or the first positions of a longer one."""
    aligned = _is_aligned(cache) and cache.stride(1) * cache.element_size() % ALIGNMENT == 0
    return aligned and cache.stride(3) == 1 and cache.stride(2) == dim and cache.stride(1) % dim == 0


def _rows(layer: LayerState) -> list[tuple[int, ...]]:
    """For every row of a layer's state its entries of the tables."""

    def address(t: Tensor, row: int) -> int:
        return t.data_ptr() + row * t.stride(0) * t.element_size()

    if isinstance(layer, MambaState):
        tensors = (layer.conv_state, layer.ssm_state)
        return [tuple(address(t, row) for t in tensors) for row in range(tensors[0].shape[0])]
    keys, values = layer.k_cache, layer.v_cache
    capacity = keys.stride(1) // keys.shape[3]
    return [(address(keys, row), address(values, row), capacity) for row in range(keys.shape[0])]
