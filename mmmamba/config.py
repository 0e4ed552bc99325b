"""Model configuration: the published `config.json` layouts as frozen dataclasses.

Two layouts are read, and both describe one network:

* `model_type: internvl_chat`: HoVLE, softmax attention (`mha`) in every layer;
* `model_type: mmMamba_chat`: mmMamba, each stack lists its layers in `layers_block_type`.

Fields that are not needed here are kept in `ModelConfig.raw` and written back on saving.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, Literal

LayerType = Literal["mamba2", "mha"]
LAYER_TYPES: tuple[LayerType, ...] = ("mamba2", "mha")
TEACHER_MODEL_TYPE = "internvl_chat"
STUDENT_MODEL_TYPE = "mmMamba_chat"


class ConfigError(ValueError):
    """A configuration that this code cannot run, with the field, its value and what fits."""


@dataclass(frozen=True)
class RopeScaling:
    """Rotary scaling. `linear` divides positions by `factor`; `dynamic` is NTK-aware (see `layers.Rotary`)."""

    type: Literal["linear", "dynamic"]
    factor: float

    def __post_init__(self) -> None:
        if self.type not in ("linear", "dynamic"):
            raise ConfigError(f'rope_scaling type "{self.type}" is not known; use "linear" or "dynamic"')
        if not self.factor >= 1.0:
            raise ConfigError(f"rope_scaling factor {self.factor} is below 1; use 1 or more")


@dataclass(frozen=True, kw_only=True)
class StackConfig:
    """A stack of decoder layers, the part that both stacks of the network share."""

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    rope_scaling: RopeScaling | None = None
    layer_types: tuple[LayerType, ...] = ()

    def __post_init__(self) -> None:
        name = type(self).__name__
        for f in fields(self):
            value = getattr(self, f.name)
            least = 0 if f.name in ("img_context_token_id", "num_special_tokens") else 1
            if f.type == "int" and (type(value) is not int or value < least):
                raise ConfigError(f"{name}: {f.name} is {value!r}; use a whole number of {least} or more")
            if f.type == "float" and not (isinstance(value, int | float) and value > 0):
                raise ConfigError(f"{name}: {f.name} is {value!r}; use a number above 0")
        if not self.layer_types:
            object.__setattr__(self, "layer_types", ("mha",) * self.num_hidden_layers)
        if len(self.layer_types) != self.num_hidden_layers:
            raise ConfigError(
                f"{name}: layers_block_type names {len(self.layer_types)} layers, "
                f"num_hidden_layers is {self.num_hidden_layers}; list one type per layer"
            )
        for i, layer_type in enumerate(self.layer_types):
            if layer_type not in LAYER_TYPES:
                raise ConfigError(f'{name}: layer {i} has type "{layer_type}"; use one of {", ".join(LAYER_TYPES)}')
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"{name}: hidden_size {self.hidden_size} does not divide by "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"{name}: num_attention_heads {self.num_attention_heads} does not divide by "
                f"num_key_value_heads {self.num_key_value_heads}"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def kv_dim(self) -> int:
        return self.num_key_value_heads * self.head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the mixer's convolution: V, K (kv heads) and Q (all heads)."""
        return 2 * self.kv_dim + self.hidden_size

    @property
    def mixer_dim(self) -> int:
        """Rows of `wvkqgdt`: V, K, Q, G and one step size per head."""
        return self.conv_dim + self.hidden_size + self.num_attention_heads


