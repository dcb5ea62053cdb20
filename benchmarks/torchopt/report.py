# SPDX-License-Identifier: Apache-2.0
"""Tables of the optimizer benchmarks, from their JSON."""

from __future__ import annotations

from typing import Any

from benchmarks.harness.tables import NOTHING, bytes_text, ratio_text, seconds_text, table
from benchmarks.torchopt.rivals import OURS

TITLES = {
    "adam": "Adam in place",
    "functional": "Adam functional, no graph",
    "differentiable": "Adam functional with its backward pass",
    "meta": "meta-step with Adam",
}


def key(cell: dict[str, Any]) -> tuple[Any, ...]:
    """Return what tells a cell from the others."""
    return cell["operation"], cell["tree"], cell.get("steps"), cell["rival"]


def _label(case: tuple[Any, ...]) -> str:
    operation, tree, steps = case
    name = TITLES.get(operation, f"{operation} in place")
    return f"{name}, {tree}" + (f", {steps} steps" if steps else "")


def all_tables(result: dict[str, Any]) -> str:
    """Return times, ATen operations and peak bytes; other libraries as multiples of our time."""
    cells = {key(cell): cell for cell in result["cells"]}
    cases = list(dict.fromkeys(k[:3] for k in cells))
    names = [n for n, entry in result["rivals"].items() if entry["available"] and n != OURS]
    labels = [result["rivals"][n]["label"] for n in names]

    def value(case: tuple[Any, ...], rival: str, field: str) -> Any:
        cell = cells.get((*case, rival), {})
        return cell.get(field) if cell.get("status") == "ok" else None

    def ratio(case: tuple[Any, ...], rival: str, field: str) -> str:
        theirs, ours = value(case, rival, field), value(case, OURS, field)
        return ratio_text(theirs / ours) if theirs is not None and ours else NOTHING

    times = table(
        ["case", "torchopt", *labels],
        [
            [
                _label(case),
                seconds_text(value(case, OURS, "min")),
                *(ratio(case, n, "min") for n in names),
            ]
            for case in cases
        ],
    )
    aten = table(
        ["ATen operations", "torchopt", *labels],
        [
            [_label(case), *(_number(value(case, n, "aten")) for n in (OURS, *names))]
            for case in cases
        ],
    )
    memory = table(
        ["peak bytes", "torchopt", *labels],
        [
            [_label(case), *(bytes_text(value(case, n, "peak_bytes")) for n in (OURS, *names))]
            for case in cases
            if case[0] == "meta"
        ],
    )
    return f"{times}\n\n{aten}\n\n{memory}"


def _number(value: int | None) -> str:
    return NOTHING if value is None else str(value)
