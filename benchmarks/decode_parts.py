"""Where the time of a decoded token goes: each kind of launch alone, over the weights of all layers in turn, and the
kernels of its products over the shapes of their grids. Used by `benchmarks.gpu_check`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
import triton

from benchmarks import full_size, report
from benchmarks.decode_cuda import state_at, step_times_ms
from benchmarks.full_size import SCHEMES, Scheme, config_of, free_memory
from mmmamba.decoder.layers import MambaLayer, ModelLayers, gather
from mmmamba.decoder.session import Binding
from mmmamba.decoder.workspace import Workspace, phases_of
from mmmamba.kernels.gemm import GemmShape, gemm_shape, product
from mmmamba.kernels.gemv import project
from mmmamba.kernels.launch import GemvShape, gemv_shape
from mmmamba.kernels.sampler import DrawKind, draw_tokens
from mmmamba.kernels.step import step
from mmmamba.kernels.weights import Weight

Launches = Callable[[GemvShape | None], None]
REPLAYS = 30


class Parts:
    """The launches of one token of a linear model, by kind."""

    def __init__(self, scheme: Scheme, rows: int = 1) -> None:
        self.device = torch.device("cuda")
        model = full_size.random_model(config_of("linear"), self.device, scheme)
        self.layers: ModelLayers = gather(model)
        self.space = Workspace(self.layers, rows, self.device)
        self.state = state_at(model, rows, 1000, room=0)
        Binding(self.space, [self.state]).make_room()
        self.space.draws.alive.fill_(1)
        for t in (self.space.x, self.space.y, *self.space.u.values(), *self.space.h.values()):
            t.normal_()
        self.mamba = [layer for layer in self.layers.layers if isinstance(layer, MambaLayer)]

    def launches(self) -> dict[str, tuple[Launches, int, int, Weight | None]]:
        """Name -> (what launches it for all layers, how often, bytes that each must move, a weight)."""
        space, layers, phases = self.space, self.mamba, self.layers.phases
        x, y, alive, pdl = space.x, space.y, space.draws.alive, space.pdl
        one = layers[0]
        u, h = space.u[one.in_proj.shape[0]], space.h[one.mlp.gate.shape[0]]
        stream: dict[str, Any] = {"x_phases": phases, "pdl": pdl}

        def in_proj(shape: GemvShape | None) -> None:
            for i, layer in enumerate(layers):
                rows: dict[str, Any] = {"mixer": layer.rows, "conv_table": space.tables[2 * i], "alive": alive}
                norm: dict[str, Any] = {"norm": layer.norm.phased, "eps": layer.norm.eps}
                project(x, layer.in_proj, u, **norm, **rows, **stream, shape=shape)

        def recurrence(shape: GemvShape | None) -> None:
            for i, layer in enumerate(layers):
                given: dict[str, Any] = {"num_kv_heads": layer.num_kv_heads, "eps": layer.eps, "pdl": pdl}
                given["out_phases"] = phases_of(layer.out_proj)
                step(u, layer.A, layer.gate_norm, space.tables[2 * i + 1], alive, y, **given)

        def out_proj(shape: GemvShape | None) -> None:
            for layer in layers:
                given: dict[str, Any] = {"x_phases": phases_of(layer.out_proj), "out_phases": phases, "pdl": pdl}
                project(y, layer.out_proj, x, residual=True, **given, shape=shape)

        def gate_up(shape: GemvShape | None) -> None:
            for layer in layers:
                mlp = layer.mlp
                given: dict[str, Any] = {"norm": mlp.norm.phased, "eps": mlp.norm.eps, "gated": mlp.up, **stream}
                project(x, mlp.gate, h, out_phases=phases_of(mlp.down), **given, shape=shape)

        def down(shape: GemvShape | None) -> None:
            for layer in layers:
                given: dict[str, Any] = {"x_phases": phases_of(layer.mlp.down), "out_phases": phases, "pdl": pdl}
                project(h, layer.mlp.down, x, residual=True, **given, shape=shape)

        def head(shape: GemvShape | None) -> None:
            norm = self.layers.norm
            project(x, self.layers.head, space.logits, norm=norm.phased, eps=norm.eps, **stream, shape=shape)

        def greedy(shape: GemvShape | None) -> None:
            draw_tokens(space.logits, space.draws, DrawKind(), pdl=pdl)

        def nucleus(shape: GemvShape | None) -> None:
            draw_tokens(space.logits, space.draws, DrawKind(greedy=False, top_p=True), pdl=pdl)

        def token(shape: GemvShape | None) -> None:
            space.launch(DrawKind())

        n, mlp = len(layers), one.mlp
        state = self.state.language.layers[0].tensors()["ssm_state"].nbytes
        whole = sum(w.nbytes for layer in layers for w in (layer.in_proj, layer.out_proj, *_mlp(layer)))
        whole += 2 * n * state + self.layers.head.nbytes
        logits = space.logits.nbytes
        return {
            "in_proj": (in_proj, n, one.in_proj.nbytes, one.in_proj),
            "recurrence": (recurrence, n, 2 * state, None),
            "out_proj": (out_proj, n, one.out_proj.nbytes, one.out_proj),
            "gate_up": (gate_up, n, mlp.gate.nbytes + mlp.up.nbytes, mlp.gate),
            "down": (down, n, mlp.down.nbytes, mlp.down),
            "head": (head, 1, self.layers.head.nbytes, self.layers.head),
            "greedy": (greedy, 1, logits, None),
            "top_p": (nucleus, 1, logits, None),
            "token": (token, 1, whole, None),
        }

    def products(self) -> dict[str, tuple[Callable[[GemmShape], None], int, Weight, int, GemmShape]]:
        """Of many rows: name -> (what launches it for all layers, how often, a weight, its bytes, its shape now)."""
        space, layers = self.space, self.mamba
        pdl, one = space.pdl, layers[0]
        u, h = space.u[one.in_proj.shape[0]], space.h[one.mlp.gate.shape[0]]
        adding = {id(w): gemm_shape(w, self.device, split=True) for w in (one.out_proj, one.mlp.down)}

        def in_proj(shape: GemmShape) -> None:
            for i, layer in enumerate(layers):
                rows: dict[str, Any] = {"mixer": layer.rows, "conv_table": space.tables[2 * i]}
                product(space.normed, layer.in_proj, u, **rows, alive=space.draws.alive, shape=shape, pdl=pdl)

        def out_proj(shape: GemmShape) -> None:
            for layer in layers:
                product(space.y, layer.out_proj, space.parts[shape.splits], shape=shape, pdl=pdl)

        def gate_up(shape: GemmShape) -> None:
            for layer in layers:
                product(space.normed, layer.mlp.gate, h, gated=layer.mlp.up, shape=shape, pdl=pdl)

        def down(shape: GemmShape) -> None:
            for layer in layers:
                product(h, layer.mlp.down, space.parts[shape.splits], shape=shape, pdl=pdl)

        n, mlp = len(layers), one.mlp
        pair = mlp.gate.nbytes + mlp.up.nbytes
        return {
            "gate_up": (gate_up, n, mlp.gate, pair, gemm_shape(mlp.gate, self.device, tiles=2)),
            "down": (down, n, mlp.down, mlp.down.nbytes, adding[id(mlp.down)]),
            "in_proj": (in_proj, n, one.in_proj, one.in_proj.nbytes, gemm_shape(one.in_proj, self.device)),
            "out_proj": (out_proj, n, one.out_proj, one.out_proj.nbytes, adding[id(one.out_proj)]),
        }


def _mlp(layer: MambaLayer) -> tuple[Weight, ...]:
    return layer.mlp.gate, layer.mlp.up, layer.mlp.down


def graph_ms(launch: Callable[[], None]) -> float:
    """Median time of a replay of what `launch` launches."""
    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    return report.spread(step_times_ms(graph.replay, REPLAYS))[1]


def parts(bandwidth: float) -> Iterator[dict[str, Any]]:
    """Times and floors of all launches, a scheme after the other."""
    for scheme in SCHEMES:
        timed = Parts(scheme)
        for name, (launches, count, num_bytes, _) in timed.launches().items():
            us = 1e3 * graph_ms(lambda launches=launches: launches(None)) / count  # type: ignore[misc]
            floor_us = 1e6 * num_bytes / bandwidth
            yield {"scheme": scheme, "part": name, "us": us, "floor_us": floor_us, "share": floor_us / us}
        del timed
        free_memory()


def shapes(bandwidth: float, enough: Callable[[], bool]) -> Iterator[dict[str, Any]]:
    """Times of the products with other rows a program and other numbers of warps; ends when there is `enough`."""
    for scheme in SCHEMES:
        timed = Parts(scheme)
        for name, (launches, count, num_bytes, weight) in timed.launches().items():
            if weight is None:
                continue
            default = gemv_shape(weight, timed.device, tiles=2 if name == "gate_up" else 1)
            candidates = [default]
            for block_n in (1, 2, 4, 8, 16):
                for warps in {default.num_warps, max(1, default.num_warps // 2), min(16, default.num_warps * 2)}:
                    candidates.append(GemvShape(block_n, default.block_w, warps))
            for shape in dict.fromkeys(candidates):
                if enough():
                    return
                us = 1e3 * graph_ms(lambda f=launches, s=shape: f(s)) / count  # type: ignore[misc]
                share = 1e6 * num_bytes / bandwidth / us
                tried = {"block_n": shape.block_n, "warps": shape.num_warps, "default": shape == default}
                yield {"scheme": scheme, "part": name, **tried, "us": us, "share": share}
        del timed
        free_memory()


def many_shapes(bandwidth: float, rows: int, enough: Callable[[], bool]) -> Iterator[dict[str, Any]]:
    """The same for products of many rows at once: other tiles, warps and tiles in flight."""
    for scheme in reversed(SCHEMES):
        timed = Parts(scheme, rows)
        for name, (launches, count, weight, num_bytes, shape) in timed.products().items():
            grouped = weight.kind != "dense" and weight.group_size != weight.shape[1]
            blocks = ((32, 64), (64, 64), (64, 128), (32, 128)) if grouped else ((32, 128), (64, 64), (64, 128))
            options = [(n, k, warps, 4) for n, k in blocks for warps in (4, 8)]
            tried = [shape, *(GemmShape(n, k, shape.splits, warps, stages) for n, k, warps, stages in options)]
            for candidate in dict.fromkeys(tried):
                if enough():
                    return
                try:
                    us = 1e3 * graph_ms(lambda f=launches, s=candidate: f(s)) / count  # type: ignore[misc]
                except (RuntimeError, triton.runtime.errors.OutOfResources):  # more shared memory than there is
                    continue
                share = 1e6 * num_bytes / bandwidth / us
                default = candidate == shape
                yield {
                    "scheme": scheme,
                    "part": name,
                    **asdict(candidate),
                    "default": default,
                    "us": us,
                    "share": share,
                }
        del timed
        free_memory()
