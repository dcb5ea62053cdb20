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


def test_the_sentences_below_the_table_of_engines_follow_from_it() -> None:
    result = stored("engines")
    rows = {row["engine"].partition(": ")[::2]: row for row in result["rows"]}
    steps, unknowns = result["problem"]["steps"], result["problem"]["size"]

    def figures(engine: str, *names: str, figure: str = "error") -> list[float]:
        return [rows[engine, name][figure] for name in names]

    part = steps // 10
    names = ("all steps", f"last {part} steps", f"{part} snapshots", "first order", "mixed mode")
    every, last, snapshots, first, mixed = (rows["explicit", name] for name in names)
    assert max(x["error"] for x in (every, snapshots, mixed)) < 1e-6
    assert snapshots["kept_bytes"] < every["kept_bytes"] / 10
    assert snapshots["median"] > every["median"]
    assert mixed["kept_bytes"] >= every["kept_bytes"]  # it does not pay off here
    assert 8 < every["kept_bytes"] / last["kept_bytes"] < 12
    assert last["error"] > 0.2
    assert last["cosine"] > 0.99
    assert first["kept_bytes"] == min(x["kept_bytes"] for (e, _), x in rows.items() if e[0] == "e")
    assert first["cosine"] < 0.95

    kept = [x["kept_bytes"] for (engine, _), x in rows.items() if engine == "implicit"]
    assert max(kept) < every["kept_bytes"] / 30  # one solution, however many steps
    exact = ("conjugate gradients", "MINRES", "LSMR, which needs no symmetry", "Cholesky")
    assert max(figures("implicit", *exact)) < 1e-6
    few, terms = "5 steps of conjugate gradients", "5 terms of the Neumann series"
    assert figures("implicit", few)[0] < 0.1 < 0.5 < figures("implicit", terms)[0]
    cg, lsmr, certified = figures(
        "implicit", exact[0], exact[2], "with a certificate of its error", figure="median"
    )
    assert cg < lsmr < certified

    for pairs in (100, 1000):
        (error,) = figures("zero-order", f"{pairs} antithetic pairs")
        assert abs(error / (unknowns / pairs) ** 0.5 - 1) < 0.2
    two, one, apart = figures(
        "zero-order", "100 antithetic pairs", "200 forward differences", "100 orthogonal pairs"
    )
    assert max(one, apart) < two
    guided = rows["zero-order", "guided ES, 100 pairs, by first order"]
    assert abs(guided["cosine"] - first["cosine"]) < 0.01
