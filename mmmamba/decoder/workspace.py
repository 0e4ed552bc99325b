"""Memory of fixed addresses for a batch of rows, the launches of one token on it, and their CUDA graphs.

States stay where their owners have them: the kernels find them through tables of addresses, so that a session costs a
copy of a few kilobytes, and a graph outlives the sessions that it serves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmmamba.decoder.layers import AttentionLayer, MambaLayer, ModelLayers, Norm, StackLayers
from mmmamba.decoder.one_launch import OneLaunch
from mmmamba.kernels.gemm import gemm_shape, product
from mmmamba.kernels.gemv import project
from mmmamba.kernels.launch import multiprocessors, next_power_of_2, overlaps_launches
from mmmamba.kernels.rows import embed, finish
from mmmamba.kernels.sampler import DrawKind, Draws, draw_tokens
from mmmamba.kernels.split_kv import Partial, Turns, attention, fill_turns
from mmmamba.kernels.step import step
from mmmamba.kernels.weights import PHASES, Weight
from mmmamba.kernels.whole_step import WholeStep, shared_limit

FEW_ROWS = 4  # up to here each row is a product of its own over weights in registers; above, tensor cores
BUCKETS = (1, 2, 4, 8, 16, 32, 64)
TURNS_CAPACITY = 4096  # positions that rotary tables of unrotated keys hold at first


def bucket_of(rows: int) -> int | None:
    """Rows of the smallest workspace that holds so many, or None."""
    return next((bucket for bucket in BUCKETS if bucket >= rows), None)


class Workspace:
    """Buffers for `rows` rows of a model.

    `tables` (entries, rows) int64 hold, a layer after the other, addresses of `conv_state` and `ssm_state`, or of keys
    and values and the capacity of their cache.
    """

    def __init__(
        self, model: ModelLayers, rows: int, device: torch.device, *, overlap: bool = True, one_launch: bool = False
    ) -> None:
        self.model, self.rows, self.device = model, rows, device
        self.few = rows <= FEW_ROWS
        self.pdl = overlap and overlaps_launches(device)
        self.draws = Draws.allocate(rows, model.vocab_size, device)
        self.tables = torch.zeros(num_entries(model), rows, dtype=torch.int64, device=device)

        def buffer(width: int, dtype: torch.dtype = model.dtype) -> Tensor:
            return torch.zeros(rows, width, dtype=dtype, device=device)

        hidden = model.hidden_size
        widths = {layer.in_proj.shape[0] for layer in model.layers}
        self.x, self.normed, self.y = buffer(hidden), buffer(hidden), buffer(hidden)
        self.u = {width: buffer(width, torch.float32) for width in widths}
        self.h = {layer.mlp.gate.shape[0]: buffer(layer.mlp.gate.shape[0]) for layer in model.layers}
        self.logits = buffer(model.vocab_size)
        # Sums of parts of K, by their number: what adds to the residual stream is split to fill the card.
        adding = () if self.few else [w for layer in model.layers for w in (layer.out_proj, layer.mlp.down)]
        splits = {gemm_shape(weight, device, split=True).splits for weight in adding}
        self.parts = {n: torch.zeros(n, rows, hidden, dtype=torch.float32, device=device) for n in splits}
        self.turns = [self._turns(stack, TURNS_CAPACITY) for stack in model.stacks]
        self.partial = [self._partial(stack) for stack in model.stacks]
        self.stretched = [False, False]  # whether a stack's `inv_freq` are other than those of short texts
        self.one = self._one() if one_launch and self.few else None
        self.whole = self._whole(self.one) if self.one is not None else None
        self.graphs: dict[DrawKind | None, torch.cuda.CUDAGraph] = {}
        self.owner: object = None  # the session that uses it
        self.bound: object = None  # what the tables were written for

    def _one(self) -> OneLaunch:
        one = OneLaunch(self.model, self.rows, self.device)
        one.bind(self.x, self.logits, self.tables, self.draws.alive)
        return one

    def _whole(self, one: OneLaunch) -> WholeStep:
        shared_bytes = one.fit(shared_limit(self.device), multiprocessors(self.device))
        return WholeStep(one.step, one.defines, shared_bytes, self.device)

    def check(self) -> None:
        """Whether all launches that have ended came to their end. Does not wait for the device.

        Raises: RuntimeError if the blocks of one waited in vain; what was computed since is wrong.
        """
        if self.one is not None and (fault := self.one.fault):
            raise RuntimeError(f"decoding in one launch failed: {fault}; answers since then are wrong")

    def _turns(self, stack: StackLayers, capacity: int) -> Turns | None:
        rotary = stack.rotary
        if rotary is None:
            return None
        unrotated = rotary.keys_unrotated
        scaling = rotary.scaling
        table = torch.zeros(
            self.rows, capacity if unrotated else 1, rotary.head_dim, dtype=self.model.dtype, device=self.device
        )
        frequencies = inv_freq(stack, 0).to(self.device).expand(self.rows if unrotated else 1, -1).contiguous()
        scale = scaling.factor if scaling is not None and scaling.type == "linear" else 1.0
        return Turns(frequencies, table, scale, unrotated)

    def _partial(self, stack: StackLayers) -> Partial | None:
        layer = next((layer for layer in stack.layers if isinstance(layer, AttentionLayer)), None)
        if layer is None:
            return None
        return Partial.allocate(self.rows, layer.num_heads, layer.num_kv_heads, layer.head_dim, self.device)

    def reserve_turns(self, stack: int, seqlen: int) -> None:
        """Room in a stack's rotary table for positions up to `seqlen`; a larger table makes new graphs."""
        turns = self.turns[stack]
        if turns is None or not turns.unrotated or seqlen <= turns.table.shape[1]:
            return
        with torch.inference_mode(False):
            larger = self._turns(self.model.stacks[stack], next_power_of_2(seqlen))
            assert larger is not None, "the stack has a table"
            larger.inv_freq.copy_(turns.inv_freq)
        self.turns[stack] = larger
        self.graphs.clear()

    # --- the launches of a token ---

    def run(self, kind: DrawKind | None) -> None:
        """Feed `draws.token`, advance the states, and draw the next token; with None stop at `logits`.

        Replays a graph, made at the first call of its kind: all rows must then have addresses in the tables.
        """
        if self.device.type != "cuda":
            self.launch(kind)
            return
        if kind not in self.graphs:
            self._capture(kind)
        self.graphs[kind].replay()

    def _capture(self, kind: DrawKind | None) -> None:
        alive = self.draws.alive.clone()
        self.draws.alive.zero_()  # rows that are not alive are left as they are: a run to compile everything
        self.launch(kind)
        self.draws.alive.copy_(alive)
        graph = torch.cuda.CUDAGraph()
        # Other threads (the page loads models in one) may allocate meanwhile.
        with torch.cuda.device(self.device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.launch(kind)
        self.graphs[kind] = graph

    def draw(self, kind: DrawKind) -> None:
        """Draw from `logits` as they are, without feeding a token."""
        draw_tokens(self.logits, self.draws, kind, fed=False, pdl=self.pdl)

    def launch(self, kind: DrawKind | None) -> None:
        """All kernels of one token, one after the other."""
        pdl = self.pdl
        if self.whole is not None:
            pdl = False  # its blocks must all run at once: nothing may take their place
            embed(self.draws.token, self.model.text, self.model.special, self.x, pdl=pdl)
            self.whole.launch()
        elif self.few:
            self._launch_few()
        else:
            self._launch_many()
        if kind is not None:
            draw_tokens(self.logits, self.draws, kind, pdl=pdl)

    def _launch_few(self) -> None:
        """Norms are prologues, sums into the residual stream epilogues."""
        model, pdl = self.model, self.pdl
        phases = model.phases
        x, y, alive = self.x, self.y, self.draws.alive
        embed(self.draws.token, model.text, model.special, x, phases=phases, pdl=pdl)
        entry = 0
        for i, stack in enumerate(model.stacks):
            self._fill_turns(i)
            for layer in stack.layers:
                norm: dict[str, Any] = {
                    "norm": layer.norm.phased,
                    "eps": layer.norm.eps,
                    "x_phases": phases,
                    "pdl": pdl,
                }
                u = self.u[layer.in_proj.shape[0]]
                y_phases = phases_of(layer.out_proj)
                if isinstance(layer, MambaLayer):
                    rows: dict[str, Any] = {"mixer": layer.rows, "conv_table": self.tables[entry], "alive": alive}
                    project(x, layer.in_proj, u, **norm, **rows)
                else:
                    project(x, layer.in_proj, u, **norm)
                entry = self._mix(i, layer, u, entry, y_phases)
                project(y, layer.out_proj, x, residual=True, x_phases=y_phases, out_phases=phases, pdl=pdl)
                mlp = layer.mlp
                h, h_phases = self.h[mlp.gate.shape[0]], phases_of(mlp.down)
                norm |= {"norm": mlp.norm.phased, "eps": mlp.norm.eps}
                project(x, mlp.gate, h, gated=mlp.up, out_phases=h_phases, **norm)
                project(h, mlp.down, x, residual=True, x_phases=h_phases, out_phases=phases, pdl=pdl)
            if stack.unit:
                finish(x, unit=True, pdl=pdl)
        last: dict[str, Any] = {"norm": model.norm.phased, "eps": model.norm.eps}
        project(x, model.head, self.logits, **last, x_phases=phases, pdl=pdl)

    def _launch_many(self) -> None:
        """Products on tensor cores; what adds to the residual stream leaves parts that `finish` sums and norms."""
        model, pdl = self.model, self.pdl
        x, y, normed, alive = self.x, self.y, self.normed, self.draws.alive
        norms = [norm for layer in model.layers for norm in (layer.norm, layer.mlp.norm)] + [model.norm]
        embed(self.draws.token, model.text, model.special, x, pdl=pdl)
        finish(x, norm=norms[0].weight, normed=normed, eps=norms[0].eps, pdl=pdl)
        at, entry = 1, 0
        for i, stack in enumerate(model.stacks):
            self._fill_turns(i)
            for j, layer in enumerate(stack.layers):
                u = self.u[layer.in_proj.shape[0]]
                if isinstance(layer, MambaLayer):
                    table = self.tables[entry]
                    product(normed, layer.in_proj, u, mixer=layer.rows, conv_table=table, alive=alive, pdl=pdl)
                else:
                    product(normed, layer.in_proj, u, pdl=pdl)
                entry = self._mix(i, layer, u, entry, 1)
                self._add(y, layer.out_proj, unit=False, norm=norms[at])
                mlp = layer.mlp
                h = self.h[mlp.gate.shape[0]]
                product(normed, mlp.gate, h, gated=mlp.up, pdl=pdl)
                self._add(h, mlp.down, unit=stack.unit and j == len(stack.layers) - 1, norm=norms[at + 1])
                at += 2
        product(normed, model.head, self.logits, pdl=pdl)

    def _add(self, y: Tensor, weight: Weight, *, unit: bool, norm: Norm) -> None:
        """x += W y, and `normed` after it."""
        parts = self.parts[gemm_shape(weight, self.device, split=True).splits]
        product(y, weight, parts, pdl=self.pdl)
        given: dict[str, Any] = {"norm": norm.weight, "normed": self.normed, "eps": norm.eps}
        finish(self.x, parts=parts, unit=unit, **given, pdl=self.pdl)

    def _fill_turns(self, stack: int) -> None:
        turns = self.turns[stack]
        if turns is not None:
            fill_turns(turns, self.draws.seqlens[stack], pdl=self.pdl)

    def _mix(self, stack: int, layer: MambaLayer | AttentionLayer, u: Tensor, entry: int, y_phases: int) -> int:
        """From projected rows to those before the output projection; returns the next layer's entry in the tables."""
        alive = self.draws.alive
        common: dict[str, Any] = {"num_kv_heads": layer.num_kv_heads, "out_phases": y_phases, "pdl": self.pdl}
        if isinstance(layer, MambaLayer):
            step(u, layer.A, layer.gate_norm, self.tables[entry + 1], alive, self.y, eps=layer.eps, **common)
            return entry + 2
        turns, partial = self.turns[stack], self.partial[stack]
        assert turns is not None and partial is not None  # noqa: PT018 (for the type checker)
        keys, values, capacities = self.tables[entry : entry + 3]
        seqlens = self.draws.seqlens[stack]
        attention(u, turns, keys, values, capacities, seqlens, alive, partial, self.y, **common)
        return entry + 3


def num_entries(model: ModelLayers) -> int:
    """Entries of a workspace's tables."""
    return sum(2 if isinstance(layer, MambaLayer) else 3 for layer in model.layers)


def phases_of(weight: Weight) -> int:
    """Phases of an activation that this weight alone reads."""
    phases = PHASES[weight.kind]
    return phases if weight.shape[1] % phases == 0 else 1


def inv_freq(stack: StackLayers, total_seqlen: int) -> Tensor:
    """Rotary frequencies of a stack for a sequence of `total_seqlen` tokens, (head_dim / 2,) float32, on the CPU."""
    rotary = stack.rotary
    assert rotary is not None, "the stack has attention"
    exponent = torch.arange(0, rotary.head_dim, 2, dtype=torch.float32) / rotary.head_dim
    return rotary.base(total_seqlen) ** -exponent
