"""Records of measurements: how they are summed up, kept and shown.

python -m benchmarks.report benchmarks/results/decode-cpu.json     # a Markdown table, for the README
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import quantiles

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Record:
    """One measured point: what took how long, beside the least it could take (`floor_ms`).

    `ms` is the median for one step of the whole batch, `p20_ms` and `p80_ms` its spread. `context` is the number of
    tokens read before; `cache_bytes` what is kept of them (recurrent state, or keys and values).
    """

    what: str
    batch: int
    context: int
    ms: float
    p20_ms: float
    p80_ms: float
    floor_ms: float
    tok_per_sec: float
    cache_bytes: int
    weight_bytes: int
    peak_bytes: int
    dtype: str
    weights: str
    device: str
    date: str

    @property
    def key(self) -> tuple[object, ...]:
        """What makes two records answers to the same question."""
        return self.what, self.batch, self.context, self.dtype, self.device


def spread(times_ms: Sequence[float]) -> tuple[float, float, float]:
    """20th percentile, median and 80th percentile of at least two times."""
    tenths = quantiles(times_ms, n=10, method="inclusive")
    return tenths[1], tenths[4], tenths[7]


def save(records: Iterable[Record], path: Path) -> None:
    """Put records into a JSON list, each in place of an older one for the same question."""
    new = {record.key: asdict(record) for record in records}
    old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    kept = [r for r in old if Record(**r).key not in new]
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ",\n".join(json.dumps(r, ensure_ascii=False) for r in [*kept, *new.values()])
    path.write_text(f"[\n{rows}\n]\n", encoding="utf-8")


def mib(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:,.1f}"


def markdown(records: Iterable[Record]) -> str:
    """A table for people: one row a point, those of one context beside each other."""
    rows = [
        "| context | model | ms a token (20 % to 80 %) | floor, ms | tokens/s | state or cache, MiB | peak, MiB |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in sorted(records, key=lambda r: (r.device, r.dtype, r.batch, r.context)):
        batch = "" if r.batch == 1 else f", batch {r.batch}"
        rows.append(
            f"| {r.context:,} | {r.what}, {r.dtype}{batch} | {r.ms:.1f} ({r.p20_ms:.1f} to {r.p80_ms:.1f}) "
            f"| {r.floor_ms:.1f} | {r.tok_per_sec:,.1f} | {mib(r.cache_bytes)} | {mib(r.peak_bytes)} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(markdown(Record(**r) for r in json.loads(Path(name).read_text(encoding="utf-8"))))
