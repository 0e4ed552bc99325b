"""Which models are compared: the one that answers, the other students of its family, and its teacher. Imports no torch:
the page is built before that."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

KINDS = ("linear", "hybrid", "teacher")
BUNDLED_DIR = Path(__file__).resolve().parents[1] / "checkpoints" / "nano"
NANO = ("nano-linear", "nano")  # two names of one model
PUBLISHED = {
    "linear": "hustvl/mmMamba-linear",
    "hybrid": "hustvl/mmMamba-hybrid",
    "teacher": "OpenGVLab/HoVLE",
}


@dataclass(frozen=True)
class Sides:
    """`names` can be compared, the model that answers first; `usual` are, unless somebody chooses others."""

    names: tuple[str, ...]
    usual: tuple[str, ...]

    def called(self, shown: list[str] | None) -> tuple[str, ...]:
        """Those whose last part is in `shown`, in our order; the usual ones if it is empty."""
        return tuple(name for name in self.names if Path(name).name in shown) if shown else self.usual


def sides_of(model: str, teacher: str | None) -> Sides:
    """What stands beside a model. `teacher` None is its family with its teacher as the usual one, "" leaves the
    comparison out; others are named with commas between them, and are all usual."""
    if teacher is not None:
        named = tuple(dict.fromkeys((model, *filter(None, (name.strip() for name in teacher.split(","))))))
        return Sides(named, named)
    family = family_of(model)
    others = [name for name in family.values() if name != model]
    usual = [model, family["teacher"] if family.get("teacher", model) != model else (others or [model])[0]]
    return Sides((model, *others), tuple(dict.fromkeys(usual)))


def family_of(model: str) -> dict[str, str]:
    """The models of one bundle by kind, `model` among them: those of this repository, those published together, or
    those that lie beside a directory (`mmmamba.bundle`). Empty if `model` is known to belong to none."""
    if model in PUBLISHED.values():
        return PUBLISHED
    path = Path(model).expanduser()
    if model in ("nano", *(f"nano-{kind}" for kind in KINDS)):
        family = {kind: f"nano-{kind}" for kind in _in_folder(BUNDLED_DIR)}
        return family | ({"linear": model} if model == "nano" else {})
    if path.name in KINDS and path.is_dir():
        return {kind: str(Path(model).parent / kind) for kind in _in_folder(path.parent)} | {path.name: model}
    return {}


def known_models() -> list[str]:
    """Names to choose from: what is bundled here, and what is published."""
    return [*(f"nano-{kind}" for kind in _in_folder(BUNDLED_DIR)), *PUBLISHED.values()]


def kind_of(model: str) -> str:
    """A model's kind as far as its name tells; "" if it does not."""
    name = Path(model).name
    if name in ("nano", Path(PUBLISHED["teacher"]).name):
        return "linear" if name == "nano" else "teacher"
    return next((kind for kind in KINDS if name == kind or name.endswith(f"-{kind}")), "")


def _in_folder(folder: Path) -> list[str]:
    return [kind for kind in KINDS if (folder / kind / "config.json").is_file()]
