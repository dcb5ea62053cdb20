# SPDX-License-Identifier: Apache-2.0
"""The sentences at the top of the pages of benchmarks hold for the stored results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.harness.results import Figures
from benchmarks.optree.operations import MATRIX
from benchmarks.optree.rivals import OURS
from benchmarks.torchopt.rivals import OURS as TORCHOPT

RESULTS = Path(__file__).resolve().parents[1] / "results"


def stored(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return result


def test_no_other_library_is_faster_at_flatten_unflatten_and_map() -> None:
    result = stored("optree")
    figures = Figures(result)
    cells = {(cell["tree"], cell["operation"], cell["rival"]) for cell in result["cells"]}
    ratios = {
        (tree, operation, rival): figures.ratio(tree, operation, rival, OURS)
        for tree, operation, rival in cells
        if operation in MATRIX and rival != OURS
    }
    found = {cell: ratio for cell, ratio in ratios.items() if ratio is not None}
    assert len(found) > 100
    assert {cell: ratio for cell, ratio in found.items() if ratio <= 1} == {}


def test_steps_of_adam_are_faster_but_for_one_that_memory_bounds() -> None:
    times = {
        (cell["operation"], cell["tree"], cell["rival"]): cell["median"]
        for cell in stored("torchopt")["cells"]
        if cell["status"] == "ok" and cell["operation"] in ("adam", "functional", "differentiable")
    }
    behind = [
        (operation, tree, rival)
        for (operation, tree, rival), seconds in times.items()
        if rival != TORCHOPT and seconds <= times[operation, tree, TORCHOPT]
    ]
    assert len(times) > 30
    assert [(operation, rival) for operation, _, rival in behind] in ([], [("adam", "torch-fused")])
    assert all("ResNet-50" in tree for _, tree, _ in behind)
