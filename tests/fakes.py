"""A model of words for tests of the app: what it answers tells what its state has seen, and it fails on demand."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from app.backend import ModelInfo, Progress, SweepPlan
from app.chat import FinishReason
from app.engine import Settings
from mmmamba.config import ModelConfig
from mmmamba.sweep import Point, Prediction, Reading, Skipped

STATE_BYTES = 5 * 2**20
TOKENS_PER_TILE = 64
CACHE_BYTES_PER_WORD = 2**16
PEAK_BYTES = 3 * 2**20
TINY_CONFIG = Path(__file__).parent / "golden" / "post"


@dataclass
class FakeState:
    """`seen`: every word and picture so far, in order; `nbytes` is constant, as a recurrent state's."""

    seen: tuple[str, ...] = ()
    num_image_tokens: int = 0
    nbytes: int = STATE_BYTES
    grows: bool = False

    @property
    def num_text_tokens(self) -> int:
        return len(self.seen)

    @property
    def recurrent_nbytes(self) -> int:
        return self.nbytes

    @property
    def cache_nbytes(self) -> int:
        return CACHE_BYTES_PER_WORD * len(self.seen) if self.grows else 0

    def fork(self) -> FakeState:
        return replace(self)

    def share_(self, later: FakeState) -> None:
        pass

    def storages(self) -> dict[int, int]:
        return {id(self): self.nbytes}

    def save(self, path: Path) -> None:
        path.write_text(json.dumps([self.seen, self.num_image_tokens]))


