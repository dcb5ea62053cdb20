# SPDX-License-Identifier: Apache-2.0
"""Put results of `run.py` on several Pythons side by side.

    python3.11 -m benchmarks.optree.run --rival optree-0.20.0 --group matrix --output 311.json
    python3.14 -m benchmarks.optree.run --rival optree-0.20.0 --group matrix --output 314.json
    python -m benchmarks.optree.pythons 311.json 314.json   # benchmarks/results/optree_pythons.json

Each Python has its own builds of both libraries, so only the ratios of one Python compare.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.harness.results import RESULTS, Figures, write_result
from benchmarks.harness.tables import ratio_text, table
from benchmarks.optree.operations import LABELS, MATRIX
from benchmarks.optree.rivals import OURS
from benchmarks.optree.targets import BASELINE, FLOORS
from benchmarks.optree.trees import TREES, tree_label


def side_by_side(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the ratios of several results as one, a cell per Python, tree and operation."""
    cells = []
    runs = []
    for result in results:
        python = result["rivals"][OURS]["python"]
        runs.append({
            "python": python,
            "created": result["created"],
            "rounds": result["settings"]["rounds"],
            "load_before": result["machine"].get("load_before"),
        })  # fmt: skip
        figures = Figures(result)
        for tree in TREES:
            for operation in MATRIX:
                ratio = figures.ratio(tree, operation, BASELINE, OURS)
                if ratio is not None:
                    own = figures.seconds(tree, operation, OURS)
                    cell = {"python": python, "tree": tree, "operation": operation}
                    cells.append({**cell, "median": own, "ratio": ratio})
    last = results[-1]
    head = {"suite": "optree_pythons", "created": last["created"], "machine": last["machine"]}
    return {**head, "runs": runs, "cells": cells}


def machine_lines(result: dict[str, Any]) -> str:
    """Return lines about the machine and the versions of the results."""
    machine = result["machine"]
    runs = [
        f"Python {run['python']}: {run['rounds']} rounds, {run['created'][:10]}, "
        f"load of the machine before {run['load_before'] or 'unknown'}"
        for run in result["runs"]
    ]
    built = f" Ours of commit {result['revision']}." if result["revision"] else ""
    first = f"{machine['processor']}, {machine['cores']} cores, {machine['system']}.{built}"
    return f"{first}\n{'; '.join(runs)}."


def pythons_table(result: dict[str, Any]) -> str:
    """Return the published optree's time over ours, a column per Python, and the floor."""
    ratios = {(c["python"], c["tree"], c["operation"]): c["ratio"] for c in result["cells"]}
    pythons = [run["python"] for run in result["runs"]]
    pairs = dict.fromkeys((c["tree"], c["operation"]) for c in result["cells"])
    rows = [
        [
            tree_label(tree),
            LABELS[operation],
            *(ratio_text(ratios.get((python, tree, operation))) for python in pythons),
            ratio_text(FLOORS[tree][operation]),
        ]
        for tree, operation in pairs
    ]
    text = table(["tree", "operation", *pythons, "floor"], rows)
    return f"{text}\n\n{below_floors(result)}"


def below_floors(result: dict[str, Any]) -> str:
    """Return a sentence about the cells that miss their floors."""
    low: dict[tuple[str, str], list[str]] = {}
    for cell in result["cells"]:
        place = cell["tree"], cell["operation"]
        if cell["ratio"] < FLOORS[place[0]][place[1]]:
            low.setdefault(place, []).append(cell["python"])
    if not low:
        return "Every cell holds its floor."
    cells = [
        f"{LABELS[operation]} of {tree_label(tree)} on {', '.join(pythons)}"
        for (tree, operation), pythons in low.items()
    ]
    return f"Below the floor: {'; '.join(cells)}."


def main(arguments: list[str] | None = None) -> int:
    """Merge the files and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="results of run.py")
    parser.add_argument("--revision", default="", help="commit that ours was built from")
    parser.add_argument("--output", type=Path, default=RESULTS / "optree_pythons.json")
    options = parser.parse_args(arguments)
    results = [json.loads(file.read_text(encoding="utf-8")) for file in options.files]
    result = {**side_by_side(results), "revision": options.revision}
    write_result(result, options.output)
    print(f"{machine_lines(result)}\n\n{pythons_table(result)}\n\nwritten to {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
