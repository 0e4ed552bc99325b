"""Conversations as files: JSON (text, pictures, settings), Markdown, and one file with the state in it.

A file with state is a zip of `chat.json` and `state.safetensors`; it resumes at once on any machine that has the same
model. What comes from a file is checked as what comes from a visitor.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from app.backend import ModelInfo
from app.chat import Chat, FinishReason, Metrics, Turn
from app.errors import EngineError
from app.scratch import scratch_folder
from app.settings import Limits

FORMAT, VERSION = "mmmamba-chat", 1
CHAT_FILE, STATE_FILE = "chat.json", "state.safetensors"
MOST_TURNS, MOST_IMAGES = 500, 200
MOST_JSON_BYTES, MOST_STATE_BYTES = 128 << 20, 4 << 30
BROWSER_BYTES = 3 << 20  # of one conversation; earlier.js has the limits of all
BROWSER_SIDE_PX = 448
NOT_OURS = "This is no conversation of this page; open a file that it has saved."


def to_dict(
    chat: Chat, settings: dict[str, Any], info: ModelInfo | None, *, side_px: int | None = None
) -> dict[str, Any]:
    """A conversation with all branches. Pictures go in as they are, or as JPEG of at most `side_px`; one that is gone
    is left out, and so is one that cannot be read."""
    numbers = {id(turn): i for i, turn in enumerate(chat.all_turns)}
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": None if info is None else info.name,
        "fingerprint": None if info is None else info.fingerprint,
        "weights": None if info is None else info.weights,
        "settings": settings,
        "head": None if chat.head is None else numbers[id(chat.head)],
        "turns": [
            {
                "parent": None if turn.parent is None else numbers[id(turn.parent)],
                "text": turn.text,
                "images": [data for image in turn.images if (data := _image_data(image, side_px)) is not None],
                "reply": turn.reply,
                "finish_reason": turn.finish_reason,
                "system": turn.system,
                "max_tiles": turn.max_tiles,
                "num_tokens": turn.metrics.num_tokens,
                "text_tokens": turn.metrics.text_tokens,
                "image_tokens": turn.metrics.image_tokens,
                "state_bytes": turn.metrics.state_bytes,
            }
            for turn in chat.all_turns
        ],
    }


def for_browser(chat: Chat, settings: dict[str, Any]) -> str | None:
    """JSON that fits into a browser's storage; the pictures go first if it does not, then the conversation."""
    if not chat.all_turns:
        return None
    record = to_dict(chat, settings, None, side_px=BROWSER_SIDE_PX)
    text = json.dumps(record, ensure_ascii=False)
    if len(text.encode()) > BROWSER_BYTES:
        for turn in record["turns"]:
            if turn["images"]:
                turn["images"] = []
                turn["text"] += " (its picture was too large to be kept)"
        text = json.dumps(record, ensure_ascii=False)
    return text if len(text.encode()) <= BROWSER_BYTES else None


def fill(chat: Chat, record: Any, limits: Limits) -> dict[str, Any]:
    """Put a saved conversation into an empty chat; returns its settings. Nothing is read by a model: that happens with
    the next question.

    Raises: EngineError in plain words if it is none of ours, damaged, or over a limit; `chat` is then unchanged.
    """
    if not isinstance(record, dict) or record.get("format") != FORMAT or not isinstance(record.get("turns"), list):
        raise EngineError(NOT_OURS)
    if record.get("version") != VERSION:
        raise EngineError(f"The file has version {record.get('version')!r}; this page reads version {VERSION}.")
    saved = record["turns"]
    num_images = sum(len(turn.get("images") or ()) for turn in saved if isinstance(turn, dict))
    if len(saved) > MOST_TURNS or num_images > MOST_IMAGES:
        raise EngineError(
            f"The conversation has {len(saved)} turns and {num_images} pictures; {MOST_TURNS} and {MOST_IMAGES} fit."
        )
    folder = scratch_folder("opened") if num_images else None
    turns: list[Turn] = []
    for i, values in enumerate(saved):
        turns.append(_turn(i, values, turns, folder, limits))
    head = record.get("head")
    if head is not None and not (isinstance(head, int) and 0 <= head < len(turns)):
        raise EngineError(f"The file is damaged: it ends at turn {head!r} of {len(turns)}.")
    chat.all_turns = turns
    chat.head = None if head is None else turns[head]
    settings = record.get("settings")
    return settings if isinstance(settings, dict) else {}


