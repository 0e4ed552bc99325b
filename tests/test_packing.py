"""Compressed storage: bits there and back, rounding within half a step, and bundles that store what is shared once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill.convert import fuse_, make_student
from distill.rounding import rounded, storage_spec
from mmmamba.bundle import save_bundle
from mmmamba.checkpoint import CheckpointError, load_model
from mmmamba.model import MMMamba
from mmmamba.packing import (
    BITS,
    PackedSpec,
    PackedWeight,
    dequantize,
    pack,
    pack_bits,
    quantize,
    split_groups,
    unpack,
    unpack_bits,
)
from mmmamba.stored import INDEX, PACKED_METADATA
from tests.helpers import random_ids, random_model, random_tiles, tiny_raw

bits_of = pytest.mark.parametrize("bits", BITS)


def weights(shape: tuple[int, ...], kind: str = "normal") -> Tensor:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(len(kind)))
    if kind == "outliers":
        w[::3, 0] *= 50
    elif kind == "shifted":
        w = w * 0.01 + 3
    elif kind == "tiny":
        w = w * 1e-4
    elif kind == "one sign":
        w = w.abs()
    return w


# --- bits ---


@bits_of
def test_bits_there_and_back(bits: int) -> None:
    q = torch.arange(2**bits, dtype=torch.uint8).repeat(3)
    packed = pack_bits(q, bits)
    assert packed.dtype == torch.uint8
    assert packed.numel() * 8 == q.numel() * bits
    assert torch.equal(unpack_bits(packed, bits), q)


def test_the_layout_of_bits_is_fixed() -> None:
    """Files are written with it: four numbers of 6 bits from the low end, two of 4 bits low half first."""
    assert pack_bits(torch.tensor([1, 2, 15, 0], dtype=torch.uint8), 4).tolist() == [0x21, 0x0F]
    assert pack_bits(torch.tensor([1, 2, 3, 63], dtype=torch.uint8), 6).tolist() == [
        *(1 | 2 << 6 | 3 << 12 | 63 << 18).to_bytes(3, "little")
    ]
    assert pack_bits(torch.tensor([7, 255, 0, 1], dtype=torch.uint8), 8).tolist() == [7, 255, 0, 1]


@bits_of
def test_smaller_groups_hold_the_same_values(bits: int) -> None:
    spec = PackedSpec(bits, 96, (5, 192))
    weight = PackedWeight(*pack(weights(spec.shape, "outliers"), spec), spec)
    smaller = split_groups(weight, 32)
    assert smaller.spec.group_size == 32
    assert torch.equal(smaller.unpack(torch.float32), weight.unpack(torch.float32))
    with pytest.raises(ValueError, match="groups of 96 do not divide into groups of 64"):
        split_groups(weight, 64)


# --- rounding ---


@bits_of
@pytest.mark.parametrize("kind", ["normal", "outliers", "shifted", "tiny", "one sign"])
@pytest.mark.parametrize("group_size", [4, 32, 96])
def test_unpacked_weights_are_within_half_a_step(bits: int, kind: str, group_size: int) -> None:
    w = weights((7, 192), kind)
    spec = PackedSpec(bits, group_size, tuple(w.shape))
    qweight, scales, zeros = pack(w, spec)
    assert (qweight.dtype, scales.dtype, zeros.dtype) == (torch.uint8, torch.float16, torch.float16)
    assert qweight.numel() == w.numel() * bits // 8
    assert scales.shape == zeros.shape == (w.numel() // group_size,)
    back = unpack(qweight, scales, zeros, spec, torch.float32)
    assert back.shape == w.shape
    # Half a step, and what storing offset (once) and scale (2^bits - 1 times) in 11 binary digits may add.
    groups = w.view(-1, group_size)
    span = groups.amax(dim=1) - groups.amin(dim=1)
    slack = 2**-11 * (groups.abs().amax(dim=1) + span) + 2**bits * 2.0**-25
    allowed = (scales.float() / 2 + slack).repeat_interleave(group_size).view_as(w)
    excess = (back - w).abs() - allowed
    assert (excess <= 0).all(), f"{int((excess > 0).sum())} weights are off by up to {float(excess.max()):.2e} too much"
    # And the steps are as fine as the bits allow: nothing could hide behind a huge scale.
    assert (scales.float() <= 1.01 * (span + slack) / (2**bits - 1)).all()


@bits_of
@pytest.mark.parametrize("kind", ["normal", "outliers", "tiny", "one sign"])
def test_rounding_twice_is_rounding_once(bits: int, kind: str) -> None:
    w = weights((16, 128), kind)
    spec = PackedSpec(bits, 32, tuple(w.shape))
    once = rounded(w, spec)
    assert not torch.equal(once, w)
    assert torch.equal(rounded(once, spec), once)
    for a, b in zip(pack(w, spec), pack(once, spec), strict=True):
        assert torch.equal(a, b)


@bits_of
def test_equal_weights_and_zeros(bits: int) -> None:
    spec = PackedSpec(bits, 4, (3, 4))
    w = torch.stack([torch.zeros(4), torch.full((4,), 0.375), torch.full((4,), -1 / 3)])
    back = rounded(w, spec)
    assert torch.equal(back[:2], w[:2])
    assert (back[2] - w[2]).abs().max() < 2**-11
    assert torch.isfinite(back).all()


def test_more_bits_round_less() -> None:
    w = weights((32, 128))
    errors = [float((rounded(w, PackedSpec(bits, 32, (32, 128))) - w).square().mean()) for bits in BITS]
    assert errors[0] > 10 * errors[1] > 100 * errors[2] > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dequantizing_to_any_dtype(dtype: torch.dtype) -> None:
    """Computed wide and rounded once at the end."""
    w = weights((4, 64))
    spec = PackedSpec(6, 32, (4, 64))
    parts = quantize(w, spec)
    back = dequantize(*parts, spec, dtype)
    assert back.dtype == dtype
    q, scales, zeros = parts
    exact = (zeros.double()[:, None] + q.double() * scales.double()[:, None]).view(4, 64)
    assert torch.allclose(back.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize(
    ("bits", "group_size", "shape", "message"),
    [
        (5, 32, (4, 64), r"bits=5 is not supported; use one of \(4, 6, 8\)"),
        (4, 48, (4, 64), "group_size=48 does not divide rows of 64"),
        (4, 32, (4, 72), "group_size=32 does not divide rows of 72 .* use 32 or 64, or store the tensor whole"),
        (4, 6, (4, 36), "no multiple of 4"),
        (4, 128, (4, 64), "group_size=128 does not divide rows of 64"),
    ],
)
def test_odd_shapes_are_refused(bits: int, group_size: int, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PackedSpec(bits, group_size, shape)


# --- bundles ---


def small_spec(name: str, tensor: Tensor) -> PackedSpec | None:
    """Shapes of the tiny models: 4 bits in the layers, 6 in the embedding table, the rest whole."""
    if tensor.ndim != 2 or "stem" in name or tensor.shape[1] % 8:
        return None
    return PackedSpec(6 if name == "embedding.text.weight" else 4, 8, tuple(tensor.shape))


@pytest.fixture(scope="module")
def models() -> dict[str, MMMamba]:
    teacher = random_model(tiny_raw(teacher=True, language={"tie_word_embeddings": True}), dtype=torch.float32)
    linear = fuse_(make_student(teacher, ("mamba2",) * 3, ("mamba2",) * 2))
    return {"teacher": teacher, "linear": linear}


def test_a_bundle_loads_as_the_rounded_models(models: dict[str, MMMamba], tmp_path: Path) -> None:
    files = save_bundle(models, tmp_path, small_spec)
    assert [f.name for f in files] == ["teacher-01.safetensors", "linear-01.safetensors"]
    for name, model in models.items():
        assert sorted(p.name for p in (tmp_path / name).iterdir()) == ["config.json", INDEX]
        loaded = load_model(tmp_path / name)
        assert loaded.config == model.config
        for (ours, a), (_, b) in zip(loaded.named_parameters(), model.named_parameters(), strict=True):
            spec = small_spec(ours, b)
            wanted = b if spec is None else rounded(b, spec)
            assert torch.equal(a, wanted), f"{name}: {ours}"
        assert (loaded.language.output.weight is loaded.embedding.text.weight) is True


def test_shared_tensors_are_stored_once(models: dict[str, MMMamba], tmp_path: Path) -> None:
    teacher_only = save_bundle({"teacher": models["teacher"]}, tmp_path / "one", small_spec)
    both = save_bundle(models, tmp_path / "two", small_spec)
    maps = {name: json.loads((tmp_path / "two" / name / INDEX).read_text())["weight_map"] for name in models}
    shared = maps["teacher"].keys() & maps["linear"].keys()
    own = maps["linear"].keys() - maps["teacher"].keys()
    # Its own are the five tensors of each mixer but the output projection, and the fused projection.
    assert len(own) == 5 * 6
    assert {name.partition("attention.")[2].partition(".")[0] for name in own} == {
        "wvkqgdt",
        "conv1d",
        "A_log_bias",
        "dt_bias",
        "g_norm_swish_gate",
    }
    assert len(shared) == len(maps["linear"]) - len(own)
    names = [n for file in both for n in load_file(file)]
    assert len(names) == len(set(names))
    extra = sum(f.stat().st_size for f in both) - sum(f.stat().st_size for f in teacher_only)
    weights_of = {n: t for n, t in models["linear"].named_parameters() if ".mixer." in n and "out_proj" not in n}
    assert extra < sum(4 * t.numel() for t in weights_of.values()) + 10_000


def test_a_hybrid_keeps_the_teachers_softmax_layers(models: dict[str, MMMamba], tmp_path: Path) -> None:
    teacher = models["teacher"]
    hybrid = fuse_(make_student(teacher, ("mamba2", "mha", "mamba2"), ("mha", "mamba2")))
    save_bundle({"teacher": teacher, "hybrid": hybrid}, tmp_path, small_spec)
    maps = [json.loads((tmp_path / name / INDEX).read_text())["weight_map"] for name in ("teacher", "hybrid")]
    assert "language_model.model.layers.0.attention.wqkv.weight" in maps[1]
    assert len(maps[1].keys() - maps[0].keys()) == 3 * 6
    loaded = load_model(tmp_path / "hybrid")
    attention = load_model(tmp_path / "teacher").get_parameter("language.layers.0.mixer.in_proj.weight")
    assert torch.equal(loaded.get_parameter("language.layers.0.mixer.in_proj.weight"), attention)


def test_shards_stay_below_their_limit_and_large_tensors_are_split(models: dict[str, MMMamba], tmp_path: Path) -> None:
    limit = 4000
    files = save_bundle(models, tmp_path, small_spec, max_shard_bytes=limit)
    assert len(files) > 5
    stored = [name for file in files for name in load_file(file)]
    for file in files:
        assert sum(t.nbytes for t in load_file(file).values()) <= limit
    assert any("::1" in name for name in stored), "nothing was split; the test says nothing"
    save_bundle(models, tmp_path / "whole", small_spec)
    ids, tiles = random_ids(tiny_raw(), [3, -4, 5]), random_tiles(1)
    for name in models:
        cut, whole = load_model(tmp_path / name), load_model(tmp_path / "whole" / name)
        for (ours, a), (_, b) in zip(cut.named_parameters(), whole.named_parameters(), strict=True):
            assert torch.equal(a, b), ours
        assert torch.equal(cut(ids, tiles), whole(ids, tiles))


def test_a_tensor_that_cannot_be_split_is_refused(models: dict[str, MMMamba], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not fit shards of 50 bytes"):
        save_bundle({"teacher": models["teacher"]}, tmp_path, small_spec, max_shard_bytes=50)


def test_two_students_with_mixers_of_their_own(models: dict[str, MMMamba], tmp_path: Path) -> None:
    """Their tensors have the same names and different values."""
    teacher = models["teacher"]
    hybrid = fuse_(make_student(teacher, ("mamba2", "mha", "mamba2"), ("mha", "mamba2"), seed=9))
    three = models | {"hybrid": hybrid}
    before = {f.name: f.read_bytes() for f in save_bundle(models, tmp_path, small_spec)}
    files = save_bundle(three, tmp_path, small_spec)
    assert [f.name for f in files] == ["teacher-01.safetensors", "linear-01.safetensors", "hybrid-01.safetensors"]
    assert before == {f.name: f.read_bytes() for f in files[:2]}, "a model added later changed the files before it"
    name = "language.layers.1.mixer.dt_bias"
    assert not torch.equal(hybrid.get_parameter(name), models["linear"].get_parameter(name))
    for model_name, model in three.items():
        loaded = load_model(tmp_path / model_name)
        for (ours, a), (_, b) in zip(loaded.named_parameters(), model.named_parameters(), strict=True):
            spec = small_spec(ours, b)
            assert torch.equal(a, b if spec is None else rounded(b, spec)), f"{model_name}: {ours}"


def test_packed_weights_in_narrow_models(models: dict[str, MMMamba], tmp_path: Path) -> None:
    save_bundle({"linear": models["linear"]}, tmp_path, small_spec)
    narrow, wide = load_model(tmp_path / "linear", dtype=torch.bfloat16), load_model(tmp_path / "linear")
    for (name, a), (_, b) in zip(narrow.named_parameters(), wide.named_parameters(), strict=True):
        assert torch.equal(a, b.to(a.dtype)), name


def test_metadata_that_does_not_fit(models: dict[str, MMMamba], tmp_path: Path) -> None:
    """A packed tensor whose metadata were lost would be read as unknown names, and is refused by name."""
    [file] = save_bundle({"linear": models["linear"]}, tmp_path, small_spec)
    with safe_open(file, "pt") as f:
        metadata = json.loads(f.metadata()[PACKED_METADATA])
    name = "language_model.model.layers.0.feed_forward.w1.weight"
    assert metadata[name] == {"bits": 4, "group_size": 8, "shape": [32, 24]}
    save_file(load_file(file), file)
    with pytest.raises(CheckpointError, match=r"named in the index but in no file: .*feed_forward.w1.weight"):
        load_model(tmp_path / "linear")


def test_how_nano_is_stored() -> None:
    """4 bits in the layers, 6 in the table that is also the head, small and sensitive tensors whole."""

    def bits(name: str, *shape: int) -> int | None:
        spec = storage_spec(name, torch.empty(shape))
        return None if spec is None else spec.bits

    assert bits("embedding.text.weight", 49160, 576) == 6
    assert bits("language.layers.3.mlp.w1.weight", 1536, 576) == 4
    assert bits("language.layers.3.mlp.w2.weight", 576, 1536) == 4
    assert bits("language.layers.3.mixer.in_proj.weight", 1545, 576) == 4
    assert bits("language.layers.3.mixer.in_proj.vkq", 960, 576) == 4
    assert bits("language.layers.3.mixer.in_proj.gate_dt", 585, 576) == 4
    assert bits("language.layers.3.mixer.out_proj.weight", 576, 576) == 4
    assert bits("embedding.shuffle_proj.0.weight", 576, 2304) == 8
    assert bits("language.layers.3.mixer.conv.weight", 960, 1, 2) is None
    assert bits("language.layers.3.mixer.A_log", 9) is None
    assert bits("language.norm.weight", 576) is None
    assert bits("embedding.stem.position_embedding", 1, 257, 576) is None


def test_splitting_a_projection_by_rows_rounds_the_same() -> None:
    """Stages train V, K, Q and gate apart; the file holds them fused."""
    w = weights((40, 64))
    whole = rounded(w, PackedSpec(4, 64, (40, 64)))
    parts = [rounded(part, PackedSpec(4, 64, tuple(part.shape))) for part in w.split([30, 10])]
    assert torch.equal(torch.cat(parts), whole)
