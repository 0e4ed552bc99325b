"""Pictures of records: every number is a record's, and what is committed shows what is recorded."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from benchmarks import plot, report
from tests.test_benchmarks import record

SVG = "{http://www.w3.org/2000/svg}"


def some_records() -> list[report.Record]:
    """A student in two precisions, one of them in two dtypes, and llama.cpp; another device; a larger batch."""
    found = []
    for context in (1000, 100):
        found += [
            record(what="nano-linear int4", context=context, ms=4.0, floor_ms=3.0, tok_per_sec=250.0),
            record(what="nano-linear int4", context=context, ms=5.0, tok_per_sec=200.0, dtype="bfloat16"),
            record(what="nano-linear", context=context, ms=20.0, floor_ms=15.0, tok_per_sec=50.0),
            record(what="llama.cpp S.Q4_1", context=context, ms=context / 10, tok_per_sec=1e4 / context),
        ]
    found.append(record(what="nano-linear", ms=777.0, device="an older one", date="2025-12-31"))
    found.append(record(what="nano-teacher", context=9000, ms=30.0, tok_per_sec=33.0))
    found.append(record(what="nano-linear", batch=8, ms=64.0, tok_per_sec=125.0))
    return found


def texts(svg: str) -> list[str]:
    return [e.text or "" for e in ET.fromstring(svg).iter(f"{SVG}text")]


@pytest.fixture
def drawn(tmp_path: Path) -> dict[str, str]:
    report.save(some_records(), tmp_path / "decode-x.json")
    assert plot.main([str(tmp_path / "decode-x.json"), "--out", str(tmp_path)]) == 0
    return {path.stem: path.read_text() for path in tmp_path.glob("*.svg")}


def test_one_device_one_picture_a_question(drawn: dict[str, str]) -> None:
    assert set(drawn) == {"decode-x-latency", "decode-x-tokens", "decode-x-tokens-batch8"}
    assert not any("777" in svg or "older" in svg for svg in drawn.values())


def test_latency_over_context_with_floors(drawn: dict[str, str]) -> None:
    svg = drawn["decode-x-latency"]
    said = texts(svg)
    assert {"nano-linear, int4", "nano-linear, float32", "llama.cpp S, Q4_1", "nano-teacher, float32"} <= set(said)
    assert {"4 ms at 1K", "20 ms at 1K", "100 ms at 1K", "30 ms at 9K"} <= set(said), "one dtype around packed weights"
    assert "cpu; batch 1; 2026-01-01" in said
    lines = list(ET.fromstring(svg).iter(f"{SVG}polyline"))
    assert [e.get("class") for e in lines if "linear" in str(e.get("class"))] == [
        "line line-linear predicted",
        "line line-linear measured",
    ] * 2
    floor, measured = ([float(p.split(",")[1]) for p in str(e.get("points")).split()] for e in lines[:2])
    assert floor[0] > measured[0], "less time lies lower, and pixels count downwards"
    assert measured[0] == measured[1], "flat"


def test_tokens_a_second_of_what_was_measured_at_the_shortest_context(drawn: dict[str, str]) -> None:
    root = ET.fromstring(drawn["decode-x-tokens"])
    names = [e.text for e in root.iter(f"{SVG}text") if "name" in str(e.get("class"))]
    assert names == ["nano-linear, int4", "llama.cpp S, Q4_1", "nano-linear, float32"], (
        "fastest first, no teacher at 9K"
    )
    values = [float(str(e.text)) for e in root.iter(f"{SVG}text") if e.get("class") == "value"]
    assert values == [250, 100, 50]
    lengths = [float(str(e.get("width"))) for e in root.iter(f"{SVG}rect") if "bar" in str(e.get("class"))]
    assert [length / lengths[0] for length in lengths] == pytest.approx([1, 0.4, 0.2], abs=1e-3)
    start = next(float(str(e.get("x"))) for e in root.iter(f"{SVG}rect") if "bar" in str(e.get("class")))
    most = [float(str(e.get("x1"))) - start for e in root.iter(f"{SVG}line") if "most" in str(e.get("class"))]
    assert most[0] / lengths[0] == pytest.approx((1e3 / 3.0) / 250, abs=1e-3), "the mark is where the floor is"
    assert "after 100 tokens of context" in " ".join(texts(drawn["decode-x-tokens"]))


def test_both_themes_and_everything_inside(drawn: dict[str, str]) -> None:
    for svg in drawn.values():
        root = ET.fromstring(svg)
        width, height = float(str(root.get("width"))), float(str(root.get("height")))
        style = next(e.text or "" for e in root.iter(f"{SVG}style"))
        light, dark = style.split("@media (prefers-color-scheme: dark)")
        for kind, (on_white, on_black) in plot.COLOURS.items():
            assert f".line.line-{kind}{{stroke:{on_white}}}" in light
            assert f".line.line-{kind}{{stroke:{on_black}}}" in dark
        for e in root.iter(f"{SVG}text"):
            assert 0 <= float(str(e.get("x"))) <= width
            assert 0 <= float(str(e.get("y"))) <= height
            room = float(str(e.get("x"))) if e.get("text-anchor") == "end" else width - float(str(e.get("x")))
            assert 6 * len(e.text or "") <= room or e.get("text-anchor") == "middle", f"{e.text} does not fit"


def test_precisions() -> None:
    assert plot.precision_of(record(what="nano-linear int8")) == ("nano-linear", "int8")
    assert plot.precision_of(record(what="llama.cpp SmolLM2-135M-Instruct.Q4_1"))[1] == "Q4_1"
    assert plot.precision_of(record(what="linear, fused", dtype="bf16")) == ("linear, fused", "bfloat16")
    assert [plot.family_of(name) for name in ("hybrid, fused", "llama.cpp x", "transformers SmolLM2-135M")] == [
        "hybrid",
        "llama",
        "other",
    ]


@pytest.mark.parametrize(
    ("text", "says"), [("[]", "no record"), ('[{"benchmark": 1}]', "no records of decoding"), ("{", "no records")]
)
def test_other_files_are_refused(text: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(SystemExit):
        plot.main([str(tmp_path / "a.json"), "--out", str(tmp_path)])
    assert says in capsys.readouterr().err
    with pytest.raises(SystemExit):
        plot.main(["--out", str(tmp_path / "nowhere")])
    assert "is no folder" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.svg"))


@pytest.mark.parametrize("path", sorted(plot.DOCS.glob("decode-*.svg")), ids=lambda path: path.name)
def test_committed_pictures_show_the_committed_records(path: Path, tmp_path: Path) -> None:
    """python -m benchmarks.plot draws them anew."""
    stem = max((s for s in (p.stem for p in report.RESULTS.glob("*.json")) if path.stem.startswith(f"{s}-")), key=len)
    source = report.RESULTS / f"{stem}.json"
    plot.draw(source, tmp_path)
    assert (tmp_path / path.name).read_text() == path.read_text(), "run python -m benchmarks.plot"
    known = {f"{r['tok_per_sec']:,.0f}" for r in json.loads(source.read_text())}
    values = [e.text or "" for e in ET.parse(path).iter(f"{SVG}text") if e.get("class") == "value"]
    assert values
    if "tokens" in path.stem:
        assert set(values) <= known
