"""How far a reading is from the text: character error rate."""

from __future__ import annotations

from collections.abc import Iterable


def edit_distance(a: str, b: str) -> int:
    """Fewest insertions, deletions and replacements of single characters that turn `a` into `b` (Levenshtein 1966)."""
    if len(a) < len(b):
        a, b = b, a
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def character_error_rate(readings: Iterable[tuple[str, str]]) -> float:
    """Edit distance over the length of the references, of all (reading, reference) pairs together.

    Runs of white space count as one space, ends are cut off, capitals count. Above 1 if a reading is much too long.

    Raises: ValueError if the references hold no characters.
    """
    distance = length = 0
    for reading, reference in readings:
        reading, reference = " ".join(reading.split()), " ".join(reference.split())
        distance += edit_distance(reading, reference)
        length += len(reference)
    if not length:
        raise ValueError("the references hold no characters, so there is no error rate; give readings of some text")
    return distance / length
