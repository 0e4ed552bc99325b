"""What a scheme does to which weight."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

from mmmamba.packing import PackedSpec

log = logging.getLogger(__name__)

Method = Literal["packed", "bitsandbytes"]
TABLE = "embedding.text.weight"
HEAD = "language.output.weight"
# Eight bits at least: the head's rounding goes into every logit, and the projection behind pixel shuffle is small and
# not read for a token of text.
WIDE_BITS = 8
WIDE_GROUPS = (64, 32)


@dataclass(frozen=True)
class Scheme:
    """A way to store the weights of linear layers. `bits` and `group_size` (None: a row is one group) are those of the
    layers; norms, convolutions, decays, biases and the image stem stay as they are."""

    name: str
    method: Method
    bits: int
    group_size: int | None = None

    @property
    def takes_tables(self) -> bool:
        """Whether embedding table and output head are packed too."""
        return self.method == "packed"

    def wants(self, name: str) -> bool:
        """Whether the parameter of ours is a weight that this scheme would pack, its shape aside."""
        if name in (TABLE, HEAD):
            return self.takes_tables
        return name.endswith((".in_proj.weight", ".out_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight")) or (
            _is_shuffle(name)
        )

    def spec(self, name: str, shape: tuple[int, ...]) -> PackedSpec | None:
        """How to pack a wanted weight, or None (with a note in the log) if its rows do not divide into groups."""
        bits, cols = self.bits_of(name), shape[-1]
        group = cols if self.group_size is None else self.group_size
        if bits != self.bits:
            group = next((g for g in WIDE_GROUPS if cols % g == 0), cols)
        if cols % group or group % 4:
            log.warning(
                "group_size=%d does not divide rows of %d in %s; it stays in floating point. 32 or 64 may divide them",
                group,
                cols,
                name,
            )
            return None
        return PackedSpec(bits, group, shape)

    def grids(self, name: str) -> tuple[int, ...]:
        """Bits of grids that a weight stays on if it lies on one: nothing is lost then. (4 bits are no grid of int8: it
        would be another scheme by the name of this one.)"""
        return (4,) if self.bits_of(name) == 4 else (6, 8)

    def bits_of(self, name: str) -> int:
        return max(self.bits, WIDE_BITS) if name in (TABLE, HEAD) or _is_shuffle(name) else self.bits


def _is_shuffle(name: str) -> bool:
    return ".shuffle_proj." in name and name.endswith(".weight")


_ALL = (
    Scheme("int8", "packed", 8),
    Scheme("int4", "packed", 4, 64),
    Scheme("bnb-int8", "bitsandbytes", 8),
    Scheme("bnb-nf4", "bitsandbytes", 4, 64),
)
SCHEMES = {scheme.name: scheme for scheme in _ALL}


def find_scheme(name: str, group_size: int | None = None) -> Scheme:
    """A scheme by name, for `int4` with groups of another size.

    Raises: ValueError if there is no such scheme, or its groups have one size only.
    """
    if name not in SCHEMES:
        raise ValueError(f'scheme "{name}" is not known; use one of {", ".join(SCHEMES)}')
    scheme = SCHEMES[name]
    if group_size is None or group_size == scheme.group_size:
        return scheme
    if scheme.name != "int4":
        raise ValueError(f"group_size={group_size} does not apply to {name}; leave it out, or use int4")
    if group_size < 4 or group_size % 4:
        raise ValueError(f"group_size={group_size} must be a multiple of 4; use 32, 64 or 128")
    return Scheme(name, scheme.method, scheme.bits, group_size)
