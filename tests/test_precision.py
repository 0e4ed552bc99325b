"""What weights are held in: chosen by name, by what suits model and machine, alike for those that are compared."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from app import precision
from app.backend import MMMambaBackend, load_backend
from app.chat import Chat
from app.compare import Compare
from app.engine import Engine, EngineError, Settings
from app.models import MemoryNeed, Models, memory_need
from app.precision import PRECISIONS, SCHEMES, default_precision, offered, refusal
from mmmamba import load_model
from mmmamba.checkpoint import read_config, resolve_checkpoint
from mmmamba.cost import weight_bytes
from mmmamba.place import default_dtype
from quantize import save_quantized
from quantize.ahead import kept_by, loaded_bytes, stored_scheme
from quantize.linear import PackedLinear
from quantize.torch_products import torch_product
from tests.fakes import FakeLoader

CPU = torch.device("cpu")
DTYPE = str(default_dtype(CPU)).removeprefix("torch.")
NAMES = ("linear", "hybrid", "teacher")
GREEDY = Settings(greedy=True, max_new_tokens=6)


@pytest.fixture(autouse=True)
def compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with a C compiler, whatever this one has."""
    monkeypatch.setattr("mmmamba.kernels.native.load_native", lambda: (object(), ""))
    precision._say.cache_clear()


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmmamba.kernels.native.load_native", lambda: (None, "there is no C compiler"))


def last(replies: Any) -> Any:
    return list(replies)[-1]


def quietly(fraction: float, what: str) -> None:
    pass


# What auto means


