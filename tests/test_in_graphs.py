"""What compiled graphs call: chosen before tracing, and nothing that computes wrong gradients there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mmmamba import kernels
from mmmamba.kernels import segment_attention, select_scan, select_segment_attention, ssd_scan
from mmmamba.kernels.chunked import ssd_scan_chunked
from mmmamba.kernels.segmented import attend_masked
from mmmamba.segments import Segments
from tests.helpers import TOLERANCE, assert_near
from tests.test_kernels import random_inputs


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing chosen before, and nothing left behind."""
    kept = dict(kernels._IN_GRAPHS), dict(kernels._ATTEND_IN_GRAPHS)
    tables: Any = kernels._IN_GRAPHS, kernels._ATTEND_IN_GRAPHS
    for table in tables:
        table.clear()
    select_scan.cache_clear()
    select_segment_attention.cache_clear()
    yield
    for table, before in zip(tables, kept, strict=True):
        table.clear()
        table.update(before)
    select_scan.cache_clear()
    select_segment_attention.cache_clear()
    torch.compiler.reset()


def gradients(scan: Any) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in random_inputs(40, 2, 1, batch=1).to(torch.float32)[:5]]
    y, _ = scan(*leaves)
    y.square().sum().backward()
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


@pytest.mark.parametrize("loader", ["none", "mamba_ssm"])
def test_what_is_no_operator_runs_outside_of_graphs(loader: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU whose Triton scan does not import, with a fake of mamba-ssm or without."""
    traced: list[bool] = []

    def watched(*args: Any, **options: Any) -> Any:
        traced.append(torch.compiler.is_compiling())
        return ssd_scan_chunked(*args, **options)

    missing = (None, "not here")
    found = (watched, "") if loader == "mamba_ssm" else missing
    loaders = {"triton": ("ours", lambda: missing), "mamba_ssm": ("theirs", lambda: found)}
    monkeypatch.setattr(kernels, "_LOADERS", loaders)
    monkeypatch.setattr(kernels, "ssd_scan_chunked", watched)
    assert select_scan("cuda", training=True) is watched
    # What a graph on the GPU would call, called by one on the CPU.
    kernels._IN_GRAPHS["cpu"] = kernels._IN_GRAPHS["cuda"]

    def run(*leaves: Tensor) -> Any:
        return ssd_scan(*(t * 1.0 for t in leaves))

    got = gradients(torch.compile(run, backend="eager", dynamic=False))
    assert traced == [False], "the scan was traced into the graph"
    for name, grad, want in zip(["x", "dt", "A", "B", "C"], got, gradients(ssd_scan_chunked), strict=True):
        assert_near(name, grad, want, TOLERANCE[torch.float32])


def test_nothing_is_chosen_while_tracing() -> None:
    with pytest.raises(RuntimeError, match=r'call select_scan\("cuda", training=True\) before compiling what trains'):
        kernels._to_train_in_graphs("cuda")
    assert kernels._to_train_in_graphs("cpu") is ssd_scan_chunked


def test_packed_attention_of_a_graph_is_the_one_chosen_before() -> None:
    called: list[bool] = []

    def watched(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        called.append(torch.compiler.is_compiling())
        return attend_masked(q, k, v, segments)

    q, k, v = (torch.randn(1, 2, 6, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    segments = Segments.of(torch.tensor([[0, 0, 1, 1, 1, 2]]))
    want = attend_masked(q, k, v, segments)
    plain = torch.compile(segment_attention, backend="eager", fullgraph=True, dynamic=False)
    assert_near("y", plain(q, k, v, segments), want, TOLERANCE[torch.float32])
    assert not called
    torch.compiler.reset()
    kernels._ATTEND_IN_GRAPHS["cpu", False] = watched
    assert_near("y", plain(q, k, v, segments), want, TOLERANCE[torch.float32])
    assert called == [True]


def test_flash_attention_is_a_part_of_the_graph() -> None:
    """As a teacher's attention on a GPU is traced; what the graph computes cannot run here."""
    pytest.importorskip("torch.nn.attention.varlen")
    kernels._ATTEND_IN_GRAPHS["cpu", True] = select_segment_attention("cuda", True)
    assert kernels._ATTEND_IN_GRAPHS["cpu", True] is not attend_masked
    seen: list[str] = []

    def backend(graph: Any, _: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return lambda *_: (torch.zeros(1, 2, 6, 8, dtype=torch.bfloat16),)

    q, k, v = (torch.zeros(1, heads, 6, 8, dtype=torch.bfloat16) for heads in (2, 1, 1))
    compiled = torch.compile(segment_attention, backend=backend, fullgraph=True, dynamic=False)
    compiled(q, k, v, Segments.of(torch.tensor([[0, 0, 1, 1, 1, 2]]), 8))
    assert [name for name in seen if "varlen" in name] == ["torch_attn._varlen_attn"]


def test_choosing_flash_attention_tells_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "load_varlen", lambda: (attend_masked, ""))
    assert select_segment_attention("cuda", True) is attend_masked
    assert {("cuda", True): attend_masked} == kernels._ATTEND_IN_GRAPHS
    select_segment_attention("cuda", False)
    assert {("cuda", True): attend_masked} == kernels._ATTEND_IN_GRAPHS
