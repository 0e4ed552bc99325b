"""How a question about a scene names what it asks for: groups of shapes, single shapes, and places."""

from __future__ import annotations

import random
from dataclasses import dataclass

from distill.data.scene import COLORS, KINDS, Scene, Shape

CLEAR = 0.09  # of the picture's side: what counts as clearly left of, right of, above or below

_PLURAL_ENDING = {"cross": "es"}

# Words for the far end of the picture, the axis (0: x, 1: y), and the direction along it.
_ENDS = (
    (("leftmost",), 0, -1),
    (("rightmost",), 0, 1),
    (("topmost", "highest", "uppermost"), 1, -1),
    (("lowest", "bottommost"), 1, 1),
)


@dataclass(frozen=True)
class Group:
    """All shapes of a kind, of a colour, or of both: "circle(s)", "red shape(s)", "red circle(s)"."""

    kind: str | None = None
    color: str | None = None

    @property
    def singular(self) -> str:
        return " ".join(word for word in (self.color, self.kind or "shape") if word)

    @property
    def plural(self) -> str:
        return self.singular + _PLURAL_ENDING.get(self.kind or "", "s")

    def count(self, scene: Scene) -> int:
        return scene.count(self.kind, self.color)


def groups(scene: Scene) -> list[Group]:
    """Every group that has members, apart from "all shapes", in a fixed order."""
    found = {g for s in scene.shapes for g in (Group(s.kind), Group(None, s.color), Group(s.kind, s.color))}
    return sorted(found, key=lambda g: (g.kind or "", g.color or ""))


def absent_group(scene: Scene, rng: random.Random) -> Group:
    """A group without members, more often one that is nearly there: its kind and its colour are, but not together."""
    kinds, colors = {s.kind for s in scene.shapes}, {s.color for s in scene.shapes}
    near = [Group(k, c) for k in KINDS for c in COLORS if (k in kinds or c in colors) and not scene.count(k, c)]
    crossed = [g for g in near if g.kind in kinds and g.color in colors]
    far = [Group(k) for k in KINDS if k not in kinds] + [Group(None, c) for c in COLORS if c not in colors]
    pool = rng.choices((crossed or near, near, far or near), (2, 1, 2))[0]
    return rng.choice(pool)


def names(scene: Scene, shape: Shape) -> list[str]:
    """The names that mean this shape alone: "red circle", and "circle" or "red shape" where that is enough."""
    named_by = (Group(shape.kind, shape.color), Group(shape.kind), Group(None, shape.color))
    found = [g.singular for g in named_by if g.count(scene) == 1]
    return [*found, "shape"] if len(scene.shapes) == 1 else found


def named(scene: Scene) -> list[Shape]:
    """The shapes that have a name of their own."""
    return [s for s in scene.shapes if scene.count(s.kind, s.color) == 1]


def position(shape: Shape, axis: int) -> float:
    return (shape.x, shape.y)[axis]


def ends(scene: Scene) -> list[tuple[str, Shape]]:
    """("leftmost", shape) and the like, where the next shape is clearly less far out."""
    if len(scene.shapes) < 2:
        return []
    found = []
    for words, axis, sign in _ENDS:
        far, near = sorted(scene.shapes, key=lambda s: -position(s, axis) * sign)[:2]
        if (position(far, axis) - position(near, axis)) * sign >= CLEAR:
            found += [(word, far) for word in words]
    return found


def third(shape: Shape, axis: int) -> int | None:
    """0, 1 or 2 for a centre well inside that third of the picture, else None."""
    for number, (low, high) in enumerate(((0.0, 0.28), (0.4, 0.6), (0.72, 1.0))):
        if low <= position(shape, axis) <= high:
            return number
    return None
