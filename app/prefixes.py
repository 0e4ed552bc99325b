"""Conversations of clients that send all of it with every request: found again by what was said, so that the state goes
on and only the new message is read."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from app.chat import Chat, ChatStore, Turn
from app.openai_request import Said
from app.scratch import scratch_folder
from app.sessions import Key, new_session_id
from app.states import StateStore

MOST_CHATS = 64  # apart from those of the page: a script with thousands of questions must not push visitors out
MOST_KNOWN = 4096  # ends of turns that are remembered
MOST_IN_A_CHAT = 500  # turns, branches included; then a conversation is begun anew
KEEP_S = 24 * 3600


class Prefixes:
    """What was said up to the end of a turn -> the conversation and the turn. Safe to use from several threads."""

    def __init__(self, states: StateStore) -> None:
        self.chats = ChatStore(MOST_CHATS, states)
        self._known: OrderedDict[str, tuple[Key, Turn]] = OrderedDict()
        self._taken: set[Key] = set()
        self._lock = threading.Lock()
        self._folder: Path | None = None

    def take(self, system: str | None, turns: Sequence[Said]) -> tuple[Key, Chat]:
        """A conversation that stands after `turns`, the caller's alone until `give_back`. Those of its turns that were
        not answered here have no state: the engine reads them."""
        images = [self.files(turn.images) for turn in turns]
        digests = _digests(system, turns)
        with self._lock:
            key, chat, at = self._longest(digests)
            if chat is None:
                key, chat = ("openai", new_session_id()), Chat(self.chats.states)
                self.chats.put(key, chat)
            self._taken.add(key)
        for turn, files in zip(chat.turns, images, strict=False):
            turn.images = files  # where they lie now; those of a day ago may be gone
        for i in range(at, len(turns)):
            said = turns[i]
            first = None if chat.head else system
            reply = said.reply or ""
            chat.commit(
                Turn(said.text, images[i], reply, "stop", system=first, max_tiles=said.max_tiles, parent=chat.head)
            )
        return key, chat

    def give_back(self, key: Key, answered: tuple[str | None, Sequence[Said]] | None) -> None:
        """Let others take it; `answered` is what was said up to where the conversation now stands, None if nothing was
        added to it. A conversation that nobody could find again is freed."""
        with self._lock:
            self._taken.discard(key)
            chat = self.chats.get(key)
            if chat is None:
                return
            if answered is not None and chat.head is not None:
                self._known[_digests(*answered)[-1]] = key, chat.head
                while len(self._known) > MOST_KNOWN:
                    self._known.popitem(last=False)
            if not any(known == key for known, _ in self._known.values()):
                self.chats.drop(key)

    def files(self, images: Sequence[bytes]) -> tuple[Path, ...]:
        """Pictures as files, each once; those that nobody has sent for a day are removed."""
        if not images:
            return ()
        if self._folder is None or not self._folder.is_dir():
            self._folder = scratch_folder("openai")
        for old in self._folder.iterdir():
            if old.stat().st_mtime < time.time() - KEEP_S:
                old.unlink(missing_ok=True)
        out = []
        for data in images:
            path = self._folder / f"image-{hashlib.sha256(data).hexdigest()[:24]}"
            if path.is_file():
                path.touch()
            else:
                path.write_bytes(data)
            out.append(path)
        return tuple(out)

    def _longest(self, digests: Sequence[str]) -> tuple[Key, Chat | None, int]:
        """The conversation that shares most turns and is not taken, standing there, and how many those are."""
        for at in range(len(digests), 0, -1):
            if (known := self._known.get(digests[at - 1])) is None:
                continue
            key, turn = known
            chat = self.chats.get(key)
            if chat is None or turn not in chat.all_turns:
                del self._known[digests[at - 1]]
            elif key not in self._taken and len(chat.all_turns) < MOST_IN_A_CHAT:
                chat.head = turn
                self._known.move_to_end(digests[at - 1])
                return key, chat, at
        return ("", ""), None, 0


def _digests(system: str | None, turns: Sequence[Said]) -> list[str]:
    """Of everything that was said up to the end of each turn."""
    out = []
    digest = hashlib.sha256(repr(system).encode()).hexdigest()
    for turn in turns:
        pictures = [hashlib.sha256(data).hexdigest() for data in turn.images]
        digest = hashlib.sha256(repr((digest, turn.text, pictures, turn.max_tiles, turn.reply)).encode()).hexdigest()
        out.append(digest)
    return out
