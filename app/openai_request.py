"""Bodies of OpenAI's chat completions, read into turns and settings; what this server cannot do is refused by name.

Pure, but for pictures: they come as data: URLs and are decoded once, to be sure that they are pictures.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.errors import EngineError
from app.settings import Limits, Settings

DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,", re.IGNORECASE)
# Parameter -> setting. The last three are none of OpenAI's: `extra_body` of its package carries them.
SETTINGS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "seed": "seed",
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
}
# Parameters that ask for nothing if they have this value.
NEUTRAL: Mapping[str, Any] = {
    "n": 1,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logprobs": False,
    "logit_bias": {},
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "tools": [],
    "tool_choice": "none",
    "top_logprobs": 0,
}
# About the caller or the account, not about the answer.
IGNORED = ("user", "metadata", "store", "safety_identifier", "prompt_cache_key", "service_tier", "parallel_tool_calls")
MOST_TURNS, MOST_IMAGES, MOST_REPLY_CHARS = 500, 200, 2**18
KNOWN = ("model", "messages", "stream", "stream_options", "stop", *SETTINGS)


class BadRequest(EngineError):
    """A body that cannot be answered; `param` is the parameter at fault."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True)
class Said:
    """One turn: what was asked, with encoded pictures, and what was answered (None: to be answered now)."""

    text: str
    images: tuple[bytes, ...] = ()
    max_tiles: int = 0
    reply: str | None = None


@dataclass(frozen=True)
class ChatRequest:
    """`turns` are those before the question; `system` None is the model's own opening."""

    model: str
    system: str | None
    turns: tuple[Said, ...]
    question: Said
    settings: Settings
    stream: bool = False
    include_usage: bool = False


def read_request(body: Any, limits: Limits) -> ChatRequest:
    """Raises: BadRequest, with the parameter, for what is wrong, unknown or over a limit."""
    if not isinstance(body, dict):
        raise BadRequest("The body is no JSON object.", "")
    values = {name: value for name, value in body.items() if value is not None}
    for name, value in values.items():
        if name in NEUTRAL and value != NEUTRAL[name]:
            raise BadRequest(f"{name} is {value!r}; this server takes {NEUTRAL[name]!r} alone.", name)
        if name not in (*KNOWN, *NEUTRAL, *IGNORED):
            raise BadRequest(f'This server has no parameter "{name}".', name)
    model = values.get("model")
    if not isinstance(model, str):
        raise BadRequest("model is missing; GET /v1/models lists what there is.", "model")
    system, turns, question = _turns(values.get("messages"), limits)
    try:
        settings = _settings(values, system, question.max_tiles, limits)
        limits.checked(question.text, question.images, settings)
    except BadRequest:
        raise
    except EngineError as error:
        raise BadRequest(str(error), "messages") from error
    stream, options = values.get("stream", False), values.get("stream_options", {})
    if not isinstance(stream, bool):
        raise BadRequest(f"stream is {stream!r}; use true or false.", "stream")
    if not isinstance(options, dict) or not set(options) <= {"include_usage", "include_obfuscation"}:
        raise BadRequest(f"stream_options is {options!r}; it may hold include_usage.", "stream_options")
    return ChatRequest(model, system, turns, question, settings, stream, bool(options.get("include_usage")))


def _settings(values: Mapping[str, Any], system: str | None, max_tiles: int, limits: Limits) -> Settings:
    given: dict[str, Any] = {"max_new_tokens": min(Settings().max_new_tokens, limits.max_new_tokens)}
    for name, setting in SETTINGS.items():
        if name in values:
            try:
                Settings.from_dict({setting: values[name]})
            except EngineError as error:
                raise BadRequest(str(error).replace(setting, name, 1), name) from error
            if setting == "max_new_tokens" and values[name] > limits.max_new_tokens:
                fits = f"this server allows up to {limits.max_new_tokens}"
                raise BadRequest(f"{name} is {values[name]}; {fits}.", name)
            given[setting] = values[name]
    stop = values.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list):
        raise BadRequest(f"stop is {stop!r}; use a text or a list of texts.", "stop")
    try:
        return Settings(**given, system=system, max_tiles=max_tiles, stop=tuple(stop))
    except EngineError as error:
        raise BadRequest(str(error), "stop") from error


