"""What scripts get of answers, comparisons and growing contexts: plain JSON. docs/api.md describes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypedDict

from app.backend import ModelInfo
from app.compare import Comparison
from app.engine import Engine, Reply
from app.grow import CONTEXTS, Growth


class ChatRecord(TypedDict):
    """An answer so far; `finish_reason` is null until the last one. `metrics` are those of `app.chat.Metrics`."""

    text: str
    stage: str
    finish_reason: str | None
    metrics: dict[str, Any]
    ahead: int
    wait_s: float | None
    session_id: str


class SideRecord(TypedDict):
    """One model's part. `figures` are those of `app.metrics.Figures`, null before there is anything to measure."""

    model: str
    kind: str
    precision: str
    stage: str
    text: str
    note: str
    figures: dict[str, Any] | None


class CompareRecord(TypedDict):
    """A comparison so far; `agreement` and `agreements` come once all answers are whole."""

    sides: list[SideRecord]
    agreement: dict[str, Any] | None
    agreements: dict[str, dict[str, Any]]
    ahead: int
    wait_s: float | None
    done: bool
    session_id: str


class PredictionRecord(TypedDict):
    """What the cost model says first; `end_tokens` null: no end. `ms` and `bytes` stand beside `contexts`."""

    end_tokens: int | None
    contexts: list[int]
    ms: list[float]
    bytes: list[int]


class BenchmarkRecord(TypedDict):
    """A sweep so far; `points` are `mmmamba.sweep.Point`, `ends` say in words why a model goes no further."""

    doing: str
    points: list[dict[str, Any]]
    predictions: dict[str, PredictionRecord]
    ends: dict[str, str]
    precisions: dict[str, str]
    done: bool


class InfoRecord(TypedDict):
    """The server; null where the model is not loaded yet."""

    model: str
    kind: str | None
    device: str | None
    dtype: str | None
    precision: str | None
    max_tiles: int | None
    state_bytes: int | None
    status: dict[str, Any]
    compared: list[str]
    contexts: list[int]
    limits: dict[str, Any]
    waiting: int
    max_waiting: int


def chat_record(reply: Reply, session_id: str) -> ChatRecord:
    return {
        "text": reply.text,
        "stage": reply.stage,
        "finish_reason": reply.finish_reason,
        "metrics": asdict(reply.metrics),
        "ahead": reply.ahead,
        "wait_s": reply.wait_s,
        "session_id": session_id,
    }


def compare_record(view: Comparison, session_id: str) -> CompareRecord:
    sides: list[SideRecord] = [
        {
            "model": side.name,
            "kind": side.kind,
            "precision": side.precision,
            "stage": side.stage,
            "text": side.text,
            "note": side.note,
            "figures": None if side.figures is None else asdict(side.figures) | {"context": side.figures.context},
        }
        for side in view.sides
    ]
    agreements = {name: asdict(says) | {"says": str(says)} for name, says in view.agreements.items()}
    return {
        "sides": sides,
        "agreement": next(iter(agreements.values()), None),
        "agreements": agreements,
        "ahead": view.ahead,
        "wait_s": view.wait_s,
        "done": view.done,
        "session_id": session_id,
    }


def benchmark_record(growth: Growth, longest: int) -> BenchmarkRecord:
    contexts = [context for context in CONTEXTS if context <= longest]
    predictions: dict[str, PredictionRecord] = {
        name: {
            "end_tokens": prediction.end_tokens,
            "contexts": contexts,
            "ms": [prediction.ms(context) for context in contexts],
            "bytes": [prediction.bytes(context) for context in contexts],
        }
        for name, prediction in growth.predictions.items()
    }
    return {
        "doing": growth.doing,
        "points": [asdict(point) for point in growth.points],
        "predictions": predictions,
        "ends": dict(growth.ends),
        "precisions": dict(growth.precisions),
        "done": growth.done,
    }


def info_record(engine: Engine, names: Sequence[str]) -> InfoRecord:
    info: ModelInfo | None = engine.info
    return {
        "model": Path(engine.model).name,
        "kind": None if info is None else info.kind,
        "device": None if info is None else info.device,
        "dtype": None if info is None else info.dtype,
        "precision": None if info is None else info.precision,
        "max_tiles": None if info is None else info.max_tiles,
        "state_bytes": None if info is None else info.state_bytes,
        "status": asdict(engine.status),
        "compared": [Path(name).name for name in names],
        "contexts": [context for context in CONTEXTS if context <= engine.limits.max_context],
        "limits": asdict(engine.limits),
        "waiting": len(engine.lane),
        "max_waiting": engine.lane.max_waiting,
    }