def test_weights_stored_in_4_bits_stay_so_on_a_cpu(bundle_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    names = [str(bundle_dir / name) for name in NAMES]
    assert [default_precision(names[i:], CPU) for i in range(3)] == ["int4"] * 3
    assert default_precision(names[:1], CPU) == "int4"
    assert len([r for r in caplog.records if "nothing is lost" in r.getMessage()]) == 3, "it is said once a model"


def test_nano_and_its_teacher_are_stored_so() -> None:
    assert default_precision(["nano", "nano-teacher"], CPU) == "int4"
    assert not kept_by(resolve_checkpoint("nano"), "int8"), "int8 would round 4 bits into others"


def test_without_a_compiler_it_is_as_before_and_said_once(
    bundle_dir: Path, no_compiler: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for _ in range(3):
        assert default_precision([str(bundle_dir / "linear")], CPU) == DTYPE
    said = [r.getMessage() for r in caplog.records if r.name == "app.precision"]
    assert said == [f"precision: {DTYPE} rather than int4: there is no C compiler"]


def test_weights_that_would_be_rounded_are_not(tiny_dir: Path, bundle_dir: Path) -> None:
    assert default_precision([str(tiny_dir)], CPU) == DTYPE
    both = [str(bundle_dir / "linear"), str(tiny_dir)]
    assert default_precision(both, CPU) == DTYPE, "teacher and student are loaded alike"
    assert default_precision(both[::-1], CPU) == DTYPE
    absent = [str(bundle_dir / "linear"), "/nowhere/teacher"]
    assert default_precision(absent, CPU) == "int4", "what cannot be loaded at all decides nothing"


def test_a_gpu_takes_16_bits(bundle_dir: Path) -> None:
    assert default_precision([str(bundle_dir / "linear")], torch.device("cuda")) == "bfloat16"


def test_a_quantized_checkpoint_decides_for_its_teacher_too(bundle_dir: Path, tmp_path: Path, tiny_dir: Path) -> None:
    save_quantized(load_model(bundle_dir / "linear", quantize="int8"), tmp_path / "linear8")
    names = [str(tmp_path / "linear8"), str(bundle_dir / "teacher")]
    assert stored_scheme(tmp_path / "linear8") == "int8"
    assert default_precision(names, CPU) == "int8"
    engine = Engine(names[0], "cpu")
    engine.models.together = tuple(names)
    assert {engine.models.get(name).info.precision for name in names} == {"int8"}


# What is loaded


@pytest.mark.parametrize("name", NAMES)
def test_int4_is_the_weights_as_they_are_stored(bundle_dir: Path, name: str) -> None:
    """The same that is unpacked for float32: nothing is lost."""
    weights = []
    for how in ("int4", "float32"):
        backend = load_backend(str(bundle_dir / name), "cpu", how, quietly)
        assert isinstance(backend, MMMambaBackend)
        assert (backend.info.precision, backend.model.scheme) == (how, "int4" if how == "int4" else None)
        weights.append(unpacked(backend))
    assert weights[0].keys() == weights[1].keys()
    for parameter, tensor in weights[0].items():
        assert torch.allclose(tensor, weights[1][parameter], rtol=0, atol=1e-7), parameter


def unpacked(backend: MMMambaBackend) -> dict[str, torch.Tensor]:
    """The weights of all linear layers."""
    found = {}
    for name, module in backend.model.named_modules():
        if hasattr(module, "weight_as"):
            found[name] = module.weight_as(torch.float32)
        elif isinstance(module, torch.nn.Linear | torch.nn.Embedding) and "stem" not in name:
            found["embedding.text.table" if name == "embedding.text" else name] = module.weight.float()
    # The table is the output head too.
    return {name: tensor for name, tensor in found.items() if name != "language.output" and "special" not in name}


def test_those_compared_are_alike_and_what_they_share_is_held_once(bundle_dir: Path) -> None:
    names = tuple(str(bundle_dir / name) for name in NAMES)
    engine = Engine(names[0], "cpu")
    engine.models.together = names
    final = last(Compare(engine, names).ask("Hi", (), GREEDY))
    assert [side.stage for side in final.sides] == ["done"] * 3
    assert [side.precision for side in final.sides] == ["int4"] * 3
    assert [side.kind for side in final.sides] == list(NAMES)
    assert set(final.agreements) == {"linear", "hybrid"}
    linear, hybrid, teacher = (dict(engine.models.get(name).model.named_buffers()) for name in names)
    for path in ("language.layers.0.mlp.w1.qweight", "language.layers.0.mlp.w1.scales", "embedding.text.table.qweight"):
        assert linear[path].data_ptr() == teacher[path].data_ptr() == hybrid[path].data_ptr(), path
    attention = "language.layers.0.mixer.in_proj.qweight"
    assert hybrid[attention].data_ptr() == teacher[attention].data_ptr()
    assert linear[attention].data_ptr() != teacher[attention].data_ptr()
    # A hybrid has both: a state that stays, and a cache that grows.
    figures = [side.figures for side in final.sides]
    assert figures[0].cache_bytes == 0 < figures[1].cache_bytes < figures[2].cache_bytes
    assert figures[0].recurrent_bytes > figures[1].recurrent_bytes > figures[2].recurrent_bytes == 0


def test_states_of_another_precision_are_not_taken_for_ours(bundle_dir: Path) -> None:
    keys = {load_backend(str(bundle_dir / "linear"), "cpu", how, quietly).key for how in ("int4", "int8", "float32")}
    assert len(keys) == 3


def test_auto_and_its_meaning_are_one_model(bundle_dir: Path) -> None:
    engine = Engine(str(bundle_dir / "linear"), "cpu")
    assert engine.info is None
    backend = engine.models.get()
    assert engine.models.current is backend
    assert engine.models.get(precision="int4") is backend
    last(engine.switch(engine.model, "int4"))
    assert engine.models.current is backend


# Switching


def test_switching_the_precision_lets_the_old_weights_go(bundle_dir: Path) -> None:
    names = tuple(str(bundle_dir / name) for name in NAMES)
    engine, chat = Engine(names[0], "cpu"), Chat()
    engine.models.together = names
    first = last(engine.reply(chat, "Hi", settings=GREEDY))
    engine.models.get(names[2])
    assert engine.info.precision == "int4"
    last(engine.switch(names[0], "float32"))
    assert engine.info.precision == "float32"
    assert list(engine.models._loaded) == [(names[0], "float32")], "the teacher of before is still held"
    again = last(engine.reply(chat, "And?", settings=GREEDY))
    assert again.metrics.resumed.reread == 1, "a state of other weights was taken"
    assert first.text
    assert engine.models.get(names[2]).info.precision == "float32"


def test_the_old_model_stays_where_a_precision_cannot_be_had(bundle_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(str(bundle_dir / "linear"), "cpu")
    before = engine.models.get()
    monkeypatch.setattr("app.precision.find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r"^bnb-nf4 needs the package bitsandbytes .*int8 and int4 need nothing\.$"):
        last(engine.switch(engine.model, "bnb-nf4"))
    assert engine.models.current is before
    assert engine.status.stage == "ready"
    assert "bnb-nf4" not in {name for _, name in offered("cpu")}


def test_the_old_model_stays_where_quantized_weights_do_not_fit(bundle_dir: Path) -> None:
    def need(model: str, device: str, how: str) -> MemoryNeed:
        return MemoryNeed(2**30, 2**29 if how == "int8" else 2**31, how)

    engine = Engine(str(bundle_dir / "linear"), "cpu", need=need)
    before = engine.models.get()
    with pytest.raises(
        EngineError, match=r"needs 1.0 GiB of memory for weights in int8, 512 MiB are free: it does not"
    ):
        last(engine.switch(engine.model, "int8"))
    assert engine.models.current is before
    assert engine.models.precision == "auto"


def test_stored_weights_are_not_rounded_again(bundle_dir: Path, tmp_path: Path) -> None:
    save_quantized(load_model(bundle_dir / "linear", quantize="int8"), tmp_path / "linear8")
    engine = Engine(str(bundle_dir / "linear"), "cpu")
    before = engine.models.get()
    with pytest.raises(EngineError, match="holds int8 weights already, int4 would round them again"):
        last(engine.switch(str(tmp_path / "linear8"), "int4"))
    assert engine.models.current is before


def test_need_is_said_while_loading() -> None:
    notes = []
    models: Models

    def loader(*args: Any) -> Any:
        notes.append(models.status.note)
        return FakeLoader()(*args)

    models = Models("fake", "cpu", "int8", loader, lambda *_: MemoryNeed(2**28, 2**33, "int8"))
    models.get()
    assert notes == ["needs 256 MiB of memory for weights in int8, 8.0 GiB are free"]


# Memory needed


@pytest.mark.parametrize("scheme", [None, "int8", "int4"])
@pytest.mark.parametrize("name", NAMES)
def test_bytes_told_ahead_are_those_that_are_held(bundle_dir: Path, name: str, scheme: str | None) -> None:
    directory = bundle_dir / name
    held = weight_bytes(load_model(directory, dtype=torch.bfloat16, quantize=scheme)).total
    told = loaded_bytes(read_config(directory), scheme, torch.bfloat16)
    assert told == pytest.approx(held, rel=0.02)


@pytest.mark.parametrize("scheme", ["bnb-int8", "bnb-nf4"])
def test_bytes_of_bitsandbytes_told_ahead(bundle_dir: Path, scheme: str) -> None:
    pytest.importorskip("bitsandbytes")
    held = weight_bytes(load_model(bundle_dir / "linear", dtype=torch.bfloat16, quantize=scheme)).total
    told = loaded_bytes(read_config(bundle_dir / "linear"), scheme, torch.bfloat16)
    assert held <= told < 1.15 * held, "`weight_bytes` does not see its scales"


def test_need_knows_how_a_checkpoint_is_stored(bundle_dir: Path, tmp_path: Path) -> None:
    linear = str(bundle_dir / "linear")
    needs = {how: memory_need(linear, "cpu", how) for how in PRECISIONS if not how.startswith("bnb-")}
    assert needs["auto"].needed_bytes == needs["int4"].needed_bytes
    assert needs["int4"].needed_bytes < needs["int8"].needed_bytes < needs["bfloat16"].needed_bytes
    assert needs["bfloat16"].needed_bytes < needs["float32"].needed_bytes
    assert "for weights in int4" in str(needs["auto"])
    save_quantized(load_model(linear, quantize="int8"), tmp_path / "linear8")
    for how in ("auto", "int8", "bfloat16"):
        stored = memory_need(str(tmp_path / "linear8"), "cpu", how)
        assert stored.precision == "int8"
        assert stored.needed_bytes == pytest.approx(needs["int8"].needed_bytes, rel=0.01)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_need_counts_the_copies_of_torchs_products(bundle_dir: Path, no_compiler: None, scheme: str) -> None:
    directory = bundle_dir / "linear"
    packed = [m for m in load_model(directory, quantize=scheme).modules() if isinstance(m, PackedLinear)]
    copies = sum(tensors_of(torch_product(m.packed_weight())) for m in set(packed))
    held = weight_bytes(load_model(directory, dtype=torch.bfloat16, quantize=scheme)).total
    told = loaded_bytes(read_config(directory), scheme, torch.bfloat16, in_c=False)
    assert told == pytest.approx(held + copies, rel=0.15)
    needs = [memory_need(str(directory), "cpu", how).needed_bytes for how in (scheme, "float32")]
    wide = loaded_bytes(read_config(directory), None, torch.float32)
    assert needs[0] - needs[1] == loaded_bytes(read_config(directory), scheme, default_dtype(CPU), in_c=False) - wide


def tensors_of(product: Any) -> int:
    """Bytes of what a product of `torch_products` holds."""
    parts = [cell.cell_contents for cell in product.__closure__]
    return sum(part.nbytes for part in parts if isinstance(part, torch.Tensor))


def test_what_a_device_cannot_run_is_refused_in_a_sentence() -> None:
    assert not any(refusal(how, "cpu") for how in PRECISIONS if how not in ("bnb-int8", "bnb-nf4"))
    assert refusal("bnb-nf4", "mps") == "bnb-nf4 runs on cpu and cuda, and the device is mps; choose int8 or int4."
    assert [name for _, name in offered("mps")] == [how for how in PRECISIONS if not how.startswith("bnb-")]
    assert [name for _, name in offered("cuda:1")][:4] == list(PRECISIONS[:4])
    assert set(SCHEMES) < set(PRECISIONS)


# The command


def test_a_machine_without_a_compiler_says_so_once(bundle_dir: Path, tmp_path: Path) -> None:
    script = (
        "import logging, sys\n"
        "from app.engine import Engine\n"
        "logging.basicConfig(level=logging.INFO)\n"
        "engine = Engine(sys.argv[1], 'cpu')\n"
        "for name in (sys.argv[1], sys.argv[2]):\n"
        "    print('loaded', engine.models.get(name).info.precision)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(bundle_dir / "linear"), str(bundle_dir / "linear")],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"PATH": str(tmp_path), "CC": "", "MMMAMBA_NATIVE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.splitlines() == [f"loaded {DTYPE}"] * 2
    told = [line for line in done.stderr.splitlines() if "precision: " in line]
    assert len(told) == 1
    assert f"{DTYPE} rather than int4: there is no C compiler" in told[0]
