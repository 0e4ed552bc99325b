"""`config.json` in both published layouts: there and back, what is missing, what cannot be run."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest

from mmmamba.config import ConfigError, ModelConfig
from tests.helpers import FIXTURES, FOLDERS, golden_config, tiny_raw

# Every field that the network cannot be built without.
NEEDED = {
    "embedding_config": (
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "rms_norm_eps",
        "rope_theta",
        "max_position_embeddings",
        "num_channels",
        "patch_size",
        "image_size",
        "llm_vocab_size",
        "llm_hidden_size",
        "img_context_token_id",
        "downsample_ratio",
        "pixel_shuffle_loc",
    ),
    "llm_config": (
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "rms_norm_eps",
        "rope_theta",
        "max_position_embeddings",
        "vocab_size",
    ),
}


def changed(raw: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of `raw` with the field at a dotted path set."""
    out = copy.deepcopy(raw)
    section, _, name = path.rpartition(".")
    (out[section] if section else out)[name] = value
    return out


@pytest.mark.parametrize(("folder", "kind"), FIXTURES)
def test_round_trip(folder: str, kind: str) -> None:
    raw = golden_config(folder, kind)
    config = ModelConfig.from_dict(raw)
    written = config.to_dict()
    assert written == golden_config(folder, kind)
    assert raw == golden_config(folder, kind), "reading changed its argument"
    assert ModelConfig.from_dict(json.loads(json.dumps(written))) == config


@pytest.mark.parametrize("folder", FOLDERS)
def test_kinds(folder: str) -> None:
    kinds = [ModelConfig.from_dict(golden_config(folder, kind)).kind for kind in ("hovle", "linear", "hybrid")]
    assert kinds == ["teacher", "linear", "hybrid"]


def test_fields_of_the_fixtures() -> None:
    config = ModelConfig.from_dict(golden_config("post", "hybrid"))
    assert config.language.layer_types == ("mha", "mamba2", "mha", "mamba2")
    assert config.embedding.layer_types == ("mha", "mamba2", "mamba2", "mamba2") * 2
    assert (config.image_size, config.tokens_per_tile, config.embedding.patches_per_tile) == (56, 4, 16)
    assert config.embedding.stack_tokens_per_image_token == 4
    assert (config.language.head_dim, config.language.kv_dim, config.language.conv_dim) == (16, 16, 64)
    assert config.language.mixer_dim == 64 + 32 + 2
    pre = ModelConfig.from_dict(golden_config("pre_ntk", "hovle"))
    assert pre.embedding.stack_tokens_per_image_token == 1
    assert pre.language.rope_scaling is not None
    assert (pre.language.rope_scaling.type, pre.language.rope_scaling.factor) == ("dynamic", 2.0)


def test_published_size() -> None:
    raw = changed(golden_config("post", "linear"), "embedding_config.image_size", 448)
    config = ModelConfig.from_dict(changed(raw, "force_image_size", 448))
    assert (config.image_size, config.tokens_per_tile) == (448, 256)


def test_unknown_fields_are_kept() -> None:
    raw = golden_config("post", "linear")
    raw["auto_map"] = {"AutoModel": "modeling.Model"}
    raw["embedding_config"]["flavour"] = [1, {"a": None}]
    raw["llm_config"]["attn_wqkv"] = "x"
    config = ModelConfig.from_dict(raw)
    assert config.to_dict() == raw
    teacher = config.with_layer_types(("mha",) * 8, ("mha",) * 4).to_dict()
    assert teacher["auto_map"] == raw["auto_map"]
    assert teacher["embedding_config"]["flavour"] == raw["embedding_config"]["flavour"]


@pytest.mark.parametrize("path", [f"{section}.{name}" for section, names in NEEDED.items() for name in names])
def test_a_needed_field_is_named(path: str) -> None:
    raw = golden_config("post", "linear")
    section, _, name = path.partition(".")
    del raw[section][name]
    with pytest.raises(ConfigError, match=f"config.json misses {path}; add"):
        ModelConfig.from_dict(raw)


