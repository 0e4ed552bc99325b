"""OpenAI's /v1/chat/completions and /v1/models on the page's own port, over the same engine and its one lane."""

from __future__ import annotations

import hmac
import json
import logging
import secrets
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.context import LocalContext
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from app.chat import Chat
from app.engine import Engine, EngineError, Reply
from app.openai_request import BadRequest, ChatRequest, Said, read_request
from app.prefixes import Prefixes
from app.sides import NANO

log = logging.getLogger(__name__)

MOST_BODY_BYTES = 64 << 20
STATUS = {"request": 400, "busy": 429, "server": 500}
TYPES = {400: "invalid_request_error", 429: "rate_limit_error", 500: "server_error"}


class Gone(Exception):
    """The client has closed its connection."""


class OpenAIAPI:
    """The routes. `keys` are the accepted API keys; none: everybody may ask."""

    def __init__(self, engine: Engine, keys: Sequence[str] = ()) -> None:
        self.engine, self.keys = engine, tuple(keys)
        self.prefixes = Prefixes(engine.chats.states)
        self._started = int(time.time())

    def routes(self) -> list[BaseRoute]:
        """For the FastAPI application that serves the page."""
        return [
            Route("/v1/chat/completions", self.completions, methods=["POST"]),
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/models/{name:path}", self.model, methods=["GET"]),
        ]

    async def models(self, request: Request) -> Response:
        if (refused := self._refused(request)) is not None:
            return refused
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        if (refused := self._refused(request)) is not None:
            return refused
        name = request.path_params["name"]
        return JSONResponse(self._card()) if name in self._names() else self._no_model(name)

    async def completions(self, request: Request) -> Response:
        """Answer, in one piece or as server-sent events; errors in OpenAI's form."""
        if (refused := self._refused(request)) is not None:
            return refused
        try:
            body = await _body(request)
            if body is None:
                return _error(413, f"The body has more than {MOST_BODY_BYTES >> 20} MiB.", code="too_large")
            asked = await run_in_threadpool(read_request, body, self.engine.limits)
            if asked.model not in self._names():
                return self._no_model(asked.model)
            LocalContext.request.set(gr.Request(request))  # ZeroGPU counts GPU time by it
            chunks = _Chunks(Path(self.engine.model).name, asked)
            if asked.stream:
                replies = self._answer(request, asked)
                first = await anext(replies)  # what is refused at once still gets its status
                events = self._events(chunks, first, replies)
                headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
                return StreamingResponse(events, media_type="text/event-stream", headers=headers)
            async for reply, cached in self._answer(request, asked):
                last = reply, cached
            return JSONResponse(chunks.whole(*last))
        except EngineError as error:
            return _of(error)
        except Gone:
            return Response(status_code=499)  # nobody reads it
        except Exception:
            log.exception("a completion failed")
            return _error(500, "Something went wrong on the server; its log has the details.")

    async def _events(
        self, chunks: _Chunks, first: tuple[Reply, int], replies: AsyncIterator[tuple[Reply, int]]
    ) -> AsyncIterator[str]:
        try:
            for event in chunks.events(*first):
                yield event
            async for reply, cached in replies:
                for event in chunks.events(reply, cached):
                    yield event
        except EngineError as error:
            yield f"data: {json.dumps(_content(error), ensure_ascii=False)}\n\n"
        except Gone:
            return
        except Exception:
            log.exception("a completion failed")
            yield f"data: {json.dumps({'error': {'message': 'Something went wrong.', 'type': 'server_error'}})}\n\n"
        finally:
            await replies.aclose()  # type: ignore[attr-defined]
        yield "data: [DONE]\n\n"

    async def _answer(self, request: Request, asked: ChatRequest) -> AsyncIterator[tuple[Reply, int]]:
        """Replies, and how many tokens before the message had not to be read.  Raises: EngineError; Gone."""
        question, settings = asked.question, asked.settings
        key, chat = await run_in_threadpool(self.prefixes.take, asked.system, asked.turns)
        cancel = threading.Event()
        added: tuple[str | None, list[Said]] | None = None
        before = chat.head
        replies: Iterator[Reply] | None = None
        try:
            images = await run_in_threadpool(self.prefixes.files, question.images)
            replies = self.engine.reply(chat, question.text, images, settings, cancel)
            while (reply := await run_in_threadpool(next, replies, None)) is not None:
                cached = 0
                if before is not None and not reply.metrics.resumed.reread:
                    cached = before.metrics.text_tokens + before.metrics.image_tokens
                if reply.stage == "done" and reply.finish_reason != "cancel":
                    added = asked.system, [*asked.turns, replace(question, reply=reply.text)]
                yield reply, cached
                if await request.is_disconnected():
                    raise Gone
        finally:
            # Also when the task is cancelled: what waits is dropped, what is written ends.
            cancel.set()
            if replies is not None:
                replies.close()  # type: ignore[attr-defined]
            if added is not None and settings.stop:
                self._forget_state(chat)
            self.prefixes.give_back(key, added)

    def _forget_state(self, chat: Chat) -> None:
        """A state that has seen a stop text, which no client sends back, is not the answer's: it is read again."""
        if chat.head is not None:
            for kept in chat.head.snapshots.values():
                self.engine.chats.states.release(kept)
            chat.head.snapshots.clear()

    def _names(self) -> tuple[str, ...]:
        model = self.engine.model
        return (Path(model).name, model, *(NANO if model in NANO else ()))

    def _card(self) -> dict[str, Any]:
        return {"id": self._names()[0], "object": "model", "created": self._started, "owned_by": "mmmamba"}

    def _no_model(self, name: str) -> Response:
        message = f'The model "{name}" does not exist here; this server has "{self._names()[0]}".'
        return _error(404, message, param="model", code="model_not_found")

    def _refused(self, request: Request) -> Response | None:
        """An answer to those without a key, if there are keys."""
        if not self.keys:
            return None
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        if any(hmac.compare_digest(given, key.encode()) for key in self.keys):
            return None
        message = "This API key is not known; use USER:PASSWORD of the page as the key."
        return _error(401, message, code="invalid_api_key")


