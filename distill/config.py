"""Recipes: what a run trains, on what, for how long. Instances are the YAML files in `distill/recipes/`."""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from distill.losses import Objective
from mmmamba.config import LayerType, ModelConfig

STAGES = ("teacher", "stage1", "stage2", "stage3")
STUDENT_STAGES = STAGES[1:]
LAYER_STAGES = ("stage1", "stage2")  # each layer by itself
RECIPES_DIR = Path(__file__).parent / "recipes"
_SCHEDULE_STEPS = ("warmup_steps", "stable_steps", "decay_steps")
_ANSWER_TOKENS = ("image_answer_tokens", "text_answer_tokens")
# What may change while a stage is under way: it says how a step is computed and kept, not what comes out.
_NO_RESULT = ("save_minutes", "save_steps", "activation_checkpointing")
# Fields that mean nothing in other stages, which therefore refuse them.
_ONLY_IN = dict.fromkeys(("temperature", "ce_weight", "all_tokens", "reduction", "hidden_weight"), ("stage3",)) | {
    "train_decay": STUDENT_STAGES
}
# Left out of a checkpoint's facts while they are at their defaults, so that checkpoints from before them go on.
_LATER = frozenset((*_ONLY_IN, "pictures", "packed", "packed_tiles", "frozen_dtype"))
_FROZEN_DTYPES = ("float32", "bfloat16")


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
    warmup_steps: int | None = None  # the three together, in place of the shares `warmup` and `decay`
    stable_steps: int | None = None
    decay_steps: int | None = None
    weight_decay: float = 0.05
    muon: bool = False  # for the matrices at rate `lr`; everything else, and all without it, by AdamW
    accumulate: int = 1  # batches whose gradients are averaged for a step
    clip: float = 1.0
    text_weight: float = 1.0
    save_minutes: float = 0.0  # keep a checkpoint as often, or every `save_steps` (both 0: only when interrupted)
    save_steps: int = 0
    activation_checkpointing: bool = False  # compute a block again in the backward pass (teacher, stage 3)
    image_answer_tokens: int | None = None  # slots a row for learned tokens; None: as many as there are, no graph then
    text_answer_tokens: int | None = None
    round_from: float = 1.0  # progress from which weights are trained as they will be stored (1: never)
    train_decay: bool = True  # students: whether decays and step sizes (A_log, dt_bias) train too
    temperature: float = 1.0  # stage 3: this and the next four as `losses.Objective` has them
    ce_weight: float = 0.0
    all_tokens: bool = False
    reduction: Literal["mean", "sum"] = "mean"
    hidden_weight: float = 0.0

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, str) and f.name != "reduction":
                raise ValueError(f'{f.name}="{value}" is text; write a number, with a point: 1.0e-3, not 1e-3')
            if value is None and "None" not in str(f.type):
                raise ValueError(f"{f.name} is empty; give it a value or leave it out")
        for name in ("steps", "lr", "image_batch", "accumulate", "clip"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} trains nothing; use a value above 0")
        for name in ("text_batch", "max_minutes", "save_minutes", "save_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} is below 0")
        slots = {n: v for n in _ANSWER_TOKENS if (v := getattr(self, n)) is not None}
        if self.objective.all_tokens and slots:
            listed = " and ".join(f"{name}={value}" for name, value in slots.items())
            raise ValueError(f"all_tokens gives every token a slot, and {listed} only some; leave one out")
        self._take_schedule_steps()
        if not (self.warmup >= 0 and self.decay >= 0 and self.warmup + self.decay <= 1):
            raise ValueError(f"warmup={self.warmup} and decay={self.decay} must be shares of the run that fit into 1")

    @property
    def objective(self) -> Objective:
        """What stage 3 minimises.  Raises: ValueError naming a value that is out of range."""
        return Objective(
            all_tokens=self.all_tokens,
            reduction=self.reduction,
            temperature=self.temperature,
            ce_weight=self.ce_weight,
            hidden_weight=self.hidden_weight,
        )

    def check_stage(self, stage: str) -> None:
        """Raises: ValueError for a value that means nothing in this stage."""
        strange = [name for name, stages in _ONLY_IN.items() if stage not in stages and name in self._changed()]
        if strange:
            listed = ", ".join(f"{name}={getattr(self, name)}" for name in strange)
            places = sorted({place for name in strange for place in _ONLY_IN[name]})
            raise ValueError(f"{stage}: {listed} would change nothing; leave it out, or move it to {', '.join(places)}")

    def facts(self) -> dict[str, Any]:
        """All that decides what the stage computes, in plain values."""
        unchanged = _LATER - self._changed()
        return {n: v for n, v in asdict(self).items() if n not in _NO_RESULT and n not in unchanged}

    def _changed(self) -> set[str]:
        """Fields that are not at their defaults."""
        return {f.name for f in fields(self) if getattr(self, f.name) != f.default}

    def _take_schedule_steps(self) -> None:
        given = {name: getattr(self, name) for name in _SCHEDULE_STEPS}
        if all(value is None for value in given.values()):
            return
        listed = ", ".join(f"{name}={value}" for name, value in given.items())
        if any(value is None or value < 0 for value in given.values()):
            raise ValueError(f"{listed}; give all three, none below 0, or none of them")
        if sum(given.values()) != self.steps:
            raise ValueError(f"{listed} add up to {sum(given.values())}, not to steps={self.steps}; make them equal")
        object.__setattr__(self, "warmup", given["warmup_steps"] / self.steps)
        object.__setattr__(self, "decay", given["decay_steps"] / self.steps)

    def lr_factor(self, progress: float) -> float:
        """Learning rate over its peak at `progress` 0..1."""
        if progress < self.warmup:
            return progress / self.warmup
        if progress > 1 - self.decay:
            return max(0.0, (1 - progress) / self.decay)
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The teacher that a recipe is made for; what is None may be anything."""

    num_layers: int | None = None  # of both stacks together
    hidden_size: int | None = None
    tile_px: int | None = None

    def check(self, teacher: ModelConfig) -> None:
        """Raises: ValueError if the teacher is of another shape, naming each difference."""
        found = {
            "num_layers": sum(stack.num_hidden_layers for stack in teacher.stacks),
            "hidden_size": teacher.language.hidden_size,
            "tile_px": teacher.image_size,
        }
        wanted = {name: value for name, value in asdict(self).items() if value is not None}
        if wrong := [f"{name}={found[name]}, not {value}" for name, value in wanted.items() if found[name] != value]:
            raise ValueError(
                f"the teacher does not fit the recipe: it has {', '.join(wrong)}; take the recipe for this teacher, or "
                "copy one from distill/recipes and change its shape"
            )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A model, its data and its stages."""

    name: str
    stages: dict[str, StageConfig]
    shape: Shape = field(default_factory=Shape)
    softmax_layers: tuple[int, ...] = ()  # counted over both stacks, embedding first; the rest become mixers
    image_seqlen: int = 128  # tokens a row, as the language model counts them
    text_seqlen: int = 256
    max_tiles: int = 1  # tiles a picture may be cut into, its thumbnail apart; above 1 rows must be packed
    # Samples of any length, pictures and text, one behind the other in rows of `image_seqlen` tokens. Sources of both
    # are one mixture, `image_batch` counts its rows and `text_batch` is 0; `text_seqlen` bounds a text.
    packed: bool = False
    packed_tiles: int | None = None  # tiles a row, blank ones for those missing: fixed shapes. None: as many as come
    # Of what a student shares with its teacher and no stage trains, and with it of the residual stream between layers.
    # The mixers, all that trains, stay float32.
    frozen_dtype: Literal["float32", "bfloat16"] = "float32"
    pictures: int = 1  # a row; above 1, as many samples of one picture each are joined into a conversation
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
        try:
            raw: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"{path} is no YAML ({' '.join(str(error).split())}); mend it") from error
        if not isinstance(raw, dict):
            raise ValueError(f"{path} holds no fields; start from a file in distill/recipes")
        stages = raw.pop("stages", None) or {}
        _check_keys(raw, {f.name for f in fields(cls)} - {"name", "stages"}, path)
        if not stages or (unknown := sorted(set(stages) - set(STAGES))):
            raise ValueError(f"{path}: stages are {unknown if stages else 'missing'}; use {', '.join(STAGES)}")
        shape = raw.pop("shape", None) or {}
        _check_keys(shape, {f.name for f in fields(Shape)}, path)
        raw["softmax_layers"] = tuple(raw.get("softmax_layers") or ())
        try:
            # In the order in which they run, however the file lists them.
            loaded = {name: _stage(stages[name], name, path) for name in STAGES if name in stages}
            recipe = cls(name=path.stem, stages=loaded, shape=Shape(**shape), **raw)
            recipe.check()
        except ValueError as error:
            raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
        return recipe

    def check(self) -> None:
        """Raises: ValueError for layers that are no layers, or rows and tiles below 1."""
        strange = [i for i in self.softmax_layers if not isinstance(i, int) or i < 0]
        if strange or len(set(self.softmax_layers)) < len(self.softmax_layers):
            raise ValueError(f"softmax_layers {list(self.softmax_layers)}; list numbers from 0 on, each once")
        for name in ("image_seqlen", "text_seqlen", "max_tiles", "pictures"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must be a whole number above 0")
        if self.frozen_dtype not in _FROZEN_DTYPES:
            raise ValueError(f"frozen_dtype={self.frozen_dtype!r} is not known; use {' or '.join(_FROZEN_DTYPES)}")
        if self.shape.num_layers is not None:
            self._check_layers(self.shape.num_layers)
        for name, stage in self.stages.items():
            stage.check_stage(name)
        self._check_packing()

    def _check_packing(self) -> None:
        tiles = self.packed_tiles
        if not isinstance(self.packed, bool):
            raise ValueError(f"packed={self.packed!r} must be true or false")
        if not self.packed:
            if self.max_tiles > 1 or tiles is not None:
                given = f"max_tiles={self.max_tiles}" if self.max_tiles > 1 else f"packed_tiles={tiles}"
                raise ValueError(f"{given} needs rows that hold any number of tiles; set packed: true")
            return
        if self.pictures > 1:
            raise ValueError(f"pictures={self.pictures} and packed exclude each other: a packed row holds what fits")
        if "teacher" in self.stages:
            raise ValueError("a teacher's pictures and text have losses of their own; packed is for students")
        most = self.max_tiles + (self.max_tiles > 1)
        if tiles is not None and (not isinstance(tiles, int) or tiles < most):
            raise ValueError(
                f"packed_tiles={tiles} holds no picture of {most} tiles, thumbnail included; use {most} on"
            )
        for name, stage in self.stages.items():
            if stage.text_batch:
                raise ValueError(f"{name}: text_batch={stage.text_batch}, but packed rows hold text too; set it to 0")
            if tiles is None and stage.image_batch > 1:
                raise ValueError(
                    f"{name}: image_batch={stage.image_batch} rows need equally many tiles each; set packed_tiles"
                )

    def with_reference_objective(self) -> Recipe:
        """The recipe with stage 3 as the published training code has it: the divergence summed over all tokens.

        Raises: ValueError if it has no stage 3, or one that asks for a temperature or cross-entropy.
        """
        stage = self.stages.get("stage3")
        if stage is None:
            raise ValueError(f"recipe {self.name} has no stage3; --all-tokens changes nothing else, so leave it out")
        wanted = Objective.reference()
        for name in ("temperature", "ce_weight", "hidden_weight"):
            if getattr(stage, name) != getattr(wanted, name):
                raise ValueError(
                    f"recipe {self.name} has {name}={getattr(stage, name)} in stage3, and --all-tokens asks for the "
                    "reference's plain divergence; keep one"
                )
        changes = asdict(wanted) | dict.fromkeys(_ANSWER_TOKENS)
        return replace(self, stages=self.stages | {"stage3": replace(stage, **changes)})

    def layer_types(self, teacher: ModelConfig) -> tuple[tuple[LayerType, ...], tuple[LayerType, ...]]:
        """Layer types of the student's two stacks.

        Raises: ValueError if the teacher is of another shape, a layer does not exist or none is left.
        """
        if teacher.kind != "teacher":
            raise ValueError(f"the model is a {teacher.kind} student; pass its teacher, softmax attention everywhere")
        self.shape.check(teacher)
        depths = [stack.num_hidden_layers for stack in teacher.stacks]
        total = sum(depths)
        self._check_layers(total)
        types: list[LayerType] = ["mha" if i in self.softmax_layers else "mamba2" for i in range(total)]
        return tuple(types[: depths[0]]), tuple(types[depths[0] :])

    def _check_layers(self, total: int) -> None:
        if wrong := [i for i in self.softmax_layers if not 0 <= i < total]:
            raise ValueError(f"softmax_layers {wrong} do not exist; the teacher has layers 0 to {total - 1}")
        if len(set(self.softmax_layers)) == total:
            raise ValueError("softmax_layers names every layer, so nothing would train; leave some out")

    def facts(self, stage: str) -> dict[str, Any]:
        """All that decides what a stage computes, in plain values: what a checkpoint of it is compared by."""
        elsewhere = {"stages", "shape", "softmax_layers"}
        unchanged = {f.name for f in fields(self) if f.name in _LATER and getattr(self, f.name) == f.default}
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in elsewhere | unchanged}
        return own | {"softmax_layers": list(self.softmax_layers)} | self.stages[stage].facts()


def _stage(raw: dict[str, Any] | None, name: str, path: Path) -> StageConfig:
    needed = {f.name for f in fields(StageConfig) if f.default is MISSING}
    if absent := sorted(needed - (raw or {}).keys()):
        raise ValueError(f"{path}: {name} misses {', '.join(absent)}")
    assert raw is not None
    _check_keys(raw, {f.name for f in fields(StageConfig)}, path)
    if twice := sorted({"warmup", "decay"} & raw.keys()) if set(_SCHEDULE_STEPS) & raw.keys() else []:
        raise ValueError(f"{path}: {name} gives {', '.join(twice)} as a share and in steps; keep one")
    try:
        return StageConfig(**raw)
    except ValueError as error:
        raise ValueError(f"{path}: {name}: {error}") from error


def _check_keys(raw: dict[str, Any], known: set[str], path: Path) -> None:
    if unknown := sorted(set(raw) - known):
        raise ValueError(f"{path}: {', '.join(unknown)} not known; fields are {', '.join(sorted(known))}")