def test_all_missing_fields_are_named_at_once() -> None:
    raw = golden_config("post", "linear")
    del raw["template"], raw["llm_config"]["layers_block_type"], raw["llm_config"]["hidden_size"]
    del raw["embedding_config"]["patch_size"], raw["embedding_config"]["layers_block_type"]
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(raw)
    listed = str(caught.value).removeprefix("config.json misses ").partition(";")[0].split(", ")
    assert sorted(listed) == [
        "embedding_config.layers_block_type",
        "embedding_config.patch_size",
        "llm_config.hidden_size",
        "llm_config.layers_block_type",
        "template",
    ]
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict({"model_type": "internvl_chat"})
    for section, names in NEEDED.items():
        for name in names:
            assert f"{section}.{name}" in str(caught.value)


def test_a_teacher_needs_no_layer_list() -> None:
    raw = golden_config("post", "hovle")
    assert "layers_block_type" not in raw["llm_config"]
    assert ModelConfig.from_dict(raw).language.layer_types == ("mha",) * 4


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model_type", "llava", 'model_type "llava" is not known; this code reads "internvl_chat"'),
        ("model_type", None, 'model_type "None" is not known'),
        ("embedding_config", None, "embedding_config is None; it must be an object"),
        ("llm_config", [1], r"llm_config is \[1\]; it must be an object"),
        ("embedding_config.pixel_shuffle_loc", "mid", 'pixel_shuffle_loc "mid" is not known; use "pre" or "post"'),
        ("embedding_config.downsample_ratio", 0.25, "downsample_ratio 0.25 is not supported; use 0.5"),
        ("embedding_config.patch_size", 16, "image_size 56 must be a multiple of twice patch_size 16"),
        ("embedding_config.llm_hidden_size", 64, "llm_hidden_size 64 differs from the embedding's hidden_size 32"),
        ("embedding_config.attention_bias", True, "embedding_config.attention_bias is True; only False is supported"),
        ("embedding_config.mlp_bias", True, "embedding_config.mlp_bias is True"),
        ("embedding_config.hidden_act", "gelu", "embedding_config.hidden_act is 'gelu'; only 'silu' is supported"),
        ("embedding_config.use_ls", True, "embedding_config.use_ls is True"),
        ("embedding_config.use_pixel_shuffle_proj", False, "use_pixel_shuffle_proj is False; only True"),
        ("llm_config.bias", True, "llm_config.bias is True; only False is supported"),
        ("llm_config.hidden_act", "relu", "llm_config.hidden_act is 'relu'"),
        ("pad2square", True, "pad2square is True"),
        ("ps_version", "v1", "ps_version is 'v1'; only 'v2' is supported"),
        ("force_image_size", 448, "force_image_size 448 differs from embedding_config.image_size 56"),
        ("llm_config.hidden_size", 33, "LanguageConfig: hidden_size 33 does not divide by num_attention_heads 2"),
        ("llm_config.num_key_value_heads", 3, "num_attention_heads 2 does not divide by num_key_value_heads 3"),
        ("llm_config.num_attention_heads", 0, "num_attention_heads is 0; use a whole number of 1 or more"),
        ("llm_config.vocab_size", -5, "vocab_size is -5; use a whole number"),
        ("llm_config.hidden_size", "32", "hidden_size is '32'; use a whole number"),
        ("embedding_config.num_hidden_layers", None, "num_hidden_layers is None; use a whole number"),
        ("llm_config.rms_norm_eps", 0, "LanguageConfig: rms_norm_eps is 0; use a number above 0"),
        ("embedding_config.rope_theta", "1e6", "rope_theta is '1e6'; use a number above 0"),
        ("embedding_config.patch_size", 14.0, "patch_size is 14.0; use a whole number"),
        (
            "llm_config.layers_block_type",
            ["mha"] * 3,
            "names 3 layers, num_hidden_layers is 4; list one type per layer",
        ),
        ("llm_config.layers_block_type", ["mha"] * 3 + ["mamba"], 'layer 3 has type "mamba"; use one of mamba2, mha'),
        ("llm_config.rope_scaling", {"type": "yarn", "factor": 2.0}, 'rope_scaling type "yarn" is not known; use "lin'),
        ("llm_config.rope_scaling", {"type": "linear", "factor": 0.5}, "rope_scaling factor 0.5 is below 1"),
        ("llm_config.rope_scaling", {"type": "linear"}, 'llm_config.rope_scaling is .* needs "type" and "factor"'),
        ("llm_config.rope_scaling", {"factor": 2.0}, 'it needs "type" and "factor"'),
        ("embedding_config.rope_scaling", "linear", "embedding_config.rope_scaling is 'linear'"),
        ("min_dynamic_patch", 0, "min_dynamic_patch 0 and max_dynamic_patch 12 must satisfy"),
        ("max_dynamic_patch", 0, "must satisfy 1 <= min <= max"),
    ],
)
def test_what_cannot_be_run_is_refused(path: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_dict(changed(golden_config("post", "linear"), path, value))


def test_stacks_of_different_width_are_refused() -> None:
    raw = tiny_raw(language={"hidden_size": 48})
    with pytest.raises(ConfigError, match="hidden_size 24 of the embedding differs from 48 of the language model"):
        ModelConfig.from_dict(raw)


def test_newer_spelling_of_rope_scaling() -> None:
    raw = changed(golden_config("post", "linear"), "llm_config.rope_scaling", {"rope_type": "linear", "factor": 2})
    config = ModelConfig.from_dict(raw)
    assert config.language.rope_scaling is not None
    assert config.to_dict()["llm_config"]["rope_scaling"] == {"type": "linear", "factor": 2.0}


def test_special_tokens_are_counted_and_written_back() -> None:
    maps = {"<a>": 160, "<b>": 161}
    raw = changed(golden_config("post", "linear"), "embedding_config.special_token_maps", maps)
    config = ModelConfig.from_dict(raw)
    assert config.embedding.num_special_tokens == 2
    assert config.to_dict()["embedding_config"]["special_token_maps"] == maps


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_students_config_from_its_teachers(folder: str) -> None:
    """With the layer lists of the stored students it is their `config.json`; with softmax only the teacher's again."""
    teacher = ModelConfig.from_dict(golden_config(folder, "hovle"))
    for kind in ("linear", "hybrid"):
        stored = ModelConfig.from_dict(golden_config(folder, kind))
        made = teacher.with_layer_types(stored.embedding.layer_types, stored.language.layer_types)
        assert made == stored
        assert made.to_dict() == golden_config(folder, kind)
        back = stored.with_layer_types(teacher.embedding.layer_types, teacher.language.layer_types)
        assert back.to_dict() == golden_config(folder, "hovle")


def test_fingerprint() -> None:
    """It changes with what gives a state its meaning, and with nothing else."""
    raw = golden_config("post", "hybrid")
    config = ModelConfig.from_dict(raw)
    same = [
        ModelConfig.from_dict(json.loads(json.dumps(raw))),
        replace(config, template="chatml"),
        replace(config, max_dynamic_patch=3),
        ModelConfig.from_dict(raw | {"comment": "x"}),
    ]
    assert {c.fingerprint() for c in same} == {config.fingerprint()}
    others = {ModelConfig.from_dict(golden_config(*fixture)).fingerprint() for fixture in FIXTURES}
    assert len(others) == len(FIXTURES)
    for path, value in (
        ("llm_config.rope_theta", 500.0),
        ("llm_config.num_key_value_heads", 2),
        ("llm_config.rope_scaling", {"type": "dynamic", "factor": 2.0}),
        ("llm_config.layers_block_type", ["mamba2", "mha", "mha", "mamba2"]),
        ("embedding_config.pixel_shuffle_loc", "pre"),
        ("embedding_config.num_key_value_heads", 2),
    ):
        assert ModelConfig.from_dict(changed(raw, path, value)).fingerprint() != config.fingerprint(), path
