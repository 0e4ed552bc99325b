"""What scripts call through `gradio_client`: /chat, /compare, /benchmark, /info. docs/api.md has examples of each."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import wraps
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any, Self, TypeVar

import gradio as gr
from gradio.components.multimodal_textbox import MultimodalData

from app.chat import Chat
from app.compare import Compare
from app.engine import Engine, EngineError, Limits, Settings
from app.grow import CONTEXTS, Grow
from app.records import (
    BenchmarkRecord,
    ChatRecord,
    CompareRecord,
    InfoRecord,
    benchmark_record,
    chat_record,
    compare_record,
    info_record,
)
from app.sessions import Sessions, new_session_id
from app.sides import Sides

log = logging.getLogger(__name__)
T = TypeVar("T")

REPEAT_S = 0.4  # without news a script hears the same again, so that one that has left is noticed
MOST_COMPARISONS = 64  # conversations with both models that are held for scripts
# Names of the parameters after message and session_id, in order; those added later stand at the end.
SETTINGS: tuple[str, ...] = ("temperature", "top_p", "max_new_tokens", "max_tiles", "greedy", "seed")
SETTINGS += ("top_k", "min_p", "repetition_penalty", "system")
UNKNOWN_SESSION = "This session_id is not known: it has ended or was unused for long. Leave it empty to start anew."


class ScriptMessage(MultimodalData):
    """What `message` must be, said in plain words: Gradio's own check tells a script nothing."""

    @classmethod
    def model_validate(cls, value: Any, **how: Any) -> Self:  # type: ignore[override]
        """A text alone is a message without files.  Raises: gr.Error naming what came and what fits."""
        message = {"text": value} if isinstance(value, str) else value
        if not isinstance(message, dict) or not isinstance(message.get("text", ""), str):
            raise gr.Error(f'message is {value!r:.80}; use {{"text": "...", "files": [...]}}.', print_exception=False)
        files = message.get("files") or []
        if not isinstance(files, list) or any(isinstance(file, str) for file in files):
            raise gr.Error("files are no files; send each through handle_file(path).", print_exception=False)
        return super().model_validate({"text": message.get("text", ""), "files": files}, **how)