@dataclass(frozen=True, kw_only=True)
class EmbeddingConfig(StackConfig):
    """The holistic embedding: image stem and a causal stack over image and text tokens."""

    num_channels: int
    patch_size: int
    image_size: int
    llm_vocab_size: int
    llm_hidden_size: int
    img_context_token_id: int
    downsample_ratio: float
    pixel_shuffle_loc: Literal["pre", "post"]
    num_special_tokens: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pixel_shuffle_loc not in ("pre", "post"):
            raise ConfigError(f'pixel_shuffle_loc "{self.pixel_shuffle_loc}" is not known; use "pre" or "post"')
        if self.downsample_ratio != 0.5:
            raise ConfigError(f"downsample_ratio {self.downsample_ratio} is not supported; use 0.5")
        if self.image_size % (2 * self.patch_size):
            raise ConfigError(
                f"image_size {self.image_size} must be a multiple of twice patch_size {self.patch_size} "
                "for pixel shuffle"
            )
        if self.llm_hidden_size != self.hidden_size:
            raise ConfigError(
                f"llm_hidden_size {self.llm_hidden_size} differs from the embedding's hidden_size {self.hidden_size}; "
                "the two stacks must be equally wide"
            )

    @property
    def grid(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size

    @property
    def patches_per_tile(self) -> int:
        return self.grid**2

    @property
    def tokens_per_tile(self) -> int:
        """Image tokens that the language model sees for one tile."""
        return self.patches_per_tile // 4

    @property
    def stack_tokens_per_image_token(self) -> int:
        """Positions in the embedding stack for one image token of the language model."""
        return 4 if self.pixel_shuffle_loc == "post" else 1


@dataclass(frozen=True, kw_only=True)
class LanguageConfig(StackConfig):
    """The language model (InternLM2 in the published checkpoints)."""

    vocab_size: int
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The whole network. `raw` is the `config.json` it came from, unknown fields included."""

    embedding: EmbeddingConfig
    language: LanguageConfig
    model_type: str
    template: str
    min_dynamic_patch: int = 1
    max_dynamic_patch: int = 12
    dynamic_image_size: bool = True
    use_thumbnail: bool = True
    normalize_encoder_output: bool = False
    raw: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not 1 <= self.min_dynamic_patch <= self.max_dynamic_patch:
            raise ConfigError(
                f"min_dynamic_patch {self.min_dynamic_patch} and max_dynamic_patch {self.max_dynamic_patch} "
                "must satisfy 1 <= min <= max"
            )
        if self.embedding.hidden_size != self.language.hidden_size:
            raise ConfigError(
                f"hidden_size {self.embedding.hidden_size} of the embedding differs from {self.language.hidden_size} "
                "of the language model; the two stacks must be equally wide"
            )

    @property
    def image_size(self) -> int:
        """Side of a tile, in pixels."""
        return self.embedding.image_size

    @property
    def tokens_per_tile(self) -> int:
        """Image tokens that the language model sees for one tile."""
        return self.embedding.tokens_per_tile

    @property
    def stacks(self) -> tuple[EmbeddingConfig, LanguageConfig]:
        return self.embedding, self.language

    @property
    def kind(self) -> Literal["teacher", "linear", "hybrid"]:
        """`teacher` is softmax everywhere, `linear` Mamba-2 everywhere, `hybrid` both."""
        types = {t for stack in self.stacks for t in stack.layer_types}
        return "hybrid" if len(types) == 2 else "linear" if types == {"mamba2"} else "teacher"

    def fingerprint(self) -> str:
        """Short hash of what gives a decoding state its meaning: shapes, layer types and rotary settings."""
        facts = [
            {f.name: repr(getattr(stack, f.name)) for f in fields(stack)} | {"stack": type(stack).__name__}
            for stack in self.stacks
        ]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def with_layer_types(self, embedding: tuple[LayerType, ...], language: tuple[LayerType, ...]) -> ModelConfig:
        """The same network with other mixers: how a student's config is made from its teacher's."""
        return replace(
            self,
            embedding=replace(self.embedding, layer_types=embedding),
            language=replace(self.language, layer_types=language),
            model_type=STUDENT_MODEL_TYPE if "mamba2" in embedding + language else TEACHER_MODEL_TYPE,
        )

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> ModelConfig:
        """Read a published `config.json`.

        Raises: ConfigError naming every needed field that is missing, or a field whose value is not supported.
        """
        model_type = raw.get("model_type")
        if model_type not in (TEACHER_MODEL_TYPE, STUDENT_MODEL_TYPE):
            raise ConfigError(
                f'model_type "{model_type}" is not known; this code reads "{TEACHER_MODEL_TYPE}" (HoVLE) '
                f'and "{STUDENT_MODEL_TYPE}" (mmMamba)'
            )
        for name in ("embedding_config", "llm_config"):
            if not isinstance(raw.get(name, {}), dict):
                raise ConfigError(f"{name} is {raw[name]!r}; it must be an object of fields")
        missing = [name for name in ("embedding_config", "llm_config", "template") if name not in raw]
        embedding = _stack_fields(raw.get("embedding_config", {}), EmbeddingConfig, "embedding_config", missing)
        language = _stack_fields(raw.get("llm_config", {}), LanguageConfig, "llm_config", missing)
        if model_type == STUDENT_MODEL_TYPE:
            for name in ("embedding_config", "llm_config"):
                if "layers_block_type" not in raw.get(name, {}):
                    missing.append(f"{name}.layers_block_type")
        if missing:
            raise ConfigError(f"config.json misses {', '.join(missing)}; add the fields or take a complete checkpoint")
        _refuse_unsupported(raw)
        force_image_size = raw.get("force_image_size")
        if force_image_size not in (None, embedding["image_size"]):
            raise ConfigError(
                f"force_image_size {force_image_size} differs from "
                f"embedding_config.image_size {embedding['image_size']}"
            )
        return cls(
            embedding=EmbeddingConfig(**embedding),
            language=LanguageConfig(**language),
            model_type=model_type,
            raw=raw,
            **{f.name: raw[f.name] for f in fields(cls) if f.name in raw and f.name not in ("raw", "model_type")},
        )

    def to_dict(self) -> dict[str, Any]:
        """`config.json` in the layout of `model_type`, with the fields of `raw` that this code does not know."""
        student = self.model_type == STUDENT_MODEL_TYPE
        out = dict(self.raw)
        for f in fields(self):
            if f.name not in ("embedding", "language", "raw"):
                out[f.name] = getattr(self, f.name)
        out["architectures"] = "mmMambaChatModel" if student else ["InternVLChatModel"]
        out["embedding_config"] = _stack_dict(self.embedding, self.raw.get("embedding_config", {}), student)
        out["embedding_config"]["model_type"] = "mmMamba_embedding" if student else "holistic_embedding"
        out["llm_config"] = _stack_dict(self.language, self.raw.get("llm_config", {}), student)
        out["llm_config"]["model_type"] = "mmMamba" if student else "internlm2"
        out["llm_config"]["architectures"] = "mmMambaForCausalLM" if student else ["InternLM2ForCausalLM"]
        return out


_DERIVED = {"layer_types": "layers_block_type", "num_special_tokens": "special_token_maps"}


def _stack_fields(raw: dict[str, Any], cls: type, where: str, missing: list[str]) -> dict[str, Any]:
    """Keyword arguments for `cls`; names of absent fields without a default are added to `missing`."""
    values: dict[str, Any] = {}
    for f in fields(cls):
        key = _DERIVED.get(f.name, f.name)
        if key in raw:
            values[f.name] = raw[key]
        elif f.default is MISSING:
            missing.append(f"{where}.{key}")
    if values.get("rope_scaling") is not None:
        scaling = values["rope_scaling"]
        kind = scaling.get("type", scaling.get("rope_type")) if isinstance(scaling, dict) else None
        if kind is None or "factor" not in scaling:
            raise ConfigError(f'{where}.rope_scaling is {scaling!r}; it needs "type" and "factor"')
        values["rope_scaling"] = RopeScaling(kind, float(scaling["factor"]))
    if "layer_types" in values:
        values["layer_types"] = tuple(values["layer_types"])
    if "num_special_tokens" in values:
        values["num_special_tokens"] = len(values["num_special_tokens"] or {})
    return values


def _stack_dict(stack: StackConfig, raw: dict[str, Any], student: bool) -> dict[str, Any]:
    out = dict(raw)
    for f in fields(stack):
        if f.name not in _DERIVED:
            out[f.name] = getattr(stack, f.name)
    scaling = stack.rope_scaling
    out["rope_scaling"] = None if scaling is None else {"type": scaling.type, "factor": scaling.factor}
    out.pop("layers_block_type", None)
    if student:
        out["layers_block_type"] = list(stack.layer_types)
    return out


# Fields that change the computation and are implemented only at the value of every published checkpoint.
_ONLY: dict[str, dict[str, Any]] = {
    "embedding_config": {
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "use_ls": False,
        "use_pixel_shuffle_proj": True,
    },
    "llm_config": {"bias": False, "hidden_act": "silu"},
    "": {"pad2square": False, "ps_version": "v2"},
}


def _refuse_unsupported(raw: dict[str, Any]) -> None:
    for section, only in _ONLY.items():
        values = raw[section] if section else raw
        for name, value in only.items():
            if values.get(name, value) != value:
                where = f"{section}.{name}" if section else name
                raise ConfigError(f"{where} is {values[name]!r}; only {value!r} is supported")
