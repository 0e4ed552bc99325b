"""The one error that a person using the app gets to read."""

from __future__ import annotations

import re
from typing import Literal

Blame = Literal["request", "busy", "server"]


class EngineError(RuntimeError):
    """A fault in plain words: what came, what fits, what to do. Shown as it is, so it holds no server paths.

    `image` is the index of the image that caused it, if one did. `blame` says who can mend it: whoever asked, by asking
    otherwise ("request") or later ("busy"), or whoever runs the server.
    """

    def __init__(self, message: str, *, image: int | None = None, blame: Blame = "request") -> None:
        super().__init__(message)
        self.image = image
        self.blame: Blame = blame


def plain(error: Exception) -> str:
    """An unexpected fault in words for the person at the page; the log has the rest."""
    if isinstance(error, MemoryError) or "out of memory" in str(error) or "allocate memory" in str(error):
        return "There is not enough memory for this. Use fewer or smaller images, fewer tiles, or a new chat."
    if isinstance(error, ValueError):
        return without_folders(str(error))
    return "Something went wrong inside the model; the conversation is as it was. The server's log has the details."


def without_folders(text: str) -> str:
    """Absolute paths cut to their last part: where things lie on the server is not for its visitors."""
    return re.sub(r"""(?<![\w:/.])(?:[A-Z]:\\|/)(?:[^\s/\\:;,"']+[/\\])+(?=[^\s/\\:;,"'])""", "", text)
