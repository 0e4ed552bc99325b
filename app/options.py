"""The controls for how to answer, and their values by name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from app.errors import EngineError
from app.settings import Limits, Settings

PLAIN: dict[str, Any] = {"buttons": []}


class Options:
    """Components in a fixed order; handlers get their values in it and turn them into settings by name."""

    NAMES = (
        "temperature",
        "top_p",
        "max_new_tokens",
        "max_tiles",
        "greedy",
        "top_k",
        "min_p",
        "repetition_penalty",
        "seed",
        "system",
    )

    def __init__(self, limits: Limits) -> None:
        self.limits = limits

    def values(self, inputs: Sequence[Any]) -> dict[str, Any]:
        """Settings by name from the components' values; an empty seed or system prompt is none."""
        named = dict(zip(self.NAMES, inputs, strict=True))
        return named | {"system": (named["system"] or "").strip() or None, "seed": _whole(named["seed"])}

    def restore(self, settings: Mapping[str, Any]) -> list[Any]:
        """Updates that set the components to saved settings; what this server does not take stays as it is."""
        updates = []
        for name in self.NAMES:
            try:
                Settings.from_dict({name: settings[name]})
                limit = getattr(self.limits, name, math.inf)
                fits = name == "system" or (settings[name] or 0) <= limit
                updates.append(_typed(name, settings[name]) if fits else gr.skip())
            except (KeyError, EngineError, TypeError):
                updates.append(gr.skip())
        return updates

    def layout(self) -> list[Any]:
        """Make the components, the rarely used ones folded away."""
        default, limits = Settings(), self.limits
        often = [
            gr.Slider(0, 2, default.temperature, step=0.05, label="Temperature", info="Higher is more varied", **PLAIN),
            gr.Slider(0.05, 1, default.top_p, step=0.05, label="Top-p", info="Likeliest words up to this sum", **PLAIN),
            gr.Slider(
                1,
                limits.max_new_tokens,
                min(default.max_new_tokens, limits.max_new_tokens),
                step=1,
                label="Max new tokens",
                info="Longest answer",
                **PLAIN,
            ),
            gr.Slider(
                0,
                limits.max_tiles,
                default.max_tiles,
                step=1,
                label="Max tiles",
                info="Pieces of a picture; 0: as trained",
                **PLAIN,
            ),
            gr.Checkbox(default.greedy, label="Greedy", info="Always the likeliest word"),
        ]
        with gr.Accordion("More", open=False, elem_id="more"):
            seldom = [
                gr.Slider(0, 200, default.top_k, step=1, label="Top-k", info="Likeliest words; 0 is off", **PLAIN),
                gr.Slider(0, 0.5, default.min_p, step=0.01, label="Min-p", info="Share of the likeliest", **PLAIN),
                gr.Slider(
                    0.8,
                    2,
                    default.repetition_penalty,
                    step=0.05,
                    label="Repetition penalty",
                    info="Above 1: fewer repeats",
                    **PLAIN,
                ),
                # No gr.Number: an empty one becomes 0 as soon as what it is folded into is opened, and every answer to
                # a question would be the same from then on.
                gr.Textbox(
                    "",
                    label="Seed",
                    info="The same seed, the same answer; empty: another answer each time",
                    max_lines=1,
                    elem_id="seed",
                ),
                gr.Textbox(
                    "",
                    label="System prompt",
                    info="Opens a new chat; empty: as trained",
                    lines=2,
                    max_length=limits.max_text_chars,
                ),
            ]
        return [*often, *seldom]


def _whole(value: Any) -> Any:
    """A whole number as it was typed; None for nothing. What is no number stays, for `Settings` to name."""
    text = str("" if value is None else value).strip()
    return int(text) if text.removeprefix("-").isdecimal() else text or None


def _typed(name: str, value: Any) -> Any:
    """A saved setting as its component takes it."""
    return ("" if value is None else str(value)) if name in ("seed", "system") else value