def _turns(messages: Any, limits: Limits) -> tuple[str | None, tuple[Said, ...], Said]:
    """System prompt, whole turns, and the question. Neighbours of one role are put together."""
    if not isinstance(messages, list) or not messages:
        raise BadRequest("messages is missing or empty; it holds what was said, the question last.", "messages")
    system: str | None = None
    turns: list[Said] = []
    asked: Said | None = None
    for i, message in enumerate(messages):
        where = f"messages.{i}"
        role = message.get("role") if isinstance(message, dict) else None
        if role in ("system", "developer"):
            if turns or asked:
                raise BadRequest(f"{where} has the role {role}; it can only stand first.", where)
            text = _content(message, where, limits).text
            system = text if system is None else f"{system}\n\n{text}"
        elif role == "user":
            new = _content(message, where, limits)
            asked = new if asked is None else _joined(asked, new)
        elif role == "assistant":
            reply = _content(message, where, limits).text
            if message.get("tool_calls") or message.get("function_call"):
                raise BadRequest(f"{where} calls a tool; this server has none.", where)
            if asked is not None:
                turns.append(Said(asked.text, asked.images, asked.max_tiles, reply))
                asked = None
            elif turns:
                last = turns[-1]
                turns[-1] = Said(last.text, last.images, last.max_tiles, f"{last.reply}\n\n{reply}")
            else:
                raise BadRequest(f"{where} is an answer without a question before it.", where)
        else:
            raise BadRequest(f"{where} has the role {role!r}; use system, user or assistant.", where)
    if asked is None:
        raise BadRequest("The last message must be the user's.", "messages")
    _check_history(turns, limits)
    return system, tuple(turns), asked


def _joined(first: Said, second: Said) -> Said:
    text = "\n\n".join(filter(None, (first.text, second.text)))
    return Said(text, (*first.images, *second.images), max(first.max_tiles, second.max_tiles))


def _content(message: Mapping[str, Any], where: str, limits: Limits) -> Said:
    """Texts and pictures of one message. Pictures of low detail are one tile."""
    content = message.get("content")
    if isinstance(content, str):
        return Said(content)
    if not isinstance(content, list):
        raise BadRequest(f"{where}.content is no text and no list of parts.", where)
    texts: list[str] = []
    images: list[bytes] = []
    low: list[bool] = []
    for j, part in enumerate(content):
        place = f"{where}.content.{j}"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image_url" and isinstance(part.get("image_url"), dict) and message.get("role") == "user":
            image = part["image_url"]
            images.append(_picture(image.get("url"), place))
            low.append(image.get("detail") == "low")
            if len(images) > limits.max_images:
                raise BadRequest(f"{where} has more than {limits.max_images} images; send the others later.", where)
        else:
            raise BadRequest(f"{place} has the type {kind!r}; use text, and image_url in the user's messages.", place)
    return Said("\n\n".join(texts), tuple(images), int(bool(low) and all(low)))


def _picture(url: Any, place: str) -> bytes:
    from mmmamba.image import ImageError, load_image

    if not isinstance(url, str) or not (head := DATA_URL.match(url)):
        what = "no text" if not isinstance(url, str) else repr(url[:40])
        raise BadRequest(f"{place} is {what}; this server fetches nothing: send data:image/png;base64,...", place)
    try:
        data = base64.b64decode(url[head.end() :], validate=True)
        load_image(data)
    except (binascii.Error, ImageError) as error:
        raise BadRequest(f"{place} cannot be read as an image: {error}", place) from error
    return data


def _check_history(turns: Sequence[Said], limits: Limits) -> None:
    """What was said before has limits too: all of it may have to be read again."""
    num_images = sum(len(turn.images) for turn in turns)
    if len(turns) > MOST_TURNS or num_images > MOST_IMAGES:
        had = f"messages hold {len(turns)} turns and {num_images} images before the question"
        raise BadRequest(f"{had}; {MOST_TURNS} and {MOST_IMAGES} fit.", "messages")
    for turn in turns:
        for text, most in ((turn.text, limits.max_text_chars), (turn.reply or "", MOST_REPLY_CHARS)):
            if len(text) > most:
                raise BadRequest(f"An earlier message has {len(text):,} characters; {most:,} fit.", "messages")
