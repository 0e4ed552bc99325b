"""Where the time of a decoded token goes: each kind of launch alone, over the weights of all layers in turn, and the
matrix-vector kernel over the shapes of its grid, and how much to ask for ahead. Used by `benchmarks.gpu_check`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks import full_size, report
from benchmarks.decode_cuda import state_at, step_times_ms
from benchmarks.full_size import SCHEMES, Scheme, config_of, free_memory
from mmmamba.decoder.layers import MambaLayer, ModelLayers, gather
from mmmamba.decoder.session import Binding
from mmmamba.decoder.workspace import Workspace, phases_of
from mmmamba.kernels.gemv import project
from mmmamba.kernels.launch import GemvShape, gemv_shape
from mmmamba.kernels.sampler import DrawKind, draw_tokens
from mmmamba.kernels.step import step
from mmmamba.kernels.weights import Weight

Launches = Callable[[GemvShape | None], None]
REPLAYS = 30


class Parts:
    """The launches of one token of a linear model at batch 1, by kind."""

    def __init__(self, scheme: Scheme) -> None:
        self.device = torch.device("cuda")
        model = full_size.random_model(config_of("linear"), self.device, scheme)
        self.layers: ModelLayers = gather(model)
        self.space = Workspace(self.layers, 1, self.device)
        self.state = state_at(model, 1, 1000, room=0)
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


def ahead(bandwidth: float, enough: Callable[[], bool]) -> Iterator[dict[str, Any]]:
    """Times of a whole token for numbers of bytes that a launch asks for ahead."""
    for scheme in SCHEMES:
        timed = Parts(scheme)
        launches, _, num_bytes, _ = timed.launches()["token"]
        for mib in (0, 2, 4, 8, 12, 16, 24):
            if enough():
                return
            timed.space.ahead_bytes = mib << 20
            us = 1e3 * graph_ms(lambda f=launches: f(None))  # type: ignore[misc]
            yield {"scheme": scheme, "ahead_mib": mib, "us": us, "share": 1e6 * num_bytes / bandwidth / us}
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
