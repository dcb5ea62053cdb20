# SPDX-License-Identifier: Apache-2.0
"""Results as JSON under `benchmarks/results/`, and figures read from them."""

from __future__ import annotations

import datetime
import json
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.harness.machine import describe_machine
from benchmarks.harness.rival import BENCHMARKS
from benchmarks.harness.tables import NOTHING, ratio_text, seconds_text, spread_text

RESULTS = BENCHMARKS / "results"

# The benchmark itself is one busy thread; each further one adds 1 to the limit. Figures are
# published only if it ran alone.
LOAD_LIMIT = 1.5


class LoadError(Exception):
    """A result was measured while other programs ran."""


def new_result(suite: str, rivals: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Return a result without cells yet: when, on what and how it was measured."""
    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        "suite": suite,
        "created": now.isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "settings": settings,
        "rivals": {name: _without_files(entry) for name, entry in rivals.items()},
        "cells": [],
    }


def _without_files(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key != "file"}


def store(
    result: dict[str, Any], path: Path, *, under_load: bool = False, update: bool = False
) -> None:
    """Write a result that was measured on a quiet machine.

    Each cell has the index of its run in `runs`, which says when, on what and how it was measured.

    Args:
        result: the result.
        path: the file.
        under_load: write it even if the machine was busy, and mark it.
        update: keep the cells of the file that were not measured again, with their runs.

    Raises:
        LoadError: the machine was busier than `LOAD_LIMIT`.
        ValueError: two cells have the same `identity`, so that one of them would be lost.
    """
    names = Counter(map(identity, result["cells"]))
    if twice := [name for name, count in names.items() if count > 1]:
        raise ValueError(f"expected one cell of each identity, got more than one of {twice[0]}")
    loads = [cell["load"] for cell in result["cells"] if "load" in cell]
    most = statistics.median(loads) if loads else result["machine"].get("load_before", 0.0)
    run = {"created": result["created"], "machine": result["machine"], "load": most}
    limit = LOAD_LIMIT + result["settings"].get("threads", 1) - 1
    if most > limit:
        if not under_load:
            raise LoadError(
                f"expected a load of at most {limit} while measuring, got {most}; nothing was "
                "stored. Measure on a quiet machine, or pass --under-load, which marks the result."
            )
        run["under_load"] = True
    cells, runs = dict[tuple[Any, ...], Any](), []
    if update and path.is_file():
        old = read_result(path.stem, path.parent)
        runs = old.get("runs", [{"created": old["created"], "machine": old["machine"]}])
        cells = {identity(cell): {"run": 0, **cell} for cell in old["cells"]}
    cells |= {identity(cell): {"run": len(runs), **cell} for cell in result["cells"]}
    write_result({**result, "runs": [*runs, run], "cells": list(cells.values())}, path)


def identity(cell: dict[str, Any]) -> tuple[Any, ...]:
    """Return what names a cell; a result has one cell for each."""
    names = ["tree", "operation", "steps", "samples", "size", "rival", "gc"]
    names += ["row", "way", "threads", "case", "sigma", "layout", "python"]
    return tuple(str(cell.get(name)) for name in names)


def provenance(result: dict[str, Any]) -> str:
    """Return a sentence about cells of earlier runs, or that were measured under load."""
    runs = result.get("runs", [])
    counts = Counter(cell.get("run") for cell in result["cells"])
    dates: Counter[str] = Counter()
    for index, run in enumerate(runs):
        dates[run["created"][:10]] += counts[index]
    last = runs[-1]["created"][:10] if runs else ""
    parts = [
        f"{count} of {len(result['cells'])} figures are of {date}"
        for date, count in dates.items()
        if count and date != last
    ]
    parts += [
        f"{counts[index]} were measured under a load of {run['load']}"
        for index, run in enumerate(runs)
        if counts[index] and run.get("under_load")
    ]
    return f" {'; '.join(parts)}." if parts else ""


def write_result(result: dict[str, Any], path: Path) -> None:
    """Write a result, one cell per line so that changes are readable."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = ",\n".join("    " + json.dumps(_rounded(cell)) for cell in result["cells"])
    head = json.dumps({**result, "cells": []}, indent=2)
    text = head.replace('"cells": []', f'"cells": [\n{cells}\n  ]') if cells else head
    path.write_text(text + "\n", encoding="utf-8")


def _rounded(value: Any) -> Any:
    """Keep six digits of a number: more is noise."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return value


def read_result(name: str, folder: Path = RESULTS) -> dict[str, Any]:
    """Return a stored result.

    Raises:
        FileNotFoundError: it was never measured; the text says how to measure it.
    """
    path = folder / f"{name}.json"
    if not path.is_file():
        raise FileNotFoundError(f"expected results in {path}; measure them first (nox -s bench)")
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result


class Figures:
    """Medians of a result by tree, operation and rival."""

    def __init__(self, result: dict[str, Any], *, collect: bool = False) -> None:
        self._cells = {
            (cell["tree"], cell["operation"], cell["rival"]): cell
            for cell in result["cells"]
            if cell["status"] != "ok" or cell["gc"] is collect
        }

    def seconds(self, tree: str, operation: str, rival: str) -> float | None:
        """Return the median, or None if the rival has no figure."""
        cell = self._cells.get((tree, operation, rival))
        return cell["median"] if cell is not None and cell["status"] == "ok" else None

    def time_text(self, tree: str, operation: str, rival: str) -> str:
        """Return the median and how far the minimum is below it, or the status."""
        cell = self._cells.get((tree, operation, rival))
        if cell is None or cell["status"] != "ok":
            return self.status(tree, operation, rival)
        return spread_text(cell["median"], cell["min"])

    def status(self, tree: str, operation: str, rival: str) -> str:
        """Return "ok", "unsupported", "error", "crashed", "different" or "missing"."""
        cell = self._cells.get((tree, operation, rival))
        return "missing" if cell is None else str(cell["status"])

    def ratio(self, tree: str, operation: str, rival: str, ours: str) -> float | None:
        """Return the rival's time divided by ours, or None."""
        theirs = self.seconds(tree, operation, rival)
        own = self.seconds(tree, operation, ours)
        return None if theirs is None or own is None else theirs / own

    def ratio_text(self, tree: str, operation: str, rival: str, ours: str) -> str:
        """Return the ratio; the rival's time if ours is missing, or why it has none."""
        ratio = self.ratio(tree, operation, rival, ours)
        theirs = self.seconds(tree, operation, rival)
        if ratio is not None or theirs is not None:
            return seconds_text(theirs) if ratio is None else ratio_text(ratio)
        status = self.status(tree, operation, rival)
        return {"unsupported": NOTHING, "missing": NOTHING}.get(status, status)
