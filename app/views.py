"""What the page shows of a conversation, an answer being written, and its figures. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from app.backend import ModelInfo
from app.chat import Chat, Metrics
from app.engine import LoadStatus, Reply

Message = dict[str, Any]

MEMORY_NOTES = {
    "linear": "stays this size at any length",
    "hybrid": "grows a little with every token",
    "teacher": "grows with every token",
}


def user_message(text: str, images: Sequence[str | Path]) -> Message:
    pictures = [{"path": str(image), "alt_text": Path(image).name} for image in images]
    return {"role": "user", "content": [*pictures, text]}


def messages(chat: Chat, upto: int | None = None) -> list[Message]:
    """The whole turns of a conversation (the first `upto` of them), as the Chatbot takes them."""
    out: list[Message] = []
    for turn in chat.turns[:upto]:
        out.append(user_message(turn.text, turn.images))
        out.append({"role": "assistant", "content": turn.reply or "*(no answer)*"})
    return out


def reply_text(reply: Reply) -> str:
    """Markdown of an answer being written, or of what is being waited for."""
    if reply.text:
        return reply.text
    if reply.stage == "waiting":
        before = {0: "", 1: ": one message comes first"}.get(reply.ahead, f": {reply.ahead} messages come first")
        return f"*Waiting{before} …*"
    if reply.stage == "loading":
        return f"*Loading the model, {reply.progress:.0%}: {reply.note} …*"
    return "*Reading …*" if reply.stage != "done" else "*(no answer)*"


def meter(metrics: Metrics, info: ModelInfo | None) -> str:
    """The line of figures under the chat."""
    ttft = "–" if metrics.ttft_ms is None else f"{metrics.ttft_ms / 1000:.2f} s"
    speed = "–" if metrics.tok_per_sec is None else f"{metrics.tok_per_sec:.1f}"
    context = metrics.text_tokens + metrics.image_tokens
    parts = f"{metrics.text_tokens:,} text + {metrics.image_tokens:,} image"
    state_bytes = metrics.state_bytes or (info.state_bytes if info else 0)
    memory = f"{state_bytes / 2**20:.1f} MiB" if state_bytes else "–"
    cells = (
        ("First token", ttft, "after reading the message"),
        ("Speed", speed, "tokens a second"),
        ("Context", f"{context:,} tokens", parts),
        ("Memory", memory, MEMORY_NOTES[info.kind] if info else "of this conversation"),
    )
    rows = "".join(
        f'<div class="cell cell-{label.split()[0].lower()}"><dt>{label}</dt><dd><b>{escape(value)}</b>'
        f"<span>{escape(note)}</span></dd></div>"
        for label, value, note in cells
    )
    return f'<dl class="meter">{rows}</dl>'


def notice(text: str) -> str:
    """A fault, in plain words; empty text shows nothing."""
    return f'<div class="notice" role="alert">{escape(text)}</div>' if text else ""


def model_status(status: LoadStatus, info: ModelInfo | None, model: str) -> str:
    """The chip beside the title: which model, and how far it is."""
    name = escape(info.name if info else Path(model).name)
    if status.stage == "ready" and info:
        state, detail = "ready", f"{escape(info.device)}, {escape(info.dtype)}"
    elif status.stage == "loading":
        state = "loading"
        bar = f'<progress max="1" value="{status.progress:.3f}" aria-label="Loading the model"></progress>'
        detail = f"loading {status.progress:.0%}{bar}"
    elif status.stage == "failed":
        state, detail = "failed", escape(status.note)
    else:
        state, detail = "idle", "loads with the first message"
    return f'<div class="chip chip-{state}" role="status"><i></i><b>{name}</b><span>{detail}</span></div>'
