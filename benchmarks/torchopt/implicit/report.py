# SPDX-License-Identifier: Apache-2.0
"""Tables of the implicit benchmark."""

from __future__ import annotations

from typing import Any

from benchmarks.harness.results import Figures
from benchmarks.harness.tables import bytes_text, ratio_table, seconds_text, table
from benchmarks.optree.report import machine_lines

__all__ = ["machine_lines", "memory_table", "products_table", "solves_table"]

TITLES = {
    "logistic": "logistic regression, conjugate gradients",
    "equilibrium": "equilibrium layer, plain iteration",
    "anderson": "equilibrium layer, Anderson's mixing",
    "small_ridge": "ridge regressions, solve and derivative",
}


def solves_table(result: dict[str, Any]) -> str:
    """Return our time and every rival's time as a multiple of it."""
    pairs = dict.fromkeys(
        (c["tree"], c["operation"]) for c in result["cells"] if c["operation"] in TITLES
    )
    labels = [[TITLES[operation], tree] for tree, operation in pairs]
    head = ["gradient of", "size"]
    return ratio_table(Figures(result), result["rivals"], list(pairs), labels, head)


def memory_table(result: dict[str, Any]) -> str:
    """Return the peak of live tensors against inner steps."""
    rows = [
        [
            f"{result['rivals'][c['rival']]['label']}, {c['operation']}",
            str(c["steps"]),
            bytes_text(c["peak_bytes"]),
            seconds_text(c["seconds"]),
        ]
        for c in result["cells"]
        if c["tree"] == "memory" and c["status"] == "ok"
    ]
    return table(["library, engine", "inner steps", "peak of tensors", "time"], rows)


def products_table(result: dict[str, Any]) -> str:
    """Return the products with the Hessian in a backward pass."""
    rows = [
        [
            str(result["rivals"][c["rival"]]["label"]),
            *(str(c[key]) for key in ("steps", "products", "evaluations")),
            f"{c['error']:.1e}",
        ]
        for c in result["cells"]
        if c["operation"] == "products" and c["status"] == "ok"
    ]
    return table(["library", "steps", "products", "evaluations", "error"], rows)
