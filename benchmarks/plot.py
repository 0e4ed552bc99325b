"""Pictures of decoding records for the README: time of a token over context, and tokens a second by precision.

    python -m benchmarks.plot                                        # of every benchmarks/results/decode-*.json
    python -m benchmarks.plot benchmarks/results/decode-cpu.json --out docs

Writes NAME-latency.svg (where more than one context was measured) and NAME-tokens.svg for a file NAME.json. Every
number in them is one of its records; a picture is of one device, the one measured last. The files bring light and dark
colours of their own, with a background, so that they can be read on any page.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from benchmarks import report
from benchmarks.report import Record
from mmmamba.chart import LABEL_HEIGHT, LEFT, Chart, Line, svg
from quantize import SCHEMES

DOCS = report.RESULTS.parents[1] / "docs"
PLOT_WIDTH = 440
SAME_CONTEXT = 1.1  # 1,000 and 1,024 tokens are called the same
LETTER_WIDTH = 7.6  # of a bold letter of 12 px, on average and a little more
BAR_HEIGHT, GAP, TOP, FOOT, MARGIN = 18, 10, 44, 40, 20
FLOOR = "dashed: the least its bytes take at the memory bandwidth measured in the run"
MOST = "mark: the most that the memory bandwidth measured in the run allows"
# Light, dark. Families are told apart by colour and name, precisions by name.
COLOURS = {
    "linear": ("#0f766e", "#2dd4bf"),
    "hybrid": ("#7c3aed", "#a78bfa"),
    "teacher": ("#c2410c", "#fb923c"),
    "llama": ("#1d4ed8", "#60a5fa"),
    "other": ("#475569", "#94a3b8"),
}
PAPER, INK, FAINT, GRID = ("#ffffff", "#0f172a"), ("#0f172a", "#f1f5f9"), ("#475569", "#cbd5e1"), ("#e2e8f0", "#334155")


class Series(NamedTuple):
    """Records of one model in one precision, by context."""

    name: str
    family: str
    precision: str
    records: tuple[Record, ...]

    @property
    def label(self) -> str:
        return f"{self.name}, {self.precision}"


def load(path: Path) -> list[Record]:
    """Records of a file as `report.save` writes it.  Raises: ValueError for another kind of JSON."""
    try:
        return [Record(**r) for r in json.loads(path.read_text(encoding="utf-8"))]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no records of decoding: {error}; use a file of benchmarks.decode") from error


def latest_device(records: Sequence[Record]) -> str:
    return max(records, key=lambda r: r.date).device


def precision_of(record: Record) -> tuple[str, str]:
    """(name, precision): from `nano-linear int4` and the like, the tag of a GGUF file, or the dtype."""
    name, _, scheme = record.what.rpartition(" ")
    if name and scheme in SCHEMES:
        return name, scheme
    if found := re.fullmatch(r"(.+)\.(I?Q\d\w*|F16|F32|BF16)", record.what):
        return found[1], found[2]
    return record.what, {"bf16": "bfloat16"}.get(record.dtype, record.dtype)


def family_of(name: str) -> str:
    return next((kind for kind in COLOURS if kind in name), "other")


def series(records: Iterable[Record]) -> list[Series]:
    """One for each model and precision of one batch size; packed weights count once, with what was measured first of
    the dtypes around them."""
    found: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        mine = found.setdefault(precision_of(record), [])
        if not mine or mine[0].dtype == record.dtype:
            mine.append(record)
    return [
        Series(name, family_of(name), precision, tuple(sorted(mine, key=lambda r: r.context)))
        for (name, precision), mine in found.items()
    ]


def ms(value: float) -> str:
    return f"{value:.3g} ms" if value < 100 else f"{value:,.0f} ms"


def latency(records: Sequence[Record], title: str = "Time for a token") -> str:
    """Lines over context, with floors, as a file."""
    drawn = series(records)
    lines = tuple(
        Line(
            s.label,
            s.family,
            tuple((r.context, r.ms) for r in s.records),
            tuple((r.context, r.floor_ms) for r in s.records),
        )
        for s in drawn
    )
    label_width = _name_width(drawn)
    chart = Chart(
        title,
        ms,
        lines,
        log_x=True,
        log_y=True,
        width=LEFT + PLOT_WIDTH + label_width,
        height=max(300, 90 + LABEL_HEIGHT * len(lines)),
        label_width=label_width,
        x_marks=tuple(sorted({float(r.context) for r in records})),
    )
    return document(svg(chart), chart.width, chart.height, [about(records), FLOOR])


def tokens(records: Sequence[Record], title: str = "Tokens a second") -> str:
    """Bars at the shortest context (models that were measured after longer ones alone are left out), with the most that
    the bandwidth allows, as a file."""
    short = SAME_CONTEXT * min(r.context for r in records)
    bars = [(s, s.records[0]) for s in series(r for r in records if r.context <= short)]
    bars.sort(key=lambda bar: -bar[1].tok_per_sec)
    names = _name_width([s for s, _ in bars])
    scale = PLOT_WIDTH / max(max(r.tok_per_sec, _ceiling(r)) for _, r in bars)
    told = "; ".join(f"{s.label}: {r.tok_per_sec:,.0f}" for s, r in bars)
    width, height = names + PLOT_WIDTH + 60, TOP + len(bars) * (BAR_HEIGHT + GAP)
    out = [
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(f"{title}. {told}")}">',
        f'<text class="chart-title" x="{MARGIN}" y="24">{escape(title)}</text>',
    ]
    for i, (s, r) in enumerate(bars):
        y = TOP + i * (BAR_HEIGHT + GAP)
        foot, length, most = y + BAR_HEIGHT - 5, r.tok_per_sec * scale, _ceiling(r) * scale
        beside = max(length, most) if abs(most - length) < 50 else length  # the number keeps clear of the mark
        out += [
            f'<text class="name line-{s.family}" x="{names - 8}" y="{foot}" text-anchor="end">{escape(s.label)}</text>',
            f'<rect class="bar line-{s.family}" x="{names}" y="{y}" width="{length:.1f}" height="{BAR_HEIGHT}"/>',
            f'<line class="line line-{s.family} most" x1="{names + most:.1f}" x2="{names + most:.1f}" '
            f'y1="{y - 2}" y2="{y + BAR_HEIGHT + 2}"/>',
            f'<text class="value" x="{names + beside + 6:.1f}" y="{foot}">{r.tok_per_sec:,.0f}</text>',
        ]
    contexts = " or ".join(f"{c:,}" for c in sorted({r.context for _, r in bars}))
    note = [about(records), f"after {contexts} tokens of context; {MOST}"]
    return document("".join([*out, "</svg>"]), width, height, note)


def _name_width(drawn: Sequence[Series]) -> int:
    """Pixels for the longest name and a margin."""
    return round(LETTER_WIDTH * max(len(s.label) for s in drawn)) + MARGIN


def _ceiling(record: Record) -> float:
    """Tokens a second at the record's floor."""
    return 1e3 * record.batch / record.floor_ms