def _turn(i: int, values: Any, before: Sequence[Turn], folder: Path | None, limits: Limits) -> Turn:
    def wrong(what: str) -> EngineError:
        return EngineError(f"The file is damaged: turn {i + 1} {what}.")

    if not isinstance(values, dict):
        raise wrong("is no turn")
    text, reply, parent = values.get("text"), values.get("reply"), values.get("parent")
    system, reason, tiles = values.get("system"), values.get("finish_reason"), values.get("max_tiles", 0)
    if not isinstance(text, str) or not isinstance(reply, str) or not isinstance(system, str | None):
        raise wrong("has no text or no answer")
    if len(text) > 2 * limits.max_text_chars or len(system or "") > limits.max_text_chars or len(reply) > 2**18:
        raise wrong("is too long for this server")
    if parent is not None and not (isinstance(parent, int) and 0 <= parent < i):
        raise wrong("does not follow another one")
    if reason not in ("stop", "length", "cancel") or not isinstance(tiles, int) or not 0 <= tiles <= limits.max_tiles:
        raise wrong("has settings that this server does not know")
    images = values.get("images") or []
    if not isinstance(images, list) or len(images) > max(limits.max_images, 32):
        raise wrong("has too many pictures")
    counts = {name: values.get(name, 0) for name in ("num_tokens", "text_tokens", "image_tokens", "state_bytes")}
    if not all(isinstance(count, int) and count >= 0 for count in counts.values()):
        raise wrong("has figures that are no numbers")
    files = tuple(_image_file(image, folder, f"{i + 1}-{j + 1}") for j, image in enumerate(images))
    return Turn(
        text,
        files,
        reply,
        cast(FinishReason, reason),
        Metrics(**counts),
        system,
        tiles,
        None if parent is None else before[parent],
    )


def _image_data(image: str | Path, side_px: int | None) -> dict[str, str] | None:
    from mmmamba.image import ImageError, load_image

    try:
        if side_px is None:
            data = Path(image).read_bytes()
        else:
            picture = load_image(image)
            picture.thumbnail((side_px, side_px))
            out = io.BytesIO()
            picture.save(out, "JPEG", quality=88)
            data = out.getvalue()
    except (OSError, ImageError):
        return None
    return {"name": Path(image).name, "data": base64.b64encode(data).decode()}


def _image_file(image: Any, folder: Path | None, prefix: str) -> str:
    """Write a picture of a file back to disk, under a name of ours."""
    from mmmamba.image import ImageError, load_image

    assert folder is not None, "there is a folder where there are pictures"
    try:
        data = base64.b64decode(image["data"], validate=True)
        suffix = Path(str(image.get("name", ""))).suffix.lower()
        load_image(data)
    except (KeyError, TypeError, AttributeError, binascii.Error, ImageError) as error:
        raise EngineError("The file is damaged: one of its pictures cannot be read.") from error
    path = folder / f"{prefix}{suffix if suffix.isascii() and suffix[1:].isalnum() else '.png'}"
    path.write_bytes(data)
    return str(path)


def to_markdown(chat: Chat, title: str) -> str:
    """The turns that lead to where the conversation stands, for people; pictures by name."""
    out = [f"# {title}", ""]
    for turn in chat.turns:
        if turn.system:
            out += [f"*System: {turn.system}*", ""]
        pictures = "".join(f" `{Path(image).name}`" for image in turn.images)
        out += [f"**You:** {turn.text}{pictures}", "", turn.reply, ""]
    return "\n".join(out)


def write_with_state(path: Path, record: dict[str, Any], state: Any) -> None:
    """One file that resumes elsewhere. `state` is that of the head."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / STATE_FILE
        state.save(file)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr(CHAT_FILE, json.dumps(record, ensure_ascii=False))
            archive.write(file, STATE_FILE)


def read_file(path: Path, folder: Path) -> tuple[Any, Path | None]:
    """A saved conversation as its record, and where its state lies now (a file in `folder`), if it has one.

    Raises: EngineError if it is none of ours.
    """
    try:
        if not zipfile.is_zipfile(path):
            if path.stat().st_size > MOST_JSON_BYTES:
                raise EngineError(f"The file is larger than {MOST_JSON_BYTES >> 20} MiB. {NOT_OURS}")
            return json.loads(path.read_text(encoding="utf-8")), None
        with zipfile.ZipFile(path) as archive:
            sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
            limits = {CHAT_FILE: MOST_JSON_BYTES, STATE_FILE: MOST_STATE_BYTES}
            if set(sizes) != set(limits) or any(sizes[name] > limits[name] for name in limits):
                raise EngineError(NOT_OURS)
            state = folder / STATE_FILE
            archive.extract(STATE_FILE, folder)
            return json.loads(archive.read(CHAT_FILE).decode("utf-8")), state
    except (OSError, ValueError, zipfile.BadZipFile, KeyError, RuntimeError) as error:
        if isinstance(error, EngineError):
            raise
        raise EngineError(NOT_OURS) from error


def read_json(text: str) -> Any:
    """A conversation as a browser sends it back. Raises: EngineError if it is none of ours."""
    if not text:
        raise EngineError("This browser no longer has that conversation: it was deleted, perhaps in another tab.")
    try:
        return json.loads(text)
    except ValueError as error:
        raise EngineError(NOT_OURS) from error


def check_model(record: Any, info: ModelInfo) -> None:
    """Raises: EngineError if the state in a file was made by another model than the one that answers here."""
    theirs, name = record.get("fingerprint"), record.get("model")
    if theirs != info.fingerprint:
        raise EngineError(
            f'This conversation was saved with "{name}", whose memory does not fit "{info.name}". Load "{name}" first.'
        )
    if record.get("weights") != info.weights:
        raise EngineError(
            f'This conversation was saved with other weights of "{name}" than are loaded here; its memory would mean '
            "nothing to them. Take the same version of the model, or open a file saved without state."
        )