class Endpoints:
    """Functions behind the endpoints, over one engine. `sides` are the models that /compare and /benchmark take."""

    def __init__(self, engine: Engine, sides: Sides, states: Path | None = None) -> None:
        self.engine, self.sides = engine, sides
        self.compares: Sessions[Compare] = Sessions(MOST_COMPARISONS)
        self._states = states

    def chat(self, message: dict[str, Any] | None, session_id: str = "", *options: Any) -> Iterator[ChatRecord]:
        """Ask about images, or go on with a conversation; streams the answer.

        Each update holds the whole answer so far: {"text", "stage", "finish_reason" (null until the last update, then
        "stop", "length" or "cancel"), "metrics" ("ttft_ms", "tok_per_sec", "num_tokens", "num_tiles", "text_tokens",
        "image_tokens", "state_bytes", ...), "ahead" and "wait_s" (while others come first), "session_id" (pass it with
        the next message to go on)}.
        """
        text, files = _parts(message)
        chat: Chat | None = None
        try:
            settings = _settings(options, session_id)
            session_id = str(session_id or "").strip()
            chat = self.engine.chats.get(("api", session_id)) if session_id else None
            if session_id and chat is None:
                raise EngineError(UNKNOWN_SESSION)
            if chat is None:
                session_id = new_session_id()
                chat = self.engine.chats.new(("api", session_id))
            for reply in news(self.engine.reply(chat, text, files, settings)):
                yield chat_record(reply, session_id)
        except EngineError as error:
            if chat is not None and not chat.turns:
                self.engine.chats.drop(("api", session_id))
            raise gr.Error(str(error), print_exception=False) from error

    def compare(
        self, message: dict[str, Any] | None, session_id: str = "", *options_and_models: Any
    ) -> Iterator[CompareRecord]:
        """Ask the student and its teacher the same, one after the other; streams both answers with what they cost.

        `models` are two or more of those that /info tells under "compared"; without it the student and its teacher.
        Each update: {"sides": [{"model", "kind", "precision", "stage", "text", "note", "figures" ("ttft_ms",
        "ms_per_token", "tok_per_sec", "num_tokens", "text_tokens", "image_tokens", "recurrent_bytes", "cache_bytes",
        "peak_bytes", "context")}], "agreement" ("share", "same_words", "says"; of the first and the last answer, null
        until all are whole), "agreements" (by model, of each with the last), "ahead", "wait_s", "done", "session_id"
        (pass it with the next message: all go on from their states)}.
        """
        text, files = _parts(message)
        *options, models = options_and_models
        compare: Compare | None = None
        try:
            if len(self.sides.names) < 2:
                raise EngineError("This server compares with no teacher. Start app.py with --teacher MODEL.")
            names = self.sides.called(models)
            if len(names) < 2:
                raise EngineError(f"models is {models!r}; name two or more of those that /info tells.")
            settings = _settings(options, session_id)
            session_id = str(session_id or "").strip()
            compare = self.compares.get(("compare", session_id)) if session_id else None
            if session_id and compare is None:
                raise EngineError(UNKNOWN_SESSION)
            if compare is not None and models and compare.names != names:
                raise EngineError(
                    "A session compares the models that it began with; leave session_id empty for others."
                )
            if compare is None:
                session_id, compare = new_session_id(), Compare(self.engine, names)
                self.compares.put(("compare", session_id), compare)
            if compare.busy:
                raise EngineError("Both models are still answering in this session. Wait for that.", blame="busy")
            for view in news(compare.ask(text, files, settings)):
                yield compare_record(view, session_id)
        except EngineError as error:
            if compare is not None and not any(chat.turns for chat in compare.chats.values()):
                self.compares.drop(("compare", session_id))
            raise gr.Error(str(error), print_exception=False) from error

    def benchmark(
        self,
        longest: float = CONTEXTS[1],
        minutes: float = 3,
        image: str | None = None,
        models: list[str] | None = None,
    ) -> Iterator[BenchmarkRecord]:
        """Measure the same question after 1K, 4K, 16K, 64K and 103K tokens, up to `longest`, with each model in turn.

        `minutes` bounds the reading of each model; `image` is shown in every turn, without it the context is text;
        `models` are some of those that /info tells, without it the student and its teacher. Each update: {"doing",
        "points" ("model", "context", "ttft_ms", "ms", "p20_ms", "p80_ms", "recurrent_bytes", "cache_bytes",
        "peak_bytes", "read_s", ...), "predictions" (by model: "end_tokens", "contexts", "ms", "bytes"), "ends" (by
        model, why it goes no further), "precisions" (by model), "done"}.
        """
        try:
            if not all(isinstance(value, int | float) and math.isfinite(value) for value in (longest, minutes)):
                raise EngineError(f"longest is {longest!r} and minutes {minutes!r}; use numbers.")
            grow = Grow(self.engine, self.sides.called(models), self._states)
            for growth in news(grow.run(int(longest), 60 * minutes, image or None)):
                if growth.error:
                    raise EngineError(growth.error)
                yield benchmark_record(growth, int(longest))
        except EngineError as error:
            raise gr.Error(str(error), print_exception=False) from error

    def info(self) -> InfoRecord:
        """The model, how far it is with loading, the limits of this server, and how many messages wait.

        {"model", "kind", "device", "dtype", "precision" (of the weights), "max_tiles", "state_bytes" (null until it is
        loaded), "status" ("stage", "progress", "note"), "compared" (models of /compare and /benchmark), "contexts",
        "limits", "waiting", "max_waiting"}.
        """
        return info_record(self.engine, self.sides.names)


def news(states: Iterable[T]) -> Iterator[T]:
    """Those that differ from the one before, and the same again every `REPEAT_S`."""
    shown, last = None, 0.0
    for state in states:
        if state != shown or time.monotonic() - last >= REPEAT_S:
            shown, last = state, time.monotonic()
            yield state


def _parts(message: dict[str, Any] | None) -> tuple[str, list[str]]:
    message = message or {}
    return message.get("text") or "", list(message.get("files") or [])


