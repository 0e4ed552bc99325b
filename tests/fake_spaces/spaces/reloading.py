"""Hot reloading, for a Space's developers; not simulated."""

from __future__ import annotations

from typing import Any


def start_reload_server(*args: Any, **kwargs: Any) -> None:
    """Nothing changes while a test runs."""
