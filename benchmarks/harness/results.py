# SPDX-License-Identifier: Apache-2.0
"""Results as JSON under `benchmarks/results/`, and figures read from them."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

from benchmarks.harness.machine import describe_machine
from benchmarks.harness.rival import BENCHMARKS

RESULTS = BENCHMARKS / "results"


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


def write_result(result: dict[str, Any], path: Path) -> None:
    """Write a result, one cell a line so that changes can be read."""
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
        FileNotFoundError: it was never measured; the text says how to.
    """
    path = folder / f"{name}.json"
    if not path.is_file():
        raise FileNotFoundError(f"expected results in {path}; measure them first (nox -s bench)")
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result


class Figures:
    """Minima of a result by tree, operation and rival."""

    def __init__(self, result: dict[str, Any], *, collect: bool = False) -> None:
        self._cells = {
            (cell["tree"], cell["operation"], cell["rival"]): cell
            for cell in result["cells"]
            if cell["status"] != "ok" or cell["gc"] is collect
        }

    def seconds(self, tree: str, operation: str, rival: str) -> float | None:
        """Return the minimum, or None where the rival has no figure."""
        cell = self._cells.get((tree, operation, rival))
        return cell["min"] if cell is not None and cell["status"] == "ok" else None

    def status(self, tree: str, operation: str, rival: str) -> str:
        """Return "ok", "unsupported", "error", "crashed", "different" or "missing"."""
        cell = self._cells.get((tree, operation, rival))
        return "missing" if cell is None else str(cell["status"])

    def ratio(self, tree: str, operation: str, rival: str, ours: str) -> float | None:
        """Return the rival's time divided by ours, or None."""
        theirs = self.seconds(tree, operation, rival)
        own = self.seconds(tree, operation, ours)
        return None if theirs is None or own is None else theirs / own
