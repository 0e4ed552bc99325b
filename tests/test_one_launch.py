"""The kernel that takes a token through all layers in one launch: on an emulated device."""

from __future__ import annotations

import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")  # what gathers a model's weights imports the other kernels

from mmmamba.decoder.layers import Unsupported
from mmmamba.decoder.one_launch import PIECE, WARPS, OneLaunch, fault_of
from mmmamba.kernels.whole_step import compile_step
from tests.one_launch import GROUP, Emulated, difference, model_of, packed

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
SMALL: dict[str, Any] = {"hidden": 256, "inner": 320, "heads": 2, "kv_heads": 1}
WIDE: dict[str, Any] = {"hidden": 512, "inner": 1024, "heads": 4, "kv_heads": 2}  # whole pieces in 4 bits
TOKENS = 3

# Kinds of the layers' weights and of the head's, with groups; rows, blocks, bytes of a piece; sizes.
CASES: dict[str, tuple[Any, ...]] = {
    "bf16": ("dense", "dense", None, 1, 3, 256, SMALL, True),
    "bf16, more blocks than tiles": ("dense", "dense", None, 1, 23, 256, SMALL, True),
    "bf16, 3 rows": ("dense", "dense", None, 3, 5, 256, SMALL, False),
    # An odd number of heads: one projected row is without a neighbour.
    "bf16, 2 rows, 3 heads": (
        "dense",
        "dense",
        None,
        2,
        4,
        256,
        SMALL | {"hidden": 192, "heads": 3, "kv_heads": 3},
        True,
    ),
    "int8": ("int8", "int8", None, 1, 3, 256, SMALL, True),
    "int8, 4 rows": ("int8", "dense", None, 4, 5, 256, SMALL, False),
    "int4": ("int4", "int8", None, 1, 3, 256, WIDE, True),
    "int4, 2 rows": ("int4", "int8", None, 2, 5, 256, WIDE, False),
    "8 bits in groups": ("dense", "int8", GROUP, 2, 3, 512, WIDE, False),
}


@needs_compiler
@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_logits_and_states_are_those_of_the_plain_path(case: str, tmp_path: Path) -> None:
    kind, head, group, rows, blocks, piece, sizes, unit = CASES[case]
    model = model_of(**sizes, unit=unit)
    layers = packed(model, kind, head, group)
    exact = model_of(**sizes, unit=unit).float()
    for mine, theirs in zip(exact.parameters(), model.parameters(), strict=True):
        mine.copy_(theirs)
    emulated = Emulated(model, layers, tmp_path, rows, blocks=blocks, piece=piece)
    plain, wide = model.new_state(rows), exact.new_state(rows)
    errors, allowed = [], []
    for i in range(TOKENS):
        ids = torch.tensor([(7 * i + 11 * row) % 80 for row in range(rows)])
        want = exact(ids[:, None], None, wide)[:, -1]
        rounded = model(ids[:, None], None, plain)[:, -1].float()
        errors.append(difference(emulated.step(ids, seed=i + 1), want))
        allowed.append(difference(rounded, want))
        assert emulated.one.fault == ""
    # The norm behind a state blows up what nearly cancels, of some tokens; a wrong kernel puts off all of them.
    assert statistics.median(mine / theirs for mine, theirs in zip(errors, allowed, strict=True)) <= 1.5
    assert min(errors) < 0.05
    for mine_stack, stack in zip(emulated.state.stacks, wide.stacks, strict=True):
        for mine, theirs in zip(mine_stack.layers, stack.layers, strict=True):
            assert difference(mine.ssm_state, theirs.ssm_state) < 0.05
            assert difference(mine.conv_state.float(), theirs.conv_state) < 0.05


@needs_compiler
@torch.inference_mode()
def test_the_order_in_which_warps_run_changes_nothing(tmp_path: Path) -> None:
    model = model_of(**SMALL, unit=True)
    layers = packed(model, "int8", "int8", None)
    ids = torch.tensor([5, 9])
    found = [Emulated(model, layers, tmp_path, 2, blocks=7, piece=256).step(ids, seed=seed) for seed in (1, 2, 3)]
    assert found[0].isfinite().all()
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@needs_compiler
@torch.inference_mode()
def test_rows_that_are_not_alive_keep_their_states(tmp_path: Path) -> None:
    model = model_of(**SMALL, unit=False)
    emulated = Emulated(model, packed(model, "dense", "dense", None), tmp_path, 2, blocks=3, piece=256)
    emulated.alive[1] = 0
    emulated.step(torch.tensor([5, 9]))
    layer = emulated.state.stacks[0].layers[0]
    assert layer.ssm_state[0].any()
    assert layer.conv_state[0].any()
    assert not layer.ssm_state[1].any()
    assert not layer.conv_state[1].any()


@needs_compiler
@torch.inference_mode()
def test_a_block_that_never_begins_ends_in_a_fault(tmp_path: Path) -> None:
    """Instead of a card that hangs; and later launches do nothing."""
    model = model_of(**SMALL, unit=False)
    layers = packed(model, "dense", "dense", None)
    emulated = Emulated(model, layers, tmp_path, 1, blocks=3, piece=256, PATIENCE=3000)
    emulated.step(torch.tensor([5]), absent=1)
    assert "waited in vain for x at in_proj of layer 0" in emulated.one.fault
    emulated.logits.fill_(7)
    assert bool((emulated.step(torch.tensor([5])) == 7).all())


@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("kinds", [(0, 0), (1, 1), (3, 1)])
def test_it_compiles_for_a_card(kinds: tuple[int, int], rows: int, tmp_path: Path, monkeypatch: Any) -> None:
    """No card is needed for that; the second time it comes from the cache."""
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc")
    try:
        nvrtc.nvrtcVersion()
    except RuntimeError as error:
        pytest.skip(f"no NVRTC: {error}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    defines = {"ROWS": rows, "WARPS": WARPS, "PIECE": PIECE, "LAYER_KIND": kinds[0], "HEAD_KIND": kinds[1]}
    code = compile_step((9, 0), defines)
    assert code[:4] == b"\x7fELF"
    monkeypatch.setattr(nvrtc, "nvrtcCompileProgram", None)
    assert compile_step((9, 0), defines) == code


def test_a_fault_in_words() -> None:
    assert fault_of(0) == ""
    code = (4095 - (2 + 5 * 3 + 4)) << 20 | 77 << 8 | 6
    assert fault_of(code) == f"block 77 waited in vain for the gated MLP at down of layer 3 ({code:#x})"


def test_what_cannot_be_decoded_says_why() -> None:
    model = model_of(**SMALL, unit=False)
    with pytest.raises(Unsupported, match="rows of 256 weights are no whole number of pieces"):
        OneLaunch(packed(model, "int4", "int8", None), 1, torch.device("cpu"), piece=1024, warps=8)
