# SPDX-License-Identifier: Apache-2.0
"""A stored figure has the date, the machine and the load of its measurement."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from benchmarks import __main__ as everything
from benchmarks.harness import program, results, tournament
from benchmarks.harness.rival import ROOT
from benchmarks.torchopt.implicit.__main__ import SUITE as IMPLICIT
from benchmarks.torchopt.run import SUITE as TORCHOPT
from benchmarks.torchopt.zero_order.__main__ import SUITE as ZERO_ORDER


def result(created: str, load: float, *trees: str) -> dict[str, Any]:
    made = results.new_result("speed", {}, {})
    cell = {"operation": "flatten", "rival": "ours", "gc": False, "status": "ok", "load": load}
    made["cells"] = [{"tree": tree, **cell} for tree in trees]
    return {**made, "created": created, "machine": {"processor": "P", "load_before": load}}


def test_what_was_measured_under_load_is_not_stored(tmp_path: Path) -> None:
    path = tmp_path / "speed.json"
    busy = result("2026-01-01", 3.0, "a", "b")
    with pytest.raises(results.LoadError, match=r"at most 1\.5 while measuring, got 3\.0"):
        results.store(busy, path)
    assert not path.exists()
    options = argparse.Namespace(output=path, under_load=False, update=False)
    assert program.finish(busy, options) == 1
    results.store(busy, path, under_load=True)
    assert results.provenance(results.read_result("speed", tmp_path)) == (
        " 2 were measured under a load of 3.0."
    )


def test_cells_that_are_kept_are_counted_with_their_date(tmp_path: Path) -> None:
    path = tmp_path / "speed.json"
    results.store(result("2026-01-01", 1.0, "a", "b", "c"), path)
    results.store(result("2026-01-02", 1.2, "b"), path, update=True)
    stored = results.read_result("speed", tmp_path)
    assert {cell["tree"]: cell["run"] for cell in stored["cells"]} == {"a": 0, "c": 0, "b": 1}
    assert [run["created"] for run in stored["runs"]] == ["2026-01-01", "2026-01-02"]
    assert results.provenance(stored) == " 2 of 3 figures are of 2026-01-01."
    results.store(result("2026-01-03", 1.0, "a", "b", "c"), path)
    assert results.provenance(results.read_result("speed", tmp_path)) == ""


def test_a_cell_that_is_measured_again_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "speed.json"
    for day, timings in (("2026-01-01", 30), ("2026-01-02", 29)):
        turn = {"min": 1.0, "median": 1.0, "timings": timings}
        cell = tournament.measured({"tree": "a", "operation": "flatten"}, "ours", False, [turn], {})
        made = {**result(day, 1.0), "cells": [{**cell, "load": 1.0}]}
        results.store(made, path, update=True)
    (stored,) = results.read_result("speed", tmp_path)["cells"]
    assert stored["timings"] == 29


@pytest.mark.parametrize("path", sorted(results.RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_no_stored_result_has_a_cell_twice(path: Path) -> None:
    cells = json.loads(path.read_text(encoding="utf-8")).get("cells", ())
    names = Counter(map(results.identity, cells))
    assert [name for name, count in names.items() if count > 1] == []


def test_a_result_that_would_lose_a_cell_is_not_stored(tmp_path: Path) -> None:
    made = result("2026-01-01", 1.0, "a", "b")
    made["cells"] = [{**cell, "tree": None, "layout": cell["tree"]} for cell in made["cells"]]
    results.store(made, tmp_path / "speed.json")
    assert len(results.read_result("speed", tmp_path)["cells"]) == 2
    made["cells"] = [{**cell, "layout": "a"} for cell in made["cells"]]
    with pytest.raises(ValueError, match="expected one cell of each identity"):
        results.store(made, tmp_path / "speed.json")


@pytest.mark.parametrize(("threads", "stored"), [(1, False), (2, True)])
def test_each_thread_may_add_one_to_the_load(tmp_path: Path, threads: int, stored: bool) -> None:
    made = result("2026-01-01", 2.1, "a")
    made["settings"]["threads"] = threads
    options = argparse.Namespace(output=tmp_path / "x.json", under_load=False, update=False)
    assert program.finish(made, options) == int(not stored)
    assert options.output.exists() is stored


def test_no_stored_result_was_measured_under_load() -> None:
    for path in results.RESULTS.glob("*.json"):
        runs = json.loads(path.read_text(encoding="utf-8")).get("runs", ())
        marked = [run for run in runs if isinstance(run, dict) and run.get("under_load")]
        assert not marked, path.name


@pytest.mark.parametrize("suite", [TORCHOPT, IMPLICIT, ZERO_ORDER], ids=lambda suite: suite.name)
def test_every_group_of_a_suite_has_cases_and_a_table(suite: program.Suite) -> None:
    assert set(suite.groups) == set(suite.tables)
    for group in suite.groups.values():
        for quick in (False, True):
            cases = group.cases(quick)
            assert all({"tree", "operation"} <= set(case) for case in cases)
            assert len({json.dumps(case) for case in cases}) == len(cases) > 0
    assert suite.full.rounds >= 5


def test_commands_that_are_documented_exist() -> None:
    for module in everything.SUITES.values():
        place = ROOT / module.replace(".", "/")
        assert place.with_suffix(".py").is_file() or (place / "__main__.py").is_file(), module


def test_unknown_suites_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert everything.main(["speed"]) == 2
    assert "expected suites among optree, torchopt" in capsys.readouterr().err