def about(records: Sequence[Record]) -> str:
    dates = sorted({r.date for r in records})
    batches = sorted({r.batch for r in records})
    return f"{records[0].device}; batch {batches[0]}; {' to '.join(dict.fromkeys((dates[0], dates[-1])))}"


def document(chart: str, width: int, height: int, notes: Sequence[str]) -> str:
    """An SVG file around a chart: background, both sets of colours, and lines of notes at the foot."""
    body = chart.replace("<svg ", f'<svg width="{width}" height="{height}" ', 1)
    foot = "".join(
        f'<text class="tick" x="{MARGIN}" y="{height + 16 * i + 14}">{escape(note)}</text>'
        for i, note in enumerate(notes)
    )
    total = height + FOOT
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {total}" width="{width}" height="{total}">'
        f"<style>{_style(0)}@media (prefers-color-scheme: dark){{{_style(1)}}}</style>"
        f'<rect class="paper" width="{width}" height="{total}" rx="8"/>{body}{foot}</svg>\n'
    )


def _style(theme: int) -> str:
    rules = {
        "text": f"font:12px system-ui,sans-serif;fill:{INK[theme]}",
        ".paper": f"fill:{PAPER[theme]}",
        ".chart-title": "font-size:14px;font-weight:600",
        ".tick": f"font-size:11px;fill:{FAINT[theme]}",
        ".grid": f"stroke:{GRID[theme]}",
        ".line": "fill:none;stroke-width:2.5;stroke-linejoin:round",
        ".predicted": "stroke-width:1.3;stroke-dasharray:5 4;opacity:.8",
        ".most": "stroke-width:2",
        ".name": "font-weight:600",
    }
    for kind, colours in COLOURS.items():
        rules[f".line.line-{kind}"] = f"stroke:{colours[theme]}"
        rules[f".dot.line-{kind},.bar.line-{kind},.name.line-{kind}"] = f"fill:{colours[theme]}"
    return "".join(f"{selector}{{{rule}}}" for selector, rule in rules.items())


def pictures(records: Sequence[Record]) -> dict[str, str]:
    """What can be drawn of one device's records: suffix of a file's name -> its text. Batches above 1 get bars each."""
    drawn = {}
    for batch in sorted({r.batch for r in records}):
        mine = [r for r in records if r.batch == batch]
        suffix = "" if batch == 1 else f"-batch{batch}"
        if len({r.context for r in mine}) > 1 and batch == 1:
            drawn["latency"] = latency(mine)
        drawn[f"tokens{suffix}"] = tokens(mine)
    return drawn


def draw(path: Path, out: Path) -> list[Path]:
    """Write the pictures of a file of records; returns where they are.  Raises: ValueError from `load`, or if there is
    no record in it."""
    records = load(path)
    if not records:
        raise ValueError(f"{path} holds no record; measure something first: python -m benchmarks.decode")
    device = latest_device(records)
    written = []
    for suffix, text in pictures([r for r in records if r.device == device]).items():
        target = out / f"{path.stem}-{suffix}.svg"
        target.write_text(text, encoding="utf-8")
        written.append(target)
    return written


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=(__doc__ or "").splitlines()[0])
    p.add_argument("records", nargs="*", type=Path, help="default: every decode-*.json in benchmarks/results")
    p.add_argument("--out", type=Path, default=DOCS, metavar="FOLDER", help="default: docs")
    args = p.parse_args(argv)
    if not args.out.is_dir():
        p.error(f"--out {args.out} is no folder; make it first, or name another")
    for path in args.records or sorted(report.RESULTS.glob("decode-*.json")):
        try:
            written = draw(path, args.out)
        except (OSError, ValueError) as error:
            p.error(str(error))
        print(*written, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