class FakeMover:
    """Moves states between a made-up card (`device` "cuda"), memory and disk; `moved` tells of every move."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.moved: list[str] = []

    def to_memory(self, state: FakeState) -> FakeState:
        self.moved.append("memory")
        return replace(state)

    def to_device(self, state: FakeState) -> FakeState:
        self.moved.append("device")
        return replace(state)

    def load_state(self, path: Path) -> FakeState:
        self.moved.append("loaded")
        seen, num_image_tokens = json.loads(path.read_text())
        return FakeState(tuple(seen), num_image_tokens)


@dataclass(frozen=True)
class FakeEvent:
    reply: str
    num_tokens: int
    ttft_ms: float | None
    tok_per_sec: float | None
    finish_reason: FinishReason | None = None


@dataclass
class Pace:
    """How long a fake takes: seconds a word, a word of `[long]` and for `[slow-read]`; `go` lets `[hold]` be read."""

    word_s: float = 0.0
    long_s: float | None = None
    read_s: float = 1.0
    go: threading.Event = field(default_factory=threading.Event)


class FakeBackend:
    """Answers with the words and the number of pictures of this turn, and the number of the turn.

    A question may hold `[boom]` (fails after two words), `[long]` (200 words), `[slow-read]` (takes `pace.read_s`
    seconds to read, or until it is stopped), `[hold]` (is not read before `pace.go` is set, whatever is stopped),
    `[say]` (what follows it is the answer, as it stands).
    """

    def __init__(self, pace: Pace | None = None, name: str = "fake", precision: str = "float32") -> None:
        self.pace = pace or Pace()
        kind = "teacher" if "teacher" in name else "hybrid" if "hybrid" in name else "linear"
        self.info = ModelInfo(name, kind, "cpu", "float32", 1, STATE_BYTES, "shapes", f"weights of {name}", precision)
        self.key = f"{name}|cpu|float32"
        self.mover = FakeMover()
        self.read_again: list[str] = []

    def new_state(self) -> FakeState:
        return FakeState(grows=self.info.kind == "teacher")

    def peak_memory(self) -> Callable[[], int]:
        return lambda: PEAK_BYTES

    def sweep(self, plan: SweepPlan) -> FakeSweep:
        return FakeSweep(self.info.name, self.info.kind, plan)

    def tile(self, image: Image.Image, max_tiles: int | None) -> Sequence[Any]:
        return [f"<{image.width}x{image.height}>"] * (max_tiles or 1)

    def encode(
        self, text: str, image_tiles: Sequence[int], *, first: bool, images_before: int, system: str | None = None
    ) -> Any:
        opener = ["<begin>"] if first else ["<close>"]
        return [*opener, f"<{images_before} images before>", *([f"<{system}>"] if system else []), *_words(text)]

    def encode_reply(self, reply: str) -> Any:
        return reply.split()

    def read(self, ids: Any, tiles: Sequence[Any], state: FakeState, cancel: threading.Event) -> bool:
        self.read_again.append(" ".join(ids))
        _see(state, ids, tiles)
        return not cancel.is_set()

    def stream(
        self, ids: Any, tiles: Sequence[Any], state: FakeState, settings: Settings, cancel: threading.Event
    ) -> Iterator[FakeEvent]:
        text = " ".join(ids[2:])
        if "[slow-read]" in text:
            cancel.wait(self.pace.read_s)
        if "[hold]" in text:
            self.pace.go.wait(60)
        _see(state, ids, tiles)
        turn = state.seen.count("<begin>") + state.seen.count("<close>")
        words = f"turn {turn} images {len(tiles)}: {text}".split()
        word_s = self.pace.word_s
        if "[say]" in text:
            words = [text.partition("[say]")[2].strip()]
        if "[long]" in text:
            words = [f"word{i}" for i in range(200)]
            word_s = word_s if self.pace.long_s is None else self.pace.long_s
        if settings.temperature > 1:
            words.append("(hot)")
        limit = settings.max_new_tokens
        said: list[str] = []
        started = time.monotonic()
        rate = 0.0
        reason: FinishReason = "stop" if len(words) <= limit else "length"
        for word in words[:limit]:
            if cancel.is_set():
                reason = "cancel"
                break
            time.sleep(word_s)
            if "[boom]" in text and len(said) == 2:
                raise RuntimeError("a fault of the fake model in /srv/secret/place")
            if word in settings.stop:
                state.seen += (word,)
                reason = "stop"
                break
            said.append(word)
            rate = len(said) / max(time.monotonic() - started, 1e-6)
            try:
                yield FakeEvent(" ".join(said), len(said), 12.0, rate)
            finally:
                state.seen += (word,)  # a word is fed back after it was shown
        yield FakeEvent(" ".join(said), len(said), 12.0 if said else None, rate if said else None, reason)


def _words(text: str) -> list[str]:
    return [text] if "[say]" in text else text.split()


class FakeSweep:
    """Measures nothing: a token takes 10 ms, and with a teacher a hundredth of the context on top. The teacher ends
    after 16,384 tokens."""

    def __init__(self, name: str, kind: str, plan: SweepPlan) -> None:
        self.name, self.kind, self.plan = name, kind, plan
        config = ModelConfig.from_dict(
            json.loads((TINY_CONFIG / ("hovle" if kind == "teacher" else "linear") / "config.json").read_text())
        )
        self.prediction = Prediction(config, 10**8, 4, 1e10, None)

    def run(self, cancel: threading.Event | None = None) -> Iterator[Any]:
        for context in self.plan.contexts:
            if self.kind == "teacher" and context > 16_384:
                yield Skipped(self.name, context, "the end is at about 20,000 tokens")
                return
            for part in range(1, 6):
                time.sleep(0.04)
                if cancel is not None and cancel.is_set():
                    return
                yield Reading(self.name, context, context * part // 5)
            ms = 10.0 + (context / 100 if self.kind == "teacher" else 0)
            cache = self.prediction.kv_bytes(context)
            yield Point(self.name, self.kind, context, context, 0, 5.0, ms, ms, ms, STATE_BYTES, cache, 0, 0.1)


def _see(state: FakeState, ids: Any, tiles: Sequence[Any]) -> None:
    for image_tiles in tiles:
        state.seen += tuple(image_tiles)
        state.num_image_tokens += TOKENS_PER_TILE * len(image_tiles)
    state.seen += tuple(ids)


class FakeLoader:
    """A loader that takes `load_s` seconds, counts its calls, and fails the first `failures` of them; its models
    answer at `pace`, or at `word_s` seconds a word."""

    def __init__(self, word_s: float = 0.0, load_s: float = 0.0, failures: int = 0, pace: Pace | None = None) -> None:
        self.load_s, self.failures = load_s, failures
        self.pace = pace or Pace(word_s)
        self.calls = 0

    def __call__(
        self, model: str, device: str, dtype: str, progress: Progress, others: Sequence[Any] = ()
    ) -> FakeBackend:
        self.calls += 1
        for step in range(4):
            progress(step / 4, f"tensor {step + 1} of 4")
            time.sleep(self.load_s / 4)
        if self.calls <= self.failures:
            raise OSError(f"no config.json in {model}")
        if "broken" in model:
            raise ValueError("its file is cut short")
        return FakeBackend(self.pace, Path(model).name, "float32" if dtype == "auto" else dtype)
