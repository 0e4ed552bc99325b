"""Checkpoints: strict reading with every problem named, nothing but safetensors, and writing what was read."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmmamba import checkpoint
from mmmamba.checkpoint import CheckpointError, load_model, save_model
from mmmamba.config import ConfigError
from mmmamba.keymap import UNUSED, from_published, to_published
from mmmamba.model import MMMamba
from mmmamba.stored import INDEX
from tests.helpers import FIXTURES, GOLDEN, golden_config, golden_model, random_ids, random_model, tiny_raw

WEIGHTS = "model.safetensors"
HEAD = "language_model.output.weight"
WQKV = "language_model.model.layers.0.attention.wqkv.weight"


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[str, str], Path]:
    """A fixture's directory to spoil."""

    def make(folder: str = "post", kind: str = "hybrid") -> Path:
        shutil.copytree(GOLDEN / folder / kind, tmp_path / kind)
        return tmp_path / kind

    return make


Copy = Callable[..., Path]


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a checkpoint of one file."""
    tensors = load_file(directory / WEIGHTS)
    tensors = {name: t.clone() for name, t in tensors.items()}
    change(tensors)
    save_file(tensors, directory / WEIGHTS)


def shard(directory: Path, files: int = 3) -> dict[str, str]:
    """Replace the one file by several with an index; returns the weight map."""
    tensors = load_file(directory / WEIGHTS)
    weight_map = {name: f"model-{i % files + 1:05d}-of-{files:05d}.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name].clone() for name in tensors if weight_map[name] == file}, directory / file)
    (directory / WEIGHTS).unlink()
    write_index(directory, weight_map)
    return weight_map


def write_index(directory: Path, weight_map: object) -> None:
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def tensors_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters())


def assert_equal_models(a: torch.nn.Module, b: torch.nn.Module) -> None:
    first, second = tensors_of(a), tensors_of(b)
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype, name
        assert torch.equal(first[name], second[name]), name


# --- there and back ---


@pytest.mark.parametrize(("folder", "kind"), FIXTURES)
def test_load_save_load_is_bit_equal(folder: str, kind: str, tmp_path: Path) -> None:
    model = golden_model(folder, kind)
    save_model(model, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", WEIGHTS]
    again = load_model(tmp_path / "out")
    assert_equal_models(again, model)
    assert again.config == model.config
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == golden_config(folder, kind)

    # The file too: the published names, every byte, and the tensor that nobody reads (with the text embeddings in it).
    written, published = load_file(tmp_path / "out" / WEIGHTS), load_file(GOLDEN / folder / kind / WEIGHTS)
    assert written.keys() == published.keys()
    unequal = [name for name in published if not torch.equal(written[name], published[name])]
    assert set(unequal) <= {UNUSED}
    assert torch.equal(written[UNUSED], published["embedding_model.llm_text_embeddings.weight"])
    with safe_open(tmp_path / "out" / WEIGHTS, "pt") as f:
        assert f.metadata() == {"format": "pt"}


def test_a_loaded_model_is_frozen_and_in_eval_mode() -> None:
    model = golden_model("post", "hybrid")
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(p.is_meta for p in model.parameters())
    assert model.source == GOLDEN / "post" / "hybrid"


def test_saving_over_itself(copy_of: Copy) -> None:
    directory = copy_of()
    model = load_model(directory)
    save_model(model, directory)
    assert_equal_models(model, golden_model("post", "hybrid"))
    assert_equal_models(load_model(directory), golden_model("post", "hybrid"))


def test_saving_over_another_checkpoint_leaves_nothing_of_it(copy_of: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sharded checkpoint's index would send the next reader to the old weights."""
    directory = copy_of("post", "hovle")
    shard(directory)
    save_model(golden_model("post", "linear"), directory)
    assert_equal_models(load_model(directory), golden_model("post", "linear"))
    monkeypatch.setattr(checkpoint, "MAX_SHARD_SIZE", "100KB")
    save_model(golden_model("post", "hybrid"), directory)
    assert not (directory / WEIGHTS).exists()
    assert_equal_models(load_model(directory), golden_model("post", "hybrid"))


