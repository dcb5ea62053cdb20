# SPDX-License-Identifier: Apache-2.0
"""The tables of meta-steps against jax, from the stored result."""

from __future__ import annotations

from typing import Any

from benchmarks.harness.results import provenance
from benchmarks.harness.tables import NOTHING, ratio_text, seconds_text, table

NAMES = {
    "maml sgd": "MAML, 16 tasks, MLP, 5 steps of SGD",
    "maml adam": "MAML, 16 tasks, MLP, 5 steps of Adam",
    "one task, 10": "one task, MLP, 10 steps of Adam",
    "one task, 50": "one task, MLP, 50 steps of Adam",
    "one task, 500": "one task, MLP, 500 steps of Adam",
    "maml-rl": "MAML-RL, 40 tasks, 3 steps of SGD",
    "learned loss": "learned loss, 10 steps of SGD",
    "conv4": "MAML, 8 tasks, conv4, 5 steps of SGD",
    "transformer": "transformer, 6 blocks, 4 steps of Adam",
}


def machine_lines(result: dict[str, Any]) -> str:
    """Return a line about the machine and the versions of a result."""
    machine, versions = result["machine"], result["settings"]["versions"]
    known = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['system']}; {known}; medians, "
        f"{result['created'][:10]}, load of the machine before "
        f"{machine.get('load_before', 'unknown')}.{provenance(result)}"
    )


def _rows(result: dict[str, Any]) -> list[tuple[str, int, dict[str, dict[str, Any]]]]:
    """Return the cells of each row and number of threads, by way of execution."""
    found: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for cell in result["cells"]:
        found.setdefault((cell["row"], cell["threads"]), {})[cell["way"]] = cell
    order = list(NAMES)
    keys = sorted(found, key=lambda key: (key[1], order.index(key[0])))
    return [(row, threads, found[row, threads]) for row, threads in keys]


def _value(cells: dict[str, dict[str, Any]], way: str, name: str) -> float | None:
    value = cells.get(way, {}).get(name)
    return None if value is None else value / (1e3 if name.endswith("_ms") else 1)


def _ratio(first: float | None, second: float | None) -> str:
    return NOTHING if first is None or second is None else ratio_text(first / second)


def speed_table(result: dict[str, Any]) -> str:
    """Return the time of a meta-gradient, eager, compiled and by jax, and the ratios."""
    rows = []
    for row, threads, cells in _rows(result):
        ways = [_value(cells, way, "median_ms") for way in ("eager", "compile", "jit")]
        eager, ours, jax = ways
        ratios = [_ratio(ours, jax), _ratio(eager, ours)]
        rows.append([NAMES[row], str(threads), *map(seconds_text, ways), *ratios])
    head = ["meta-gradient", "threads", "eager", "compiled", "jax", "compiled / jax"]
    return table([*head, "eager / compiled"], rows)


def summary_table(result: dict[str, Any]) -> str:
    """Return the times on one thread alone."""
    return speed_table({**result, "cells": [c for c in result["cells"] if c["threads"] == 1]})


def compile_table(result: dict[str, Any]) -> str:
    """Return the time of the first call, and how far the gradients are from those of jax."""
    rows = []
    for row, threads, cells in _rows(result):
        firsts = [_value(cells, way, "first_s") for way in ("compile", "again", "jit")]
        differ = max(cell.get("differ") or 0.0 for cell in cells.values())
        shown = f"{differ:.0e}" if differ else NOTHING
        rows.append([NAMES[row], str(threads), *map(seconds_text, firsts), shown])
    head = ["first call", "threads", "compiled", "in a second process", "jax"]
    return table([*head, "difference of the gradients"], rows)
