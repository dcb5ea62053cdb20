# SPDX-License-Identifier: Apache-2.0
"""Tables of the zero-order benchmark."""

from __future__ import annotations

from typing import Any

from benchmarks.harness.results import Figures
from benchmarks.harness.tables import NOTHING, bytes_text, ratio_table, table
from benchmarks.optree.report import machine_lines
from benchmarks.torchopt.zero_order.rivals import OURS
from benchmarks.torchopt.zero_order.suite import CASES, MEMORY, MEMORY_SAMPLES, METHODS, SAMPLES

__all__ = ["error_table", "machine_lines", "memory_table", "speed_table"]


def speed_table(result: dict[str, Any]) -> str:
    """Return our evaluations a second and every rival's time as a multiple of ours."""
    figures = Figures(result)
    names = [name for name in CASES if figures.seconds(name, "speed", OURS)]
    rates = [
        2 * CASES[name].samples / (figures.seconds(name, "speed", OURS) or 1) for name in names
    ]
    labels = [[name, f"{rate:,.0f}"] for name, rate in zip(names, rates)]
    pairs = [(name, "speed") for name in names]
    head = ["network, 1000 pairs", "evaluations/s"]
    return ratio_table(figures, result["rivals"], pairs, labels, head)


def error_table(result: dict[str, Any]) -> str:
    """Return the relative error of each method against its number of evaluations."""
    rows: dict[tuple[str, str, str], dict[int, str]] = {}
    for cell in result["cells"]:
        if cell["operation"] in METHODS:
            key = (cell["tree"], cell["operation"], result["rivals"][cell["rival"]]["label"])
            text = NOTHING
            if cell["status"] == "ok":
                text = f"{cell['error']:.3g} ({cell['evaluations']})"
            rows.setdefault(key, {})[cell["samples"]] = text
    head = ["function of 24 numbers", "method", "library", *(f"N = {n}" for n in SAMPLES)]
    return table(
        head, [[*key, *(row.get(n, NOTHING) for n in SAMPLES)] for key, row in rows.items()]
    )


def memory_table(result: dict[str, Any]) -> str:
    """Return the peak of memory of each rival against the number of pairs."""
    rows: dict[str, dict[int, str]] = {}
    for cell in result["cells"]:
        if cell["operation"] == "memory":
            label = result["rivals"][cell["rival"]]["label"]
            text = bytes_text(cell["peak_bytes"]) if cell["status"] == "ok" else cell["status"]
            rows.setdefault(label, {})[cell["samples"]] = text
    sizes = "-".join(map(str, MEMORY.sizes))
    head = [f"{sizes}, pairs:", *(str(n) for n in MEMORY_SAMPLES)]
    return table(
        head,
        [[label, *(row.get(n, NOTHING) for n in MEMORY_SAMPLES)] for label, row in rows.items()],
    )
