"""Packed rows equal each sample alone: borders, attention, mixers and whole models, values and gradients."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.data.packing import PackedBatch, PackerState, Piece, RowShape, pack
from distill.inputs import hidden_states, prepare
from mmmamba.kernels import segment_attention, select_segment_attention
from mmmamba.mixer import Mamba2Mixer
from mmmamba.model import MMMamba
from mmmamba.segments import Segments
from tests.helpers import FIXTURES, FOLDERS, TOLERANCE, assert_near, golden_model
from tests.training import piece, student_of, teacher_of

IDS = torch.tensor([[0, 0, 0, 1, 2, 2], [4, 5, 5, 5, 5, 9]])
# With and without pictures, one or several tiles, a sample of one token, and one longer than the positions (128) beyond
# which `pre_ntk` scales its rotary base.
LAYOUTS = ([[3, -4, 5], [7], [2, -8, 3], [1]], [[150], [4, -4, 1, -8, 3]])


def test_borders() -> None:
    segments = Segments.of(IDS, max_segments=8)
    assert segments.ids.dtype == torch.int32
    assert segments.positions.tolist() == [[0, 1, 2, 0, 0, 1], [0, 0, 1, 2, 3, 0]]
    assert segments.lengths.tolist() == [[3, 3, 3, 1, 2, 2], [1, 4, 4, 4, 4, 1]]
    assert segments.cu_seqlens.tolist() == [0, 3, 4, 6, 7, 11, 12, 12, 12]
    assert Segments.of(IDS).cu_seqlens.tolist() == [0, 3, 4, 6, 7, 11, 12]
    mask = segments.mask()
    assert mask.shape == (2, 1, 6, 6)
    for row in range(2):
        for t in range(6):
            for s in range(6):
                assert mask[row, 0, t, s] == (s <= t and IDS[row, s] == IDS[row, t])


def test_what_borders_refuse() -> None:
    with pytest.raises(ValueError, match="segment ids fall along a row; number the samples of a row in order"):
        Segments.of(torch.tensor([[0, 1, 0]]))
    with pytest.raises(ValueError, match="the rows hold 6 segments, more than max_segments=5; raise it"):
        Segments.of(IDS, 5)
    with pytest.raises(ValueError, match=r"segment ids have shape \(3,\); use \(batch, seqlen\)"):
        Segments.of(torch.zeros(3))


# --- attention ---


def heads(num_heads: int, *, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(num_heads)
    shapes = ((2, num_heads, 6, 8), (2, 2, 6, 8), (2, 2, 6, 8))
    q, k, v = (torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes)
    return q, k, v


def attention_apart(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    rep = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(rep, dim=1) for t in (k, v))
    out = torch.zeros_like(q)
    for row in range(2):
        for segment in IDS[row].unique():
            at = IDS[row] == segment
            parts = (t[row : row + 1, :, at] for t in (q, k, v))
            out[row, :, at] = F.scaled_dot_product_attention(*parts, is_causal=True)[0]
    return out


@pytest.mark.parametrize("num_heads", [2, 6])
def test_attention_within_segments(num_heads: int) -> None:
    q, k, v = heads(num_heads)
    assert_near("y", segment_attention(q, k, v, Segments.of(IDS)), attention_apart(q, k, v), TOLERANCE[torch.float64])


@pytest.fixture
def fresh_choice() -> Iterator[None]:
    select_segment_attention.cache_clear()
    yield
    select_segment_attention.cache_clear()


def varlen_by_loop(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    window_size: tuple[int, int],
) -> Tensor:
    """torch's signature (without what only some versions have), played by plain attention."""
    return varlen_with_a_flag(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=window_size == (-1, 0))


def varlen_with_a_flag(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
) -> Tensor:
    assert query.dtype == key.dtype == value.dtype == torch.bfloat16
    assert query.shape == key.shape == value.shape, "not every version takes fewer kv heads"
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert is_causal
    out = torch.full_like(query, float("nan"))
    edges = cu_seq_q.tolist()
    for start, end in itertools.pairwise(edges):
        assert end - start <= max_q
        parts = (t[start:end].transpose(0, 1)[None] for t in (query, key, value))
        out[start:end] = F.scaled_dot_product_attention(*parts, is_causal=True)[0].transpose(0, 1)
    return out