def test_saving_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "MAX_SHARD_SIZE", "100KB")
    model = golden_model("post", "hybrid")
    save_model(model, tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 3
    assert [f.name for f in files] == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert all(f.stat().st_size < 110_000 for f in files)
    index = json.loads((tmp_path / INDEX).read_text())
    assert set(index["weight_map"]) == set(load_file(GOLDEN / "post" / "hybrid" / WEIGHTS))
    assert set(index["weight_map"].values()) == {f.name for f in files}
    assert_equal_models(load_model(tmp_path), model)


def test_saving_takes_the_tokenizer_along(copy_of: Copy, tmp_path: Path) -> None:
    directory = copy_of()
    names = [
        "added_tokens.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    for i, name in enumerate(names):
        (directory / name).write_text(f"{i}")
    (directory / "modeling.py").write_text("raise SystemExit")
    save_model(load_model(directory), tmp_path / "out")
    written = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert written == sorted([*names, "config.json", WEIGHTS])
    assert all((tmp_path / "out" / name).read_text() == f"{i}" for i, name in enumerate(names))


def test_dtypes(tmp_path: Path) -> None:
    """Decays and step biases stay wide whatever is asked for, and the written file says what it holds."""
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        model = load_model(GOLDEN / "post" / "hybrid", dtype=dtype)
        wide = torch.promote_types(dtype, torch.float32)
        for name, tensor in tensors_of(model).items():
            assert tensor.dtype == (wide if name.endswith(("A_log", "dt_bias")) else dtype), name
    narrow = load_model(GOLDEN / "post" / "hybrid", dtype=torch.bfloat16)
    save_model(narrow, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert_equal_models(load_model(tmp_path, dtype=torch.bfloat16), narrow)


def test_progress() -> None:
    calls: list[tuple[float, str]] = []
    load_model(GOLDEN / "post" / "linear", progress=lambda share, what: calls.append((share, what)))
    shares = [share for share, _ in calls]
    assert shares[0] == 0.0
    assert shares[-1] == 1.0
    assert shares == sorted(shares)
    assert {what for _, what in calls[:-1]} == set(load_file(GOLDEN / "post" / "linear" / WEIGHTS)) - {UNUSED}


def test_building_without_memory_draws_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A draw on the meta device gives nothing and imports all of torch._dynamo: seconds of every start."""

    config = golden_model("post", "hybrid").config
    assert 0.9 < float(MMMamba(config).embedding.text.weight.detach().std()) < 1.1

    def draw(*_: object, **__: object) -> None:
        raise AssertionError("a weight without memory was drawn")

    monkeypatch.setattr("torch.nn.init.normal_", draw)
    model = checkpoint.build_meta(config)
    assert all(p.is_meta for p in model.parameters())


def test_a_tied_head_is_stored_once(tmp_path: Path) -> None:
    model = random_model(tiny_raw(language={"tie_word_embeddings": True}), dtype=torch.float32)
    save_model(model, tmp_path)
    names = set(load_file(tmp_path / WEIGHTS))
    assert not {HEAD, UNUSED} & names
    again = load_model(tmp_path)
    assert again.language.output.weight is again.embedding.text.weight
    ids = random_ids(tiny_raw(), [7])
    assert torch.equal(again(ids), model(ids))


# --- names ---


@pytest.mark.parametrize(("folder", "kind"), FIXTURES)
def test_the_key_map_is_one_to_one(folder: str, kind: str) -> None:
    model = golden_model(folder, kind)
    for name in load_file(GOLDEN / folder / kind / WEIGHTS):
        if name == UNUSED:
            continue
        ours = from_published(name)
        assert ours in tensors_of(model), name
        assert to_published(ours, model.config) == name
    assert len({to_published(n, model.config) for n in tensors_of(model)}) == len(tensors_of(model))


@pytest.mark.parametrize(
    "name",
    [
        "model.norm.weight",
        "language_model.model.layers.0.attention.bias",
        "language_model.model.layers.x.ffn_norm.weight",
    ],
)
def test_unknown_names(name: str) -> None:
    assert from_published(name) is None


# --- what does not fit, by name ---


def test_missing_tensors_are_listed(copy_of: Copy) -> None:
    directory = copy_of()
    rewrite(directory, lambda t: [t.pop(HEAD), t.pop(WQKV)])
    with pytest.raises(CheckpointError) as caught:
        load_model(directory)
    text = str(caught.value)
    assert f"2 tensors missing: {WQKV}, {HEAD}" in text
    assert "not part" not in text
    assert "another shape" not in text
    assert str(directory) in text


def test_the_unused_tensor_may_be_missing(copy_of: Copy) -> None:
    directory = copy_of()
    rewrite(directory, lambda t: t.pop(UNUSED))
    assert_equal_models(load_model(directory), golden_model("post", "hybrid"))


def test_a_surplus_tensor_alone_is_refused(copy_of: Copy) -> None:
    directory = copy_of()
    rewrite(directory, lambda t: t.update({"vision_model.embeddings": torch.zeros(2)}))
    with pytest.raises(
        CheckpointError, match=r"config.json: 1 tensors not part of this model: vision_model.embeddings\."
    ):
        load_model(directory)


def test_extra_tensors_are_listed(copy_of: Copy) -> None:
    directory = copy_of()
    extra = {
        "language_model.lora.a": torch.zeros(2),
        "language_model.model.layers.4.ffn_norm.weight": torch.zeros(32),
        "language_model.model.layers.1.attention.wqkv.weight": torch.zeros(64, 32),  # layer 1 has its mixer's already
    }
    rewrite(directory, lambda t: t.update(extra))
    with pytest.raises(CheckpointError) as caught:
        load_model(directory)
    # Of two names for one of our tensors the later one in the alphabet is the surplus.
    assert (
        "3 tensors not part of this model: language_model.lora.a, "
        "language_model.model.layers.1.attention.wvkqgdt.weight, language_model.model.layers.4.ffn_norm.weight;"
    ) in str(caught.value)


def test_a_tensor_in_two_files(copy_of: Copy) -> None:
    """Without an index nothing says which one is meant."""
    directory = copy_of()
    save_file({HEAD: torch.zeros(160, 32)}, directory / "other.safetensors")
    with pytest.raises(CheckpointError, match=f"other.safetensors holds {HEAD}, and so does a file before it"):
        load_model(directory)


def test_misshaped_tensors_are_listed(copy_of: Copy) -> None:
    directory = copy_of()
    rewrite(directory, lambda t: t.update({HEAD: torch.zeros(150, 32), WQKV: torch.zeros(32, 64)}))
    with pytest.raises(CheckpointError) as caught:
        load_model(directory)
    assert f"2 tensors of another shape: {WQKV} [32, 64], expected [64, 32], {HEAD} [150, 32], expected [160, 32]" in (
        str(caught.value)
    )


def test_all_problems_come_at_once(copy_of: Copy) -> None:
    directory = copy_of()
    rewrite(directory, lambda t: [t.pop(HEAD), t.update({"x": torch.zeros(1), WQKV: torch.zeros(1)})])
    with pytest.raises(
        CheckpointError, match=r"1 tensors missing: .*; 1 tensors not part of this model: x; 1 tensors of "
    ):
        load_model(directory)


def test_weights_of_another_kind(copy_of: Copy) -> None:
    directory = copy_of()
    shutil.copy(GOLDEN / "post" / "linear" / "config.json", directory / "config.json")
    with pytest.raises(CheckpointError, match="Take config and weights from one checkpoint") as caught:
        load_model(directory)
    assert "language_model.model.layers.0.attention.A_log_bias" in str(caught.value)
    assert "language_model.model.layers.1.attention.A_log_bias" not in str(caught.value)  # a mixer in both


# --- files ---


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl"])
def test_pickles_are_refused_unread(copy_of: Copy, name: str) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.abort, ()  # type: ignore[return-value]

    directory = copy_of()
    (directory / WEIGHTS).unlink()
    (directory / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match=f"only pickle files .{name}.; loading them can run any code"):
        load_model(directory)


def test_no_weights(copy_of: Copy) -> None:
    directory = copy_of()
    (directory / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="holds no safetensors files"):
        load_model(directory)


@pytest.mark.parametrize("length", [0, 5, 100, 50_000])
def test_truncated_weights(copy_of: Copy, length: int) -> None:
    path = copy_of() / WEIGHTS
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(
        CheckpointError, match=r"model.safetensors cannot be read .* it may be cut short, fetch it again"
    ):
        load_model(path.parent)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "config.json is not valid JSON"),
        ("{", "config.json is not valid JSON"),
        ("[1]", "config.json holds no JSON object"),
        ("\xff", "config.json is not valid JSON"),
    ],
)
def test_broken_config(copy_of: Copy, text: str, message: str) -> None:
    path = copy_of() / "config.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=message):
        load_model(path.parent)


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no config.json"):
        load_model(tmp_path)


def test_config_errors_pass_through(copy_of: Copy) -> None:
    path = copy_of() / "config.json"
    path.write_text(path.read_text().replace('"silu"', '"gelu"'))
    with pytest.raises(ConfigError, match="hidden_act"):
        load_model(path.parent)


# --- shards, parts and where an index may point ---


def test_sharded_weights(copy_of: Copy) -> None:
    directory = copy_of()
    shard(directory)
    assert_equal_models(load_model(directory), golden_model("post", "hybrid"))


def test_shards_in_the_hubs_cache(copy_of: Copy, tmp_path: Path) -> None:
    """There a snapshot's files are links to blobs without an extension, in another directory."""
    directory = copy_of()
    shard(directory)
    snapshot, blobs = tmp_path / "cache" / "snapshots" / "abc", tmp_path / "cache" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(sorted(directory.iterdir())):
        shutil.move(file, blobs / f"{i:064x}")
        (snapshot / file.name).symlink_to(os.path.relpath(blobs / f"{i:064x}", snapshot))
    assert_equal_models(load_model(snapshot), golden_model("post", "hybrid"))


def test_with_an_index_other_files_are_not_read(copy_of: Copy) -> None:
    directory = copy_of()
    shard(directory)
    save_file({"stray": torch.zeros(3)}, directory / "adapter.safetensors")
    assert_equal_models(load_model(directory), golden_model("post", "hybrid"))


def test_a_shard_that_is_not_there(copy_of: Copy) -> None:
    directory = copy_of()
    shard(directory)
    (directory / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"names model-00002-of-00003.safetensors, which is not there; fetch the whole"
    ):
        load_model(directory)


def test_an_index_that_names_what_no_file_holds(copy_of: Copy) -> None:
    directory = copy_of()
    weight_map = shard(directory)
    write_index(directory, weight_map | {"ghost.weight": weight_map[HEAD]})
    with pytest.raises(CheckpointError, match=r"1 tensors named in the index but in no file: ghost.weight"):
        load_model(directory)


@pytest.mark.parametrize(
    "target",
    [
        "/somewhere/model.safetensors",
        "../../model.safetensors",
        "../../../../x/model.safetensors",
        "sub/model.safetensors",
        "../other/model.safetensors",
        "model.bin",
        "../config.json",
        "",
    ],
)
def test_an_index_may_not_point_elsewhere(copy_of: Copy, target: str) -> None:
    directory = copy_of()
    weight_map = shard(directory)
    write_index(directory, weight_map | {HEAD: target})
    for place in (directory, directory / ".." / directory.name):
        with pytest.raises(CheckpointError, match="only safetensors files beside it are read") as caught:
            load_model(place)
        assert HEAD in str(caught.value)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": [1]}'])
def test_a_broken_index(copy_of: Copy, content: str) -> None:
    directory = copy_of()
    (directory / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match=r"model.safetensors.index.json .*weight_map"):
        load_model(directory)


def test_weights_beside_the_directory(copy_of: Copy) -> None:
    """Bundled models share the shards in the directory above theirs."""
    directory = copy_of()
    weight_map = shard(directory)
    for file in set(weight_map.values()):
        shutil.move(directory / file, directory.parent / file)
    write_index(directory, {name: f"../{file}" for name, file in weight_map.items()})
    assert_equal_models(load_model(directory), golden_model("post", "hybrid"))


def test_a_tensor_in_parts(copy_of: Copy) -> None:
    """`name::0`, `name::1`, ... are runs of rows; more than ten of them keep their order."""
    directory = copy_of()

    def split(tensors: dict[str, Tensor]) -> None:
        rows = tensors.pop(HEAD)
        tensors.update({f"{HEAD}::{i}": part.clone() for i, part in enumerate(rows.split(13))})

    rewrite(directory, split)
    assert_equal_models(load_model(directory), golden_model("post", "hybrid"))
    rewrite(directory, lambda t: t.pop(f"{HEAD}::12"))
    with pytest.raises(CheckpointError, match=r"1 tensors of another shape: .*output.weight \[156, 32\]"):
        load_model(directory)


# --- names that are no directory ---


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """Calls that would have gone to the hub; they return the golden hybrid."""
    calls: list[dict[str, object]] = []

    def snapshot_download(repo_id: str, **options: object) -> str:
        calls.append({"repo_id": repo_id} | options)
        return str(GOLDEN / "post" / "hybrid")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return calls


def test_a_hub_id_with_a_revision(hub: list[dict[str, object]]) -> None:
    assert_equal_models(load_model("hustvl/mmMamba-linear", revision="v1.2"), golden_model("post", "hybrid"))
    load_model("hustvl/mmMamba-linear")
    assert [(call["repo_id"], call["revision"]) for call in hub] == [
        ("hustvl/mmMamba-linear", "v1.2"),
        ("hustvl/mmMamba-linear", None),
    ]
    patterns = hub[0]["allow_patterns"]
    assert isinstance(patterns, list)
    assert {"*.safetensors", INDEX, "config.json", "tokenizer.model", "tokenizer.json"} <= set(patterns)
    assert not [p for p in patterns if p.endswith((".py", ".bin", ".pt")) or p == "*"]


def test_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The real client without a network: one sentence with the way out."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for revision, at in ((None, ""), ("main", " at revision main")):
        with pytest.raises(CheckpointError) as caught:
            load_model("hustvl/mmMamba-linear", revision=revision)
        text = str(caught.value)
        assert text.startswith(
            f'"hustvl/mmMamba-linear"{at} is not a local directory and could not be fetched from the hub'
        )
        assert "pass a downloaded directory" in text
        assert "\n" not in text


@pytest.mark.parametrize("error", [OSError("no route"), ValueError("bad"), RuntimeError("x" * 5000)])
def test_any_failure_of_the_client_is_one_sentence(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(CheckpointError, match=type(error).__name__) as caught:
        load_model("a/b")
    assert len(str(caught.value)) < 300
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("name", ["nonsense", "a/b/c", "./missing", "../up/x", "https://example.org/x"])
def test_names_that_are_nothing(name: str, hub: list[dict[str, object]]) -> None:
    with pytest.raises(CheckpointError, match=r"neither a directory, nor a hub id such as .* nor bundled"):
        load_model(name)
    assert not hub


def test_a_file_is_no_directory() -> None:
    with pytest.raises(CheckpointError, match="is a file; pass the directory"):
        load_model(GOLDEN / "post" / "hybrid" / WEIGHTS)


def test_bundled_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "BUNDLED_DIR", tmp_path)
    for name, directory in {"nano": "linear", "nano-linear": "linear", "nano-teacher": "teacher"}.items():
        with pytest.raises(CheckpointError, match=f'bundled model "{name}" is not part of this installation'):
            load_model(name)
        shutil.copytree(GOLDEN / "post" / "hybrid", tmp_path / directory, dirs_exist_ok=True)
        assert checkpoint.resolve_checkpoint(name) == tmp_path / directory
        shutil.rmtree(tmp_path / directory)


def test_only_the_config_of_a_hub_id(hub: list[dict[str, object]]) -> None:
    checkpoint.resolve_checkpoint("a/b", revision="r", config_only=True)
    assert [(call["revision"], call["allow_patterns"]) for call in hub] == [("r", ["config.json"])]


def test_equal_tensors_of_two_models_are_held_once(tmp_path: Path) -> None:
    first = load_model(GOLDEN / "post" / "hovle")
    second = load_model(GOLDEN / "post" / "hovle", share=[first])
    theirs = dict(first.named_parameters())
    assert all(p is theirs[name] for name, p in second.named_parameters())
    wide = load_model(GOLDEN / "post" / "hovle", dtype=torch.float64, share=[first])
    assert not {id(p) for p in wide.parameters()} & {id(p) for p in first.parameters()}, "of another precision"
    student = load_model(GOLDEN / "post" / "linear", share=[first])
    for name, p in student.named_parameters():
        same = name in theirs and theirs[name].shape == p.shape and torch.equal(theirs[name], p)
        assert (p is theirs.get(name)) == same, name
