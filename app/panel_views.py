"""What the comparison shows: answers side by side, figures, charts. Pure functions; charts are drawn by mmmamba.chart,
imported when there is something to draw (it brings torch along)."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from app.boxes import without_marks
from app.compare import Comparison, Side
from app.grow import Growth
from app.metrics import Figures

KIND_NAMES = {"linear": "Student, linear", "hybrid": "Student, hybrid", "teacher": "Teacher, a transformer"}
IN_TURN = "The models answer in turn on one device, so neither slows the other. What they share is in memory once."
EMPTY_PANEL = (
    '<div class="panel-hello"><b>Ask the models the same question.</b><br>'
    "The teacher is a transformer: with every token its memory and its time grow. The student, distilled from it, "
    "keeps a memory of constant size.</div>"
)
EMPTY_GROWTH = (
    '<p class="panel-note">Asks the same question after ever longer conversations, and draws what each model takes '
    "over what was predicted. Chats are answered meanwhile.</p>"
)


def panel(view: Comparison) -> str:
    """Both answers, their figures, the charts, and how far they agree."""
    if not view.done and all(side.stage == "waiting" for side in view.sides) and view.ahead:
        return f'<p class="panel-note" role="status">{escape(waiting(view.ahead, view.wait_s))}</p>'
    cards = "".join(_card(side) for side in view.sides)
    agreement = "".join(
        f'<p class="panel-note">{escape(f"{name} and {view.sides[-1].name}: " if len(view.sides) > 2 else "")}'
        f"{escape(str(says))}</p>"
        for name, says in view.agreements.items()
    )
    return (
        f'<p class="question">{escape(view.question)}</p><div class="sides">{cards}</div>{agreement}'
        f"{_table(view.sides)}{_live_charts(view.sides)}"
        f'<p class="panel-note">{IN_TURN}</p>'
    )


def waiting(ahead: int, wait_s: float | None) -> str:
    """Who comes first, and for about how long."""
    first = {0: "", 1: ": one message comes first"}.get(ahead, f": {ahead} messages come first")
    return f"Waiting{first}{'' if wait_s is None or wait_s < 1 else f', about {wait_s:.0f} s'} …"


def _card(side: Side) -> str:
    stages = {
        "waiting": "Its turn comes next …",
        "loading": f"Loading: {side.note} …" if side.note else "Loading …",
        "reading": "Reading …",
    }
    words = escape(without_marks(side.text, bold="")) or f"<i>{escape(stages.get(side.stage, 'No answer.'))}</i>"
    if side.stage == "failed":
        words = f'<span role="alert">{escape(side.note)}</span>'
    # page.js reads an answer out when this ends.
    busy = "false" if side.stage in ("done", "failed") else "true"
    return (
        f'<section class="side side-{side.kind}" aria-label="{escape(side.name)}" aria-busy="{busy}">'
        f"<h2><i></i>{KIND_NAMES.get(side.kind, 'Model')} <span>{escape(named(side.name, side.precision))}</span></h2>"
        f'<div class="words">{words}</div></section>'
    )


ROWS = (
    ("First token", "after reading the question"),
    ("A token", "median, after the first"),
    ("Speed", "tokens a second"),
    ("Recurrent state", "stays at any length"),
    ("Key-value cache", "grows with every token"),
    ("Peak memory", "taken while answering"),
    ("Context", "text + image tokens"),
)


def _cells(f: Figures | None) -> tuple[str, ...]:
    if f is None:
        return ("–",) * len(ROWS)

    def ms(value: float | None) -> str:
        return "–" if value is None else f"{value:,.0f} ms" if value >= 100 else f"{value:.1f} ms"

    return (
        ms(f.ttft_ms),
        ms(f.ms_per_token),
        "–" if f.tok_per_sec is None else f"{f.tok_per_sec:.1f}",
        mib(f.recurrent_bytes),
        mib(f.cache_bytes),
        mib(f.peak_bytes) if f.peak_bytes else "–",  # a model in another process shows none
        f"{f.text_tokens:,} + {f.image_tokens:,}",
    )


def described(model: str, kind: str) -> str:
    """`Student, linear: nano`, as a choice."""
    name = Path(model).name
    return f"{KIND_NAMES[kind].partition(', a ')[0]}: {name}" if kind in KIND_NAMES else name


def named(model: str, precision: str) -> str:
    """`nano, int4`; the name alone before it is loaded."""
    return f"{model}, {precision}" if precision else model


def mib(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB" if num_bytes else "none"


def _table(sides: Sequence[Side]) -> str:
    heads = "".join(f'<th scope="col">{escape(side.name)}</th>' for side in sides)
    columns = [_cells(side.figures) for side in sides]
    rows = "".join(
        f'<tr><th scope="row">{name}<span>{note}</span></th>{"".join(f"<td>{c[i]}</td>" for c in columns)}</tr>'
        for i, (name, note) in enumerate(ROWS)
    )
    return f'<table class="figures"><thead><tr><td></td>{heads}</tr></thead><tbody>{rows}</tbody></table>'


def _live_charts(sides: Sequence[Side]) -> str:
    if not any(side.memory for side in sides):
        return ""
    from mmmamba.chart import Chart, Line, mebibytes, milliseconds, svg

    latency = tuple(Line(side.name, side.kind, side.latency) for side in sides)
    memory = tuple(Line(side.name, side.kind, side.memory) for side in sides)
    return (
        '<div class="charts">'
        + svg(Chart("Time for a token", milliseconds, latency, live=True))
        + svg(Chart("Memory of the conversation", mebibytes, memory, live=True, binary=True))
        + "</div>"
    )


def growth(view: Growth) -> str:
    """Points over predictions, the table of them, and where each model ends."""
    if view.error:
        return f'<div class="notice" role="alert">{escape(view.error)}</div>'
    what = view.doing[:1].upper() + view.doing[1:]
    doing = f'<p class="panel-note" role="status">{escape(what)}{"." if view.done else " …"}</p>'
    if not view.predictions:
        return doing
    from mmmamba.chart import svg
    from mmmamba.sweep import charts

    drawn = "".join(svg(chart) for chart in charts(view.points, view.predictions))
    ends = "".join(
        f'<p class="panel-note">{escape(named(name, view.precisions.get(name, "")))}: {escape(_end(view, name))}</p>'
        for name in view.predictions
    )
    return f'{doing}<div class="charts">{drawn}</div>{ends}{_points(view.points)}'


def _end(view: Growth, name: str) -> str:
    """What is predicted of a model's end, or why it went no further."""
    if name in view.ends:
        return f"not measured beyond this; {view.ends[name]}."
    prediction = view.predictions[name]
    if not prediction.kv_bytes(1):
        return "its memory does not grow, so there is no end to it."
    end = prediction.end_tokens
    return "its memory grows." if end is None else f"memory will be full at about {end:,} tokens."


def _how(point: Any) -> str:
    """How the model came to have this context."""
    restored = f"restored in {point.restore_ms or 0:,.0f} ms"
    return restored if point.read_s is None else f"in {point.read_s:,.1f} s"


def _points(points: Sequence[Any]) -> str:
    if not points:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{p.context:,}</th><td>{escape(p.model)}</td><td>{p.ttft_ms:,.0f} ms</td>'
        f"<td>{p.ms:,.1f} ms</td><td>{mib(p.recurrent_bytes + p.cache_bytes)}</td>"
        f"<td>{_how(p)}</td></tr>"
        for p in points
    )
    heads = "".join(
        f'<th scope="col">{h}</th>' for h in ("Context", "Model", "First token", "A token", "Memory", "Read")
    )
    head = f"<thead><tr>{heads}</tr></thead>"
    # On a phone it scrolls, so the keyboard must reach it.
    scroll = '<div class="scroll" role="region" tabindex="0" aria-label="Measured points">'
    return f'{scroll}<table class="figures points">{head}<tbody>{rows}</tbody></table></div>'