def varlen_of_groups(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    window_size: tuple[int, int], enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """As torch has it later: groups of heads are taken as they are, once it is told so."""
    rep = query.shape[1] // key.shape[1]
    assert enable_gqa == (rep > 1)
    key, value = (t.repeat_interleave(rep, dim=1) for t in (key, value))
    return varlen_by_loop(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size=window_size)


@pytest.mark.usefixtures("fresh_choice")
@pytest.mark.parametrize("flash", [varlen_by_loop, varlen_with_a_flag, varlen_of_groups])
def test_rows_reach_flash_attention_in_its_terms(flash: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(varlen, "varlen_attn", flash)
    attend = select_segment_attention("cuda", True)
    q, k, v = heads(6)
    want = attention_apart(q, k, v)
    narrow = [t.bfloat16() for t in (q, k, v)]
    assert q.shape[1] > k.shape[1]
    assert_near("y", attend(*narrow, Segments.of(IDS, 9)), want, 2 * TOLERANCE[torch.bfloat16])
    with torch.autocast("cpu", torch.bfloat16):  # rotated in float32, as a mixer under autocast passes them
        y = attend(*(t.float() for t in (q, k, v)), Segments.of(IDS, 9))
    assert y.dtype == torch.bfloat16
    assert_near("y under autocast", y, want, 2 * TOLERANCE[torch.bfloat16])


@pytest.mark.usefixtures("fresh_choice")
def test_the_choice_of_attention(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    with caplog.at_level(logging.INFO, logger="mmmamba.kernels"):
        for _ in range(2):  # said once
            plain = select_segment_attention("cpu", True)
    assert caplog.messages == [
        "attention over packed rows: masked (device is cpu, narrow type; flash attention needs cuda and bf16)"
    ]
    assert select_segment_attention("cuda", False) is plain
    assert select_segment_attention("cuda", True, "masked") is plain
    q, k, v = heads(2)
    with pytest.raises(ValueError, match=r'impl "varlen" cannot run: device is cpu.*use "auto" or "masked"'):
        segment_attention(q, k, v, Segments.of(IDS), impl="varlen")
    with pytest.raises(ValueError, match='impl "flash" is not known; use "auto", "masked" or "varlen"'):
        segment_attention(q, k, v, Segments.of(IDS), impl="flash")  # type: ignore[arg-type]
    import sys

    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    select_segment_attention.cache_clear()
    assert select_segment_attention("cuda", True) is plain


# --- models ---


def pieces_of(layouts: Any) -> list[list[Piece]]:
    return [[piece(10 * row + i, layout, learned=1) for i, layout in enumerate(r)] for row, r in enumerate(layouts)]


def packed(model: MMMamba, pieces: list[list[Piece]], *, tiles: int | None = 4, seqlen: int = 180) -> PackedBatch:
    shape = RowShape.of(model.config, seqlen=seqlen, rows=len(pieces), tiles=tiles, pad_id=7)
    return pack(pieces, shape, PackerState())


def alone(model: MMMamba, sample: Piece) -> Tensor:
    shape = RowShape.of(model.config, seqlen=len(sample.input_ids), pad_id=7)
    batch = pack([[sample]], shape, PackerState())
    inputs = prepare(batch, model.config)
    return hidden_states(model, inputs._replace(segments=None))


def assert_packed_equals_alone(model: MMMamba, pieces: list[list[Piece]], batch: PackedBatch) -> None:
    hidden = hidden_states(model, prepare(batch, model.config))
    for row, samples in enumerate(pieces):
        start = 0
        for number, sample in enumerate(samples):
            end = start + len(sample.input_ids)
            got, want = hidden[row : row + 1, start:end], alone(model, sample)
            assert_near(f"sample {number} of row {row}", got, want, TOLERANCE[torch.float64])
            start = end


@pytest.mark.parametrize(("folder", "kind"), FIXTURES)
@torch.no_grad()
def test_packed_rows_equal_each_sample_alone(folder: str, kind: str) -> None:
    model = golden_model(folder, kind, torch.float64)
    pieces = pieces_of(LAYOUTS)
    assert_packed_equals_alone(model, pieces, packed(model, pieces))


@pytest.mark.parametrize("chunk_size", [3, 16, 512])
@torch.no_grad()
def test_whatever_the_chunks(chunk_size: int) -> None:
    teacher = teacher_of("post", torch.float64)
    model = student_of(teacher, "post").double()
    for module in model.modules():
        if isinstance(module, Mamba2Mixer):
            module.chunk_size = chunk_size
    pieces = pieces_of([[[3, -4, 5], [7], [2, -8, 3], [1]]])
    assert_packed_equals_alone(model, pieces, packed(model, pieces, tiles=None, seqlen=40))


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("kind", ["hovle", "hybrid"])
def test_gradients_of_packed_rows_are_the_samples_sum(folder: str, kind: str) -> None:
    model = teacher_of(folder, torch.float64)
    if kind == "hybrid":
        model = student_of(model, folder, kind).double()
    model.requires_grad_(True)
    pieces = pieces_of([[[3, -4, 5], [7]], [[2, -4, 3], [1]]])
    weights = torch.randn(model.config.language.hidden_size, dtype=torch.float64)

    def gradients() -> dict[str, Tensor]:
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        model.zero_grad()
        return found

    batch = packed(model, pieces, tiles=2, seqlen=30)
    hidden = hidden_states(model, prepare(batch, model.config))
    (hidden[batch.is_real].sin() @ weights).sum().backward()
    together = gradients()
    for sample in (s for row in pieces for s in row):
        (alone(model, sample).sin() @ weights).sum().backward()
    wanted = gradients()
    assert together.keys() == wanted.keys()
    for name in together:
        assert_near(f"gradient of {name}", together[name], wanted[name], 1e-9)


def test_a_change_in_one_sample_reaches_no_other() -> None:
    """Attention bit for bit. In a mixer log decays are summed over the whole chunk, so their rounding may differ."""
    for kind in ("hovle", "linear", "hybrid"):
        model = golden_model("post", kind)
        last = piece(3, [2, -4, 6])
        with torch.no_grad():
            one, two = (
                hidden_states(model, prepare(packed(model, [[first, last]], tiles=2, seqlen=30), model.config))
                for first in (piece(1, [3, -4, 5]), piece(2, [3, -4, 5]))
            )
        assert_near(kind, one[:, 12:24], two[:, 12:24], 0.0 if kind == "hovle" else 3e-6)
        assert not torch.equal(one[:, :12], two[:, :12])
