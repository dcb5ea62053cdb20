# SPDX-License-Identifier: Apache-2.0
"""The cells of a result where we are below a floor or behind another library, and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.harness.results import Figures
from benchmarks.harness.tables import ratio_text
from benchmarks.optree.operations import LABELS
from benchmarks.optree.rivals import OURS
from benchmarks.optree.targets import BASELINE, COLD_FLOORS, FLOORS
from benchmarks.optree.trees import COLD_TREES, tree_label

# The fields of a memory cell, and their names in tables.
MEMORY = {
    "first_bytes": "bytes of the first spec",
    "further_bytes": "bytes of a further spec",
    "peak_bytes": "peak bytes of flatten",
}

UNEXPLAINED = "not explained: measure again"


@dataclass(frozen=True)
class Reason:
    """Why cells fall short; the cells are those of the operation and, if named, tree and rival."""

    text: str
    operation: str
    tree: str | None = None
    rival: str | None = None

    def applies_to(self, operation: str, tree: str, rival: str) -> bool:
        """Say whether this is the reason for a cell."""
        return (
            self.operation == operation
            and self.tree in (None, tree)
            and self.rival in (None, rival)
        )


_PICKLES = (
    "a pickle has the keys of a dict in both orders, so that the published optree can read it, and "
    "is checked when it is read; torch keeps one order and checks nothing"
)
REASONS = (
    Reason(_PICKLES, "pickle_dump", rival="torch"),
    Reason(_PICKLES, "pickle_load", rival="torch"),
    Reason(
        "the first spec pays for the keys in both orders, which later specs share; torch keeps one "
        "order, in a list for every spec",
        "first_bytes",
        tree="state_flat",
        rival="torch",
    ),
    Reason(
        "optree executes 0.89 of the instructions of optree 0.20.0 (callgrind, Python 3.11); both "
        "make the same tuples, and which of the two is ahead depends on the processor: on AMD it "
        "was optree, 1.15x",
        "paths",
        tree="resnet50",
        rival=BASELINE,
    ),
    Reason(
        "this repr wrote its text one character at a time; since then it executes 0.50 of those "
        "instructions, and 0.50 of those of jax (callgrind, Python 3.11)",
        "spec_repr",
        tree="state_flat",
        rival="jax",
    ),
    Reason(
        "optree executes 0.77 of the instructions of jax (callgrind, Python 3.11) but makes more "
        "objects: besides the children and the keys, the result has the path entries, the keys in "
        "both orders, the class and two functions; on AMD both have been ahead, 0.93x and 1.17x",
        "one_level",
        tree="dict3",
        rival="jax",
    ),
    Reason(
        "it takes as long as `list.copy` of the leaves, which counts one reference for each and "
        "does nothing else; on an Intel Xeon that is 4.2 to 4.7 times faster than optree 0.20.0",
        "unflatten",
        tree="list10k",
        rival=BASELINE,
    ),
)


@dataclass(frozen=True)
class Shortfall:
    """A cell where we fall short.

    Attributes:
        tree: the name of the tree.
        operation: the name of the operation, or of a figure of memory.
        rival: the name of the library that is ahead, or that the floor refers to.
        label: the name of the library in tables.
        ratio: its figure as a multiple of ours.
        floor: the ratio that was required.
        collect: whether the garbage collector was on.
    """

    tree: str
    operation: str
    rival: str
    label: str
    ratio: float
    floor: float = 1.0
    collect: bool = False

    @property
    def what(self) -> str:
        """The name of the operation in tables."""
        label = MEMORY.get(self.operation) or LABELS[self.operation]
        return f"{label}, collector on" if self.collect else label

    @property
    def reason(self) -> str:
        """The reason, or a text saying that it is not known."""
        for reason in REASONS:
            if reason.applies_to(self.operation, self.tree, self.rival):
                return reason.text
        return UNEXPLAINED

    def __str__(self) -> str:
        """Say it in a line."""
        ratio, where = ratio_text(self.ratio), f"{tree_label(self.tree)}, {self.what}"
        if self.floor != 1.0:
            return f"{where}: {ratio} the speed of {self.label}, floor {ratio_text(self.floor)}"
        amount = "bytes" if self.operation in MEMORY else "time"
        return f"{where}: {self.label} takes {ratio} our {amount}"


def shortfalls(result: dict[str, Any]) -> list[Shortfall]:
    """Return the cells below a floor, then those where another library is ahead."""
    names = {name: str(entry["label"]) for name, entry in result["rivals"].items()}
    return [*_below_floors(result, names), *_behind(result, names), *_heavier(result, names)]


def _below_floors(result: dict[str, Any], names: dict[str, str]) -> Iterator[Shortfall]:
    figures = Figures(result)
    floors = [(tree, op, floor) for tree, row in FLOORS.items() for op, floor in row.items()]
    floors += [(name, "cold_flatten", COLD_FLOORS[cold.keys]) for name, cold in COLD_TREES.items()]
    for tree, operation, floor in floors:
        ratio = figures.ratio(tree, operation, BASELINE, OURS)
        if ratio is not None and ratio < floor:
            yield Shortfall(tree, operation, BASELINE, names[BASELINE], ratio, floor)


def _behind(result: dict[str, Any], names: dict[str, str]) -> Iterator[Shortfall]:
    pairs = dict.fromkeys(
        (cell["tree"], cell["operation"]) for cell in result["cells"] if cell["operation"] in LABELS
    )
    for collect in (False, True):
        figures = Figures(result, collect=collect)
        for tree, operation in pairs:
            for rival, label in names.items():
                ratio = figures.ratio(tree, operation, rival, OURS)
                if rival != OURS and ratio is not None and ratio < 1.0:
                    yield Shortfall(tree, operation, rival, label, ratio, collect=collect)


def _heavier(result: dict[str, Any], names: dict[str, str]) -> Iterator[Shortfall]:
    cells = {
        (cell["tree"], cell["rival"]): cell
        for cell in result["cells"]
        if cell["operation"] == "memory" and cell["status"] == "ok"
    }
    for (tree, rival), cell in cells.items():
        own = cells.get((tree, OURS))
        if own is None or rival == OURS:
            continue
        for figure in MEMORY:
            theirs, ours = cell.get(figure), own.get(figure)
            if theirs is not None and ours and theirs < ours:
                yield Shortfall(tree, figure, rival, names[rival], theirs / ours)