class _Chunks:
    """One completion in OpenAI's form, whole or in pieces."""

    def __init__(self, model: str, asked: ChatRequest) -> None:
        self.asked = asked
        self.head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._sent: int | None = None  # characters

    def whole(self, reply: Reply, cached: int) -> dict[str, Any]:
        message = {"role": "assistant", "content": reply.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _reason(reply)}
        return self.head | {"object": "chat.completion", "choices": [choice], "usage": usage(reply, cached)}

    def events(self, reply: Reply, cached: int) -> Iterator[str]:
        if self._sent is None:
            self._sent = 0
            yield self._event({"role": "assistant", "content": ""})
        if new := reply.text[self._sent :]:
            self._sent = len(reply.text)
            yield self._event({"content": new})
        if reply.stage == "done":
            yield self._event({}, _reason(reply))
            if self.asked.include_usage:
                yield self._line([], usage(reply, cached))

    def _event(self, delta: dict[str, str], reason: str | None = None) -> str:
        return self._line([{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}], None)

    def _line(self, choices: list[dict[str, Any]], used: dict[str, Any] | None) -> str:
        chunk = self.head | {"object": "chat.completion.chunk", "choices": choices}
        if self.asked.include_usage:
            chunk["usage"] = used
        return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"


def usage(reply: Reply, cached: int) -> dict[str, Any]:
    """Tokens of the whole conversation up to the answer, images among them, and of the answer."""
    metrics = reply.metrics
    context = metrics.text_tokens + metrics.image_tokens
    prompt = max(0, context - metrics.num_tokens)
    details = {
        "cached_tokens": cached,
        "image_tokens": metrics.image_tokens,
        "text_tokens": prompt - metrics.image_tokens,
    }
    return {
        "prompt_tokens": prompt,
        "completion_tokens": metrics.num_tokens,
        "total_tokens": context,
        "prompt_tokens_details": details,
    }


def _reason(reply: Reply) -> str:
    return "length" if reply.finish_reason == "length" else "stop"


async def _body(request: Request) -> Any:
    """The body as JSON; None if it is too large.  Raises: BadRequest."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        # Also a guard: a page of another site cannot send this type without asking first.
        raise BadRequest("Send the body as JSON, with Content-Type: application/json.", "")
    data = bytearray()
    async for piece in request.stream():
        data += piece
        if len(data) > MOST_BODY_BYTES:
            return None
    try:
        return await run_in_threadpool(json.loads, bytes(data))
    except (ValueError, RecursionError) as error:
        raise BadRequest("The body is no JSON.", "") from error


def _of(error: EngineError) -> Response:
    return JSONResponse(_content(error), STATUS[error.blame])


def _content(error: EngineError) -> dict[str, Any]:
    return _record(STATUS[error.blame], str(error), getattr(error, "param", "") or None, None)


def _error(status: int, message: str, *, param: str | None = None, code: str | None = None) -> Response:
    return JSONResponse(_record(status, message, param, code), status)


def _record(status: int, message: str, param: str | None, code: str | None) -> dict[str, Any]:
    kind = TYPES.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
