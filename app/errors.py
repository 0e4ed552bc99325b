"""The one error that a person using the app gets to read."""

from __future__ import annotations


class EngineError(RuntimeError):
    """A fault in plain words: what came, what fits, what to do. Shown as it is, so it holds no server paths.

    `image` is the index of the image that caused it, if one did.
    """

    def __init__(self, message: str, *, image: int | None = None) -> None:
        super().__init__(message)
        self.image = image
