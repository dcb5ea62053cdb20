# SPDX-License-Identifier: Apache-2.0
"""Tables of the optimizer benchmarks, from their JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.harness.plot import draw_bars
from benchmarks.harness.tables import (
    NOTHING,
    bytes_text,
    range_text,
    ratio_text,
    spread_text,
    table,
)
from benchmarks.optree.report import machine_lines, machine_note
from benchmarks.torchopt import matrices, tasks
from benchmarks.torchopt.rivals import OURS

__all__ = [
    "EACH_OPTIMIZER",
    "all_tables",
    "conclusion_table",
    "key",
    "machine_lines",
    "matrices_table",
    "meta_table",
    "optimizers_table",
    "speed_plot",
    "step_table",
    "tasks_table",
]

TITLES = {
    "adam": "in place",
    "functional": "functional, no graph",
    "differentiable": "functional with its backward pass",
    "meta": "meta-step",
}


def key(cell: dict[str, Any]) -> tuple[Any, ...]:
    """Return the fields that identify a cell."""
    return cell["operation"], cell["tree"], cell.get("steps"), cell["rival"]


class _Cells:
    def __init__(self, result: dict[str, Any]) -> None:
        self.cells = {key(cell): cell for cell in result["cells"]}
        self.cases = list(dict.fromkeys(k[:3] for k in self.cells))
        entries = result["rivals"]
        self.labels = {
            name: entry["label"]
            for name, entry in entries.items()
            if entry["available"] and name != OURS
        }

    def value(self, case: tuple[Any, ...], rival: str, field: str) -> Any:
        cell = self.cells.get((*case, rival), {})
        return cell.get(field) if cell.get("status") == "ok" else None

    def measured(self, cases: list[tuple[Any, ...]], field: str) -> dict[str, str]:
        """Return the labels of the rivals that have a figure of one of the cases."""
        return {
            rival: label
            for rival, label in self.labels.items()
            if any(self.value(case, rival, field) is not None for case in cases)
        }

    def times(self, cases: list[tuple[Any, ...]]) -> str:
        if not cases:
            return "Not measured yet."
        rows = []
        found = self.measured(cases, "median")
        for case in cases:
            ours = self.value(case, OURS, "median")
            theirs = [self.value(case, rival, "median") for rival in found]
            ratios = [ratio_text(t / ours) if t is not None and ours else NOTHING for t in theirs]
            own = spread_text(ours, self.value(case, OURS, "min"))
            rows.append([_label(case), own, *ratios])
        return table(["time", "torchopt", *found.values()], rows)

    def counts(self, cases: list[tuple[Any, ...]], field: str, title: str) -> str:
        show = bytes_text if field == "peak_bytes" else _number
        found = self.measured(cases, field)
        rows = [
            [_label(case), *(show(self.value(case, n, field)) for n in (OURS, *found))]
            for case in cases
        ]
        return table([title, "torchopt", *found.values()], rows)

    def ratios(self, operation: str, trees: list[str], rival: str) -> list[float | None]:
        found: list[float | None] = []
        for tree in trees:
            case = (operation, tree, None)
            ours, theirs = (self.value(case, name, "median") for name in (OURS, rival))
            found.append(theirs / ours if ours and theirs is not None else None)
        return found


DRAWN = ("adam", "functional", "differentiable")


def speed_plot(result: dict[str, Any], path: Path) -> None:
    """Draw every implementation's time of a step of Adam as a multiple of ours."""
    cells = _Cells(result)
    trees = list(dict.fromkeys(tree for operation, tree, _ in cells.cases if operation in DRAWN))
    groups = [tree.partition(",")[0].replace("-", "-\n").replace(" x ", "\nx ") for tree in trees]
    panels = [
        (
            TITLES[operation],
            groups,
            [
                (label, cells.ratios(operation, trees, rival))
                for rival, label in cells.labels.items()
            ],
        )
        for operation in DRAWN
    ]
    draw_bars(
        path,
        "A step of Adam: time of each implementation ÷ time of torchopt",
        panels,
        "times slower",
        note=machine_note(result),
        description=result["created"],
    )


def _label(case: tuple[Any, ...]) -> str:
    operation, tree, steps = case
    name = TITLES.get(operation, operation)
    count = f", {steps} step{'s' * (steps > 1)}" if steps else ""
    return f"{name}, {tree}{count}"


def _number(value: int | None) -> str:
    return NOTHING if value is None else str(value)


def conclusion_table(result: dict[str, Any]) -> str:
    """Return the range of each implementation's time as a multiple of ours, over all sizes."""
    cells = _Cells(result)
    found = cells.measured([case for case in cells.cases if case[0] in TITLES], "median")
    rows = []
    for operation, title in TITLES.items():
        row = [title if operation == "meta" else f"a step of Adam, {title}"]
        cases = [case for case in cells.cases if case[0] == operation]
        for rival in found:
            times = [[cells.value(c, name, "median") for name in (rival, OURS)] for c in cases]
            row.append(range_text([t / ours if t and ours else None for t, ours in times]))
        rows.append(row)
    return table(["time, ours 1", *found.values()], rows)


def step_table(result: dict[str, Any]) -> str:
    """Return the times and operations of one step of Adam."""
    cells = _Cells(result)
    cases = [c for c in cells.cases if c[0] in ("adam", "functional", "differentiable")]
    return f"{cells.times(cases)}\n\n{cells.counts(cases, 'aten', 'ATen operations')}"


EACH_OPTIMIZER = "500 x 1k"
"""The set of tensors on which every optimizer is compared with every rival."""


def optimizers_table(result: dict[str, Any]) -> str:
    """Return the times of one step in place of other optimizers.

    On one set of tensors for every rival, and on all sets for torch's foreach variants.
    """
    cells = _Cells(result)
    others = {*TITLES, *tasks.OPTIMIZERS, *matrices.STEPS}
    cases = [c for c in cells.cases if c[0] not in others]
    text = cells.times([c for c in cases if c[1] == EACH_OPTIMIZER])
    trees = list(dict.fromkeys(tree for _, tree, _ in cases))
    if len(trees) < 2:
        return text
    rows = []
    for name in dict.fromkeys(operation for operation, _, _ in cases):
        found = cells.ratios(name, trees, "torch-foreach")
        rows.append([name, *(NOTHING if ratio is None else ratio_text(ratio) for ratio in found)])
    return f"{text}\n\n{table(['torch foreach ÷ torchopt', *trees], rows)}"


def matrices_table(result: dict[str, Any]) -> str:
    """Return the times of one step in place of the optimizers of matrices."""
    cells = _Cells(result)
    return cells.times([c for c in cells.cases if c[0] in matrices.STEPS])


def meta_table(result: dict[str, Any]) -> str:
    """Return the times and the memory of meta-steps with Adam."""
    cells = _Cells(result)
    cases = [c for c in cells.cases if c[0] == "meta"]
    return f"{cells.times(cases)}\n\n{cells.counts(cases, 'peak_bytes', 'peak bytes')}"


def tasks_table(result: dict[str, Any]) -> str:
    """Return the times of whole tasks on small networks."""
    cells = _Cells(result)
    return cells.times([c for c in cells.cases if c[0] in tasks.OPTIMIZERS])


def all_tables(result: dict[str, Any]) -> str:
    """Return all tables."""
    return "\n\n".join(
        make(result)
        for make in (step_table, optimizers_table, matrices_table, meta_table, tasks_table)
    )
