"""What the page shows of a conversation, an answer being written, and its figures. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from app.backend import ModelInfo
from app.boxes import without_marks
from app.chat import Chat, Metrics
from app.engine import LoadStatus, Reply
from app.panel_views import waiting
from app.shown import JOINER, as_seen, as_typed

Message = dict[str, Any]

_NUMBER_ALONE = re.compile(r"\A(\s*\d{1,9})([.)]\s*)\Z")
MEMORY_NOTES = {
    "linear": "stays this size at any length",
    "hybrid": "grows a little with every token",
    "teacher": "grows with every token",
}


def user_message(text: str, images: Sequence[str | Path]) -> Message:
    pictures = [{"path": as_seen(image), "alt_text": Path(image).name} for image in images]
    # Of a bare string Gradio would take the indentation away.
    return {"role": "user", "content": [*pictures, {"type": "text", "text": as_typed(text)}]}


def messages(chat: Chat, upto: int | None = None) -> list[Message]:
    """The whole turns of a conversation (the first `upto` of them), as the Chatbot takes them."""
    out: list[Message] = []
    for turn in chat.turns[:upto]:
        out.append(user_message(turn.text, turn.images))
        out.append(answer(turn.reply, turn.drawn))
    return out


def answer(text: str, drawn: str | None = None) -> Message:
    """What the model said; `drawn` is the picture with the places on it that the answer names."""
    words = as_markdown(text) or "*(no answer)*"
    picture = [] if drawn is None else [{"path": drawn, "alt_text": "The picture with boxes around what is named"}]
    return {"role": "assistant", "content": [words, *picture] if picture else words}


def as_markdown(text: str) -> str:
    """An answer for the Chatbot. A number alone, as in "88.", would be an empty item of a list, with nothing in it to
    select or to read out; the mark that joins number and point is not seen."""
    return _NUMBER_ALONE.sub(f"\\1{JOINER}\\2", as_typed(without_marks(text)))


def branch_names(chat: Chat) -> list[tuple[str, int]]:
    """(name, index) of every branch, for a picker: where it ends and how long it is."""
    names = []
    for i, end in enumerate(chat.branches):
        count = len(end.path)
        words = end.text if len(end.text) <= 40 else f"{end.text[:39]}…"
        names.append((f"{i + 1}: {words} ({count} turn{'' if count == 1 else 's'})", i))
    return names


def branch_of(chat: Chat) -> int | None:
    """The branch on which the conversation stands; None between two."""
    return next((i for i, end in enumerate(chat.branches) if end is chat.head), None)


def reply_text(reply: Reply) -> str:
    """Markdown of an answer being written, or of what is being waited for."""
    if reply.text:
        return as_markdown(reply.text)
    if reply.stage == "waiting":
        return f"*{waiting(reply.ahead, reply.wait_s)}*"
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
    return f'<dl class="meter">{rows}</dl>{_pictures(metrics)}{_resumed(metrics)}'


def _pictures(metrics: Metrics) -> str:
    """How many tiles each picture of the message was cut into."""
    tiles = metrics.image_tiles
    if not tiles:
        return ""
    counts = " + ".join(map(str, tiles))
    what = "1 picture" if len(tiles) == 1 else f"{len(tiles)} pictures"
    return f'<p class="resumed">{what} in this message: {counts} tile{"" if counts == "1" else "s"}.</p>'


def _resumed(metrics: Metrics) -> str:
    """Where the answer started from, and what that took."""
    resumed = metrics.resumed
    if not resumed.turn:
        return ""
    if resumed.reread:
        turns = "1 turn" if resumed.reread == 1 else f"{resumed.reread} turns"
        text = f"Read {turns} again in {resumed.ms / 1000:.1f} s: no memory of them was left."
    else:
        took = f"{resumed.ms:.0f} ms" if resumed.ms >= 1 else "less than 1 ms"
        text = f"Resumed after turn {resumed.turn} in {took}; nothing was read again."
    return f'<p class="resumed">{text}</p>'


def notice(text: str) -> str:
    """A fault, in plain words; empty text shows nothing."""
    return f'<div class="notice" role="alert">{escape(text)}</div>' if text else ""


def note(text: str) -> str:
    """A quiet line beside what it is about."""
    return f'<p class="panel-note" role="status">{escape(text)}</p>' if text else ""


def model_status(status: LoadStatus, info: ModelInfo | None, model: str) -> str:
    """The chip beside the title: which model, and how far it is."""
    name = escape(info.name if info else Path(model).name)
    if status.stage == "ready" and info:
        state, detail = "ready", f"{escape(info.device)}, {escape(info.precision)}"
    elif status.stage == "loading":
        state = "loading"
        bar = f'<progress max="1" value="{status.progress:.3f}" aria-label="Loading the model"></progress>'
        detail = f"loading {status.progress:.0%}{bar}"
    elif status.stage == "failed":
        state, detail = "failed", escape(status.note)
    else:
        state, detail = "idle", "loads with the first message"
    return f'<div class="chip chip-{state}" role="status"><i></i><b>{name}</b><span>{detail}</span></div>'
