"""Recipes: what a run trains, on what, for how long. Instances are the YAML files in `distill/recipes/`."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from mmmamba.config import LayerType, ModelConfig

STAGES = ("teacher", "stage1", "stage2", "stage3")
RECIPES_DIR = Path(__file__).parent / "recipes"


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage. The schedule is warm-up / stable / decay over its progress, the larger of the shares of `steps` and of
    `max_minutes` that have passed (0 minutes: no limit)."""

    steps: int
    lr: float
    image_batch: int
    text_batch: int
    lr_language: float | None = None  # teacher only: the pretrained language model's own rate
    max_minutes: float = 0.0
    warmup: float = 0.04
    decay: float = 0.25
    weight_decay: float = 0.05
    muon: bool = False  # for the matrices at rate `lr`; everything else, and all without it, by AdamW
    clip: float = 1.0
    text_weight: float = 1.0
    save_minutes: float = 0.0  # write what there is so far as often (0: only at the end)
    image_answer_tokens: int | None = None  # slots a row for learned tokens; None: as many as there are, no graph then
    text_answer_tokens: int | None = None
    round_from: float = 1.0  # progress from which weights are trained as they will be stored (1: never)

    def __post_init__(self) -> None:
        for name in ("steps", "lr", "image_batch"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} trains nothing; use a value above 0")
        if self.text_batch < 0:
            raise ValueError(f"text_batch={self.text_batch} is below 0")
        if not (self.warmup >= 0 and self.decay >= 0 and self.warmup + self.decay <= 1):
            raise ValueError(f"warmup={self.warmup} and decay={self.decay} must be shares of the run that fit into 1")

    def lr_factor(self, progress: float) -> float:
        """Learning rate over its peak at `progress` 0..1."""
        if progress < self.warmup:
            return progress / self.warmup
        if progress > 1 - self.decay:
            return max(0.0, (1 - progress) / self.decay)
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A model, its data and its stages."""

    name: str
    stages: dict[str, StageConfig]
    softmax_layers: tuple[int, ...] = ()  # counted over both stacks, embedding first; the rest become mixers
    image_seqlen: int = 128
    text_seqlen: int = 256
    image_sources: dict[str, float] = field(default_factory=lambda: {"shapes": 1.0})  # name -> share of the batches
    text_sources: dict[str, float] = field(default_factory=dict)
    seed: int = 0

    @classmethod
    def load(cls, name_or_path: str) -> Recipe:
        """Read `distill/recipes/NAME.yaml` or a path.  Raises: ValueError naming what is wrong."""
        path = Path(name_or_path)
        if not path.is_file():
            path = RECIPES_DIR / f"{name_or_path}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(p.stem for p in RECIPES_DIR.glob("*.yaml")))
            raise ValueError(f'no recipe "{name_or_path}"; there are {known}, or pass a YAML file')
        raw: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError(f"{path} holds no fields; start from a file in distill/recipes")
        stages = raw.pop("stages", {})
        _check_keys(raw, {f.name for f in fields(cls)} - {"name", "stages"}, path)
        if not stages or (unknown := sorted(set(stages) - set(STAGES))):
            raise ValueError(f"{path}: stages are {unknown if stages else 'missing'}; use {', '.join(STAGES)}")
        needed = {f.name for f in fields(StageConfig) if f.default is MISSING}
        for name, stage in stages.items():
            if absent := sorted(needed - (stage or {}).keys()):
                raise ValueError(f"{path}: {name} misses {', '.join(absent)}")
            _check_keys(stage, {f.name for f in fields(StageConfig)}, path)
        raw["softmax_layers"] = tuple(raw.get("softmax_layers", ()))
        return cls(name=path.stem, stages={k: StageConfig(**v) for k, v in stages.items()}, **raw)

    def layer_types(self, teacher: ModelConfig) -> tuple[tuple[LayerType, ...], tuple[LayerType, ...]]:
        """Layer types of the student's two stacks.  Raises: ValueError if a layer does not exist or none is left."""
        depths = [stack.num_hidden_layers for stack in teacher.stacks]
        total = sum(depths)
        if wrong := [i for i in self.softmax_layers if not 0 <= i < total]:
            raise ValueError(f"softmax_layers {wrong} do not exist; the teacher has layers 0 to {total - 1}")
        types: list[LayerType] = ["mha" if i in self.softmax_layers else "mamba2" for i in range(total)]
        if "mamba2" not in types:
            raise ValueError("softmax_layers names every layer, so nothing would train; leave some out")
        return tuple(types[: depths[0]]), tuple(types[depths[0] :])


def _check_keys(raw: dict[str, Any], known: set[str], path: Path) -> None:
    if unknown := sorted(set(raw) - known):
        raise ValueError(f"{path}: {', '.join(unknown)} not known; fields are {', '.join(sorted(known))}")