def _settings(options: Sequence[Any], session_id: str) -> Settings:
    """Settings from the values of `_options`, in their order.  Raises: EngineError naming the one that does not fit."""
    values = dict(zip(SETTINGS, options, strict=True))
    if isinstance(values["system"], str):
        values["system"] = values["system"].strip() or None
    if values["system"] and str(session_id or "").strip():
        raise EngineError("system opens a new conversation; leave it out where session_id goes on with one.")
    return Settings.from_dict(values)


def _options(limits: Limits) -> list[Any]:
    """Components for `SETTINGS`, in that order. They say what fits; `Settings` checks it, and names what does not."""
    default = Settings()
    hidden: dict[str, Any] = {"visible": False}
    tokens = min(default.max_new_tokens, limits.max_new_tokens)
    options: list[Any] = [
        gr.Slider(0, 2, default.temperature, label="temperature", **hidden),
        gr.Slider(0.01, 1, default.top_p, label="top_p", **hidden),
        gr.Slider(1, limits.max_new_tokens, tokens, label="max_new_tokens", **hidden),
        gr.Slider(0, limits.max_tiles, default.max_tiles, label="max_tiles", **hidden),
        gr.Checkbox(default.greedy, label="greedy", **hidden),
        gr.Number(None, label="seed", **hidden),
        gr.Number(default.top_k, label="top_k", **hidden),
        gr.Slider(0, 0.99, default.min_p, label="min_p", **hidden),
        gr.Slider(0.5, 2, default.repetition_penalty, label="repetition_penalty", **hidden),
        gr.Textbox("", label="system", **hidden),
    ]
    for option in options:
        # Gradio's own check tells a value and its limit, not whose they are, and falls over what is no number.
        option.preprocess = lambda value: value
    return options


def layout(endpoints: Endpoints, limits: Limits) -> None:
    """Register the endpoints. Components of their own: they check the files' types."""
    hidden: dict[str, Any] = {"visible": False}
    for name, handler in (("chat", endpoints.chat), ("compare", endpoints.compare)):
        message = gr.MultimodalTextbox(label="message", file_types=["image"], file_count="multiple", **hidden)
        message.data_model = ScriptMessage
        session = gr.Textbox("", label="session_id", **hidden)
        more = {"models": _models(endpoints.sides)} if name == "compare" else {}
        _public(_named(handler, *more), [message, session, *_options(limits), *more.values()], name)
    longest = gr.Number(min(CONTEXTS[1], limits.max_context), label="longest", precision=0, **hidden)
    minutes = gr.Number(min(3, limits.max_minutes), label="minutes", **hidden)
    numbers: list[Any] = [longest, minutes]
    for number in numbers:
        number.preprocess = lambda value: value  # `benchmark` checks it, and names it
    image = gr.File(label="image", file_types=["image"], type="filepath", **hidden)
    _public(endpoints.benchmark, [longest, minutes, image, _models(endpoints.sides)], "benchmark")
    _public(endpoints.info, [], "info", queue=False)


def _models(sides: Sides) -> gr.CheckboxGroup:
    """Some of the models; none is the usual ones."""
    return gr.CheckboxGroup([Path(name).name for name in sides.names], value=[], label="models", visible=False)


def _named(handler: Callable[..., Iterator[Any]], *more: str) -> Callable[..., Iterator[Any]]:
    """`handler` with its settings as parameters by name, for those who call it by them; `more` stand at the end."""

    @wraps(handler)
    def call(*values: Any) -> Iterator[Any]:
        yield from handler(*values)

    defaults = {"session_id": ""} | {name: getattr(Settings(), name) for name in SETTINGS} | {"system": ""}
    defaults |= {name: [] for name in more}
    named = [Parameter("message", Parameter.POSITIONAL_OR_KEYWORD)]
    named += [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=value) for name, value in defaults.items()]
    call.__signature__ = Signature(named)  # type: ignore[attr-defined]
    return call


def _public(handler: Any, inputs: list[Any], name: str, **event: Any) -> None:
    answer = gr.JSON(label="answer", visible=False)
    gr.Button(visible=False).click(
        handler, inputs, answer, api_name=name, api_visibility="public", show_progress="hidden", **event
    )
