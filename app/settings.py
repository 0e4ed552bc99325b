"""How to answer a message, and what a message may ask for; every value is checked and named in the error."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from app.errors import EngineError

MOST_STOPS, MOST_STOP_CHARS = 4, 100


@dataclass(frozen=True)
class Limits:
    """What one message may ask for, and how far (`max_context`, tokens) and for how many minutes of reading a context
    may be grown. Checked here, since scripts skip the page's own checks."""

    max_text_chars: int = 8000
    max_images: int = 8
    max_tiles: int = 12
    max_new_tokens: int = 1024
    max_context: int = 103_000
    max_minutes: float = 30.0

    def checked(self, text: str | None, images: Sequence[object], settings: Settings | None) -> Settings:
        """`settings`, or the usual ones.  Raises: EngineError if the message is over a limit of this server."""
        settings = settings or Settings()
        for what, words in (("message", text), ("system prompt", settings.system)):
            if words is not None and len(words) > self.max_text_chars:
                raise EngineError(
                    f"The {what} has {len(words):,} characters; {self.max_text_chars:,} fit. "
                    f"{'Send it in parts.' if what == 'message' else 'Make it shorter.'}"
                )
        if text is not None and not text.strip():
            raise EngineError("The message is empty. Type a question.")
        if len(images) > self.max_images:
            raise EngineError(
                f"The message has {len(images)} images; {self.max_images} fit. Send the others with the next message."
            )
        for name in ("max_new_tokens", "max_tiles"):
            value, limit = getattr(settings, name), getattr(self, name)
            if value > limit:
                raise EngineError(f"{name} is {value}; this server allows up to {limit}.")
        return settings


@dataclass(frozen=True)
class Settings:
    """How to answer. `max_tiles` 0 is what the model was made for, `top_k` 0 and `min_p` 0 are off; `greedy` leaves of
    sampling only the penalty. `system` opens a new conversation; None is the model's own opening. `stop` are texts that
    end the answer before they are shown.

    Raises: EngineError naming the setting, its value and what fits.
    """

    temperature: float = 0.3
    top_p: float = 0.9
    max_new_tokens: int = 256
    max_tiles: int = 0
    greedy: bool = False
    seed: int | None = None
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    system: str | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "max_tiles", "seed", "top_k"):
            value = getattr(self, name)
            if name == "seed" and value is None:
                continue
            if not _is_number(value) or value != int(value):
                raise EngineError(f"{name} is {value!r}; use a whole number.")
            object.__setattr__(self, name, int(value))
        for name, low, high in (
            ("temperature", 0.0, 2.0),
            ("top_p", 0.01, 1.0),
            ("max_new_tokens", 1, math.inf),
            ("max_tiles", 0, math.inf),
            ("seed", 0, 2**63 - 1),
            ("top_k", 0, math.inf),
            ("min_p", 0.0, 0.99),
            ("repetition_penalty", 0.5, 2.0),
        ):
            value = getattr(self, name)
            if value is None:
                continue
            if not _is_number(value) or not low <= value <= high:
                fits = f"{low} or more" if high == math.inf else f"a number from {low} to {high}"
                raise EngineError(f"{name} is {value!r}; use {fits}.")
        if not isinstance(self.greedy, bool):
            raise EngineError(f"greedy is {self.greedy!r}; use true or false.")
        if self.system is not None and not isinstance(self.system, str):
            raise EngineError(f"system is {self.system!r}; use a text.")
        whole = all(isinstance(s, str) and 0 < len(s) <= MOST_STOP_CHARS for s in self.stop)
        if len(self.stop) > MOST_STOPS or not whole:
            raise EngineError(
                f"stop is {list(self.stop)!r}; use up to {MOST_STOPS} texts of 1 to {MOST_STOP_CHARS} characters."
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Settings:
        """Settings by name, as they come from a page or a script."""
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                raise EngineError(f'There is no setting "{name}"; the settings are {", ".join(known)}.')
        return cls(**values)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
