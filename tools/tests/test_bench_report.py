# SPDX-License-Identifier: Apache-2.0
"""Filling the markers twice gives the same text, and unpaired markers are refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import bench_report

TEXT = "before\n<!-- bench:begin optree map -->\nold\n<!-- bench:end -->\nafter\n"


def test_only_what_stands_between_the_markers_changes() -> None:
    filled = bench_report.fill(TEXT, lambda suite, table: (suite, table))
    assert filled == (
        "before\n<!-- bench:begin optree map -->\n\noptree\n\nmap\n\n<!-- bench:end -->\nafter\n"
    )
    assert bench_report.fill(filled, lambda suite, table: (suite, table)) == filled


def test_a_page_describes_each_measurement_once() -> None:
    block = "<!-- bench:begin {} map -->\n<!-- bench:end -->\n"
    text = "# Speed of `map`\n" + "".join(map(block.format, ("a", "b", "a"))) + TEXT
    filled = bench_report.fill(text, lambda suite, table: (f"machine of {suite}", table))
    assert [filled.count(f"machine of {suite}\n") for suite in ("a", "b", "optree")] == [1, 1, 1]
    assert filled.count("\nMeasured as under [Speed of `map`](#speed-of-map).\n\nmap\n") == 1
    untitled = bench_report.fill(TEXT * 2, lambda suite, table: ("machine", table))
    assert untitled.count("\nMeasured as under the first table.\n") == 1


@pytest.mark.parametrize(
    "text", [TEXT.replace("<!-- bench:end -->", ""), TEXT.replace(" map -->", " -->")]
)
def test_a_marker_without_a_partner_is_refused(text: str) -> None:
    with pytest.raises(bench_report.ReportError, match="expected pairs of"):
        bench_report.fill(text, lambda suite, table: ("", ""))


def test_a_missing_result_says_how_to_make_one(tmp_path: Path) -> None:
    assert "tools/dev.py bench" in bench_report.render("optree", "map", tmp_path)[1]


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    (results / "speed.json").write_text(json.dumps({"machine": "M", "ms": 3}))
    suite = tmp_path / "benchmarks" / "speed"
    suite.mkdir()
    (suite / "__init__.py").touch()
    (suite.parent / "__init__.py").touch()
    (suite / "report.py").write_text(
        "def machine_lines(result):\n    return result['machine']\n"
        "def map_table(result):\n    return f\"| {result['ms']} |\"\n"
        "def rest_table(result):\n    return 'Not measured yet.'\n"
    )
    # The suite of this test must not be found in the `benchmarks` of the repository.
    ours = [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]
    for name in ours:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
        del sys.modules[name]


def test_a_table_comes_with_the_machine_it_was_measured_on(stored: Path) -> None:
    assert bench_report.render("speed", "map", stored) == ("M", "| 3 |")
    assert bench_report.render("speed", "rest", stored) == ("", "Not measured yet.")


def test_an_unknown_table_names_those_there_are(stored: Path) -> None:
    with pytest.raises(bench_report.ReportError, match=r"\(map, rest\), got 'flatten'"):
        bench_report.render("speed", "flatten", stored)


def test_a_damaged_result_is_refused(stored: Path) -> None:
    (stored / "benchmarks" / "results" / "speed.json").write_text("{")
    with pytest.raises(bench_report.ReportError, match="expected JSON in benchmarks"):
        bench_report.render("speed", "map", stored)


def test_a_picture_of_another_result_is_stale(stored: Path) -> None:
    result = stored / "benchmarks" / "results" / "speed.json"
    result.write_text(json.dumps({"created": "2026-01-01T00:00:00+00:00"}))
    assert bench_report.picture_is_stale("plot.png", "speed", stored)
    (stored / "plot.png").write_bytes(b"...2026-01-01T00:00:00+00:00...")
    assert not bench_report.picture_is_stale("plot.png", "speed", stored)
    result.write_text(json.dumps({"created": "2026-01-02T00:00:00+00:00"}))
    assert bench_report.picture_is_stale("plot.png", "speed", stored)


def test_the_pictures_of_this_repository_show_the_stored_results() -> None:
    for name, (suite, _) in bench_report.PICTURES.items():
        assert not bench_report.picture_is_stale(name, suite), f"{name}: run tools/bench_report.py"


def test_the_tables_of_this_repository_show_the_stored_results() -> None:
    assert bench_report.main(["--check"]) == 0
