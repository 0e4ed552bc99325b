"""Scores of several models side by side, in Markdown: what `python -m distill eval --out` wrote, for a model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

Measure = Literal["exact", "right"]


def read_scores(path: Path) -> dict[str, Any]:
    """What `eval --out` wrote.  Raises: ValueError if the file holds something else."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if all({"count", *get_args(Measure)} <= found.keys() for found in report["tasks"].values()):
            return report
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read ({error!r}); write it with `python -m distill eval --out`") from error
    raise ValueError(f"{path} lacks counts of some tasks; write it again with `python -m distill eval --out`")


def scores_table(
    reports: Mapping[str, dict[str, Any]], measure: Measure = "exact", *, labels: Mapping[str, str] | None = None
) -> str:
    """A table of percentages, a line a task and a column a model; then the mean, and its part of the first model's.

    Args:
        reports: by the name of the model, the teacher first; see `read_scores`.
        labels: what to call tasks; those that are not there have their own names.
        measure: "exact" counts answers to the letter; "right" also those in other words, which needs `eval --decode`.
    Raises: ValueError for no report, other tasks or numbers of questions in some, or "right" without decoded replies.
    """
    if not reports:
        raise ValueError("a table needs at least one file of scores")
    asked = {name: {t: found["count"] for t, found in report["tasks"].items()} for name, report in reports.items()}
    first = next(iter(reports))
    for name, counts in asked.items():
        if differ := sorted(t for t in counts.keys() | asked[first].keys() if counts.get(t) != asked[first].get(t)):
            raise ValueError(
                f"{first} and {name} were not asked the same: {', '.join(differ)} differ; score both with the same "
                "options"
            )
        if measure == "right" and any(found["right"] is None for found in reports[name]["tasks"].values()):
            raise ValueError(f"replies of {name} were not decoded; score it with --decode, or take --measure exact")
    lines = [f"| task | questions | {' | '.join(reports)} |", f"| --- | ---: |{' ---: |' * len(reports)}"]
    shares = {
        name: {t: 100 * found[measure] / max(1, found["count"]) for t, found in report["tasks"].items()}
        for name, report in reports.items()
    }
    labels = labels or {}
    for task, count in asked[first].items():
        lines.append(_line(labels.get(task, task), str(count), [f"{of_one[task]:.1f}" for of_one in shares.values()]))
    means = [sum(of_one.values()) / max(1, len(of_one)) for of_one in shares.values()]
    lines.append(_line("**mean**", "", [f"**{mean:.1f}**" for mean in means]))
    if len(means) > 1 and means[0]:
        lines.append(_line(f"% of {first}", "", [f"{100 * mean / means[0]:.1f}" for mean in means]))
    for key, label, value, number in (
        ("printed_text_cer", "printed text, character error (%)", "rate", "count"),
        ("text_kl", "divergence from the base's talk (nats a token)", "nats", "tokens"),
    ):
        found = [report.get(key) for report in reports.values()]
        if any(found):
            scale = 100 if value == "rate" else 1
            cells = ["" if one is None else f"{scale * one[value]:.{1 if scale > 1 else 3}f}" for one in found]
            lines.append(_line(label, str(next(one[number] for one in found if one)), cells))
    return "\n".join(lines) + "\n"


def _line(task: str, count: str, cells: list[str]) -> str:
    return f"| {' | '.join((task, count, *cells))} |"
