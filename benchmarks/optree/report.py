# SPDX-License-Identifier: Apache-2.0
"""The tables of optree's results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.harness import tables
from benchmarks.harness.plot import draw_bars
from benchmarks.harness.results import Figures, provenance
from benchmarks.harness.tables import (
    NOTHING,
    bytes_text,
    range_text,
    ratio_text,
    seconds_text,
    table,
)
from benchmarks.optree.operations import COLD, CUSTOM, LABELS, MATRIX
from benchmarks.optree.rivals import OURS
from benchmarks.optree.shortfalls import shortfalls
from benchmarks.optree.trees import RESNETS, TREES, tree_label

Result = dict[str, Any]


def labels(result: Result) -> dict[str, str]:
    """Return the labels of the rivals, ours first."""
    return {name: str(entry["label"]) for name, entry in result["rivals"].items()}


def machine_lines(result: Result) -> str:
    """Return a line about the machine of a result and one about the versions."""
    machine, settings = result["machine"], result["settings"]
    facts = [f"{machine['processor']}, {machine['cores']} cores, {machine['system']}"]
    versions = []
    for entry in result["rivals"].values():
        if not entry["available"]:
            versions.append(f"{entry['label']} not available ({entry['reason']})")
            continue
        found = ", ".join(f"{name} {version}" for name, version in entry["versions"].items())
        versions.append(f"{entry['label']} ({found})")
    pythons = {entry["python"] for entry in result["rivals"].values() if entry["available"]}
    facts.append(f"Python {', '.join(sorted(pythons))}")
    load = machine.get("load_before", "unknown")
    how = (
        f"one process per rival, {settings['rounds']} interleaved rounds; "
        "the median of all samples, and how far the minimum is below it; "
        f"{result['created'][:10]}, load of the machine before {load}"
    )
    head = f"{'; '.join(facts)}.\n{'; '.join(versions)}."
    return f"{head}\nMeasured with {how}.{provenance(result)}"


def _pairs(result: Result, operations: set[str], *, collect: bool = False) -> list[tuple[str, str]]:
    seen: dict[tuple[str, str], None] = {}
    for cell in result["cells"]:
        if cell["operation"] in operations and cell["gc"] is collect:
            seen.setdefault((cell["tree"], cell["operation"]))
    return list(seen)


def ratio_table(result: Result, operations: set[str], *, collect: bool = False) -> str:
    """Return our time and every rival's time as a multiple of it, a row per tree and operation."""
    pairs = _pairs(result, operations, collect=collect)
    rows = [[tree_label(tree), LABELS[operation]] for tree, operation in pairs]
    figures = Figures(result, collect=collect)
    return tables.ratio_table(figures, result["rivals"], pairs, rows, ["tree", "operation"])


# What the picture shows of the matrix: enough to see the range.
DRAWN_RIVALS = ("optree-0.20.0", "jax", "torch", "dm-tree")
DRAWN_OPERATIONS = ("flatten", "unflatten", "map_c")
DRAWN_TREES = {
    "resnet50": "ResNet50\nmodules",
    "resnet50_dicts": "ResNet50\ndicts",
    "state_flat": "flat\nstate",
    "namedtuples": "named-\ntuples",
    "dict3": "dict\nof 3",
}


def speed_plot(result: Result, path: Path) -> None:
    """Draw every library's time as a multiple of ours, a panel per operation."""
    figures, names = Figures(result), labels(result)
    drawn = [name for name in DRAWN_RIVALS if result["rivals"][name]["available"]]
    groups = list(DRAWN_TREES.values())
    panels = []
    for operation in DRAWN_OPERATIONS:
        series = [
            (names[name], [figures.ratio(tree, operation, name, OURS) for tree in DRAWN_TREES])
            for name in drawn
        ]
        panels.append((LABELS[operation], groups, series))
    draw_bars(
        path,
        "Time of each library ÷ time of optree",
        panels,
        "times slower",
        note=machine_note(result),
        description=result["created"],
    )


def leads_plot(result: Result, path: Path) -> None:
    """Draw for every tree how many times longer the fastest other library takes."""
    figures = Figures(result)
    others = [name for name in labels(result) if name != OURS]
    measured = {tree for tree, _ in _pairs(result, set(MATRIX))}
    trees = [tree for tree in TREES if tree in measured]

    def lead(tree: str, operation: str) -> float | None:
        ratios = [figures.ratio(tree, operation, name, OURS) for name in others]
        return min((ratio for ratio in ratios if ratio is not None), default=None)

    panels = [
        (
            label,
            [tree_label(tree) for tree in trees],
            [("the fastest other library", [lead(tree, operation) for tree in trees])],
        )
        for operation, label in MATRIX.items()
    ]
    draw_bars(
        path,
        "Time of the fastest other library ÷ time of optree",
        panels,
        "times slower",
        note=machine_note(result),
        description=result["created"],
        slanted=True,
    )


def machine_note(result: Result) -> str:
    """Return the machine and the date in one line."""
    machine = result["machine"]
    return f"{machine['processor']}, {machine['cores']} cores, {result['created'][:10]}"


def matrix_table(result: Result) -> str:
    """Return the four core operations on every tree, collector off."""
    return ratio_table(result, set(MATRIX))


def matrix_gc_table(result: Result) -> str:
    """Return the four core operations on every tree, collector on."""
    if not any(cell["gc"] for cell in result["cells"]):
        return "Not measured: `--gc off` was given."
    return ratio_table(result, set(MATRIX), collect=True)


def conclusion_table(result: Result) -> str:
    """Return the range of each library's time as a multiple of ours, over all trees."""
    figures = Figures(result)
    pairs = _pairs(result, set(MATRIX))
    rows = []
    for rival, label in labels(result).items():
        found = [
            [figures.ratio(tree, op, rival, OURS) for tree, op in pairs if op == operation]
            for operation in MATRIX
        ]
        if rival != OURS and any(ratio is not None for row in found for ratio in row):
            rows.append([label, *map(range_text, found)])
    return table(["time, ours 1", *(LABELS[operation] for operation in MATRIX)], rows)


def published_table(result: Result) -> str:
    """Return the speed-ups over the published optree for each tree, collector off and on."""
    off, on = Figures(result), Figures(result, collect=True)
    names = labels(result)
    versions = [name for name in names if name.startswith("optree-")]
    head = ["tree"]
    head += [f"{LABELS[op]}, vs {names[name][7:]}" for name in versions for op in MATRIX]
    rows = []
    for tree in dict.fromkeys(tree for tree, _ in _pairs(result, set(MATRIX))):
        row = [tree_label(tree)]
        for name in versions:
            for operation in MATRIX:
                with_gc = on.ratio(tree, operation, name, OURS)
                text = ratio_text(off.ratio(tree, operation, name, OURS))
                row.append(f"{text} ({ratio_text(with_gc)})" if with_gc is not None else text)
        rows.append(row)
    return table(head, rows)


def cold_table(result: Result) -> str:
    """Return flatten on trees that are visited once."""
    return ratio_table(result, set(COLD))


def operations_table(result: Result) -> str:
    """Return every other operation."""
    return ratio_table(result, set(LABELS) - set(MATRIX) - set(COLD) - set(CUSTOM))


def custom_table(result: Result) -> str:
    """Return the core operations on registered custom types."""
    return ratio_table(result, set(CUSTOM))


def speedup_table(result: Result) -> str:
    """Return the speed-ups on the ResNet module trees, in the form of the TorchOpt paper.

    J/O, P/O and D/O are the times of jax, PyTorch and dm-tree divided by optree's.
    """
    figures = Figures(result)
    columns = [
        ("J/O", "jax"),
        ("P/O", "torch"),
        ("D/O", "dm-tree"),
        ("0.20.0/O", "optree-0.20.0"),
    ]
    rows = []
    measured = set(_pairs(result, set(MATRIX)))
    for tree in RESNETS:
        for operation, label in (
            ("flatten", "flatten"),
            ("unflatten", "unflatten"),
            ("map_c", "map"),
        ):
            if (tree, operation) not in measured:
                continue
            row = [tree_label(tree), label, figures.time_text(tree, operation, OURS)]
            for _, rival in columns:
                row.append(seconds_text(figures.seconds(tree, operation, rival)))
            row += [figures.ratio_text(tree, operation, rival, OURS) for _, rival in columns]
            rows.append(row)
    names = labels(result)
    times = [names.get(rival, rival) for _, rival in columns]
    return table(["tree", "operation", "optree", *times, *(text for text, _ in columns)], rows)


def memory_table(result: Result) -> str:
    """Return the bytes of a spec a leaf and the peak of a large flatten."""
    names = labels(result)
    rows = []
    cells = {(cell["tree"], cell["rival"]): cell for cell in result["cells"]
             if cell["operation"] == "memory"}  # fmt: skip
    for tree in dict.fromkeys(tree for tree, _ in cells):
        for rival, label in names.items():
            cell = cells.get((tree, rival))
            if cell is None or cell["status"] == "unsupported":
                continue
            if cell["status"] != "ok":
                rows.append([tree_label(tree), label, cell["status"], NOTHING, NOTHING, NOTHING])
                continue
            leaves = cell["leaves"]
            further = cell["further_bytes"]
            rows.append(
                [
                    *(tree_label(tree), label),
                    bytes_text(cell["first_bytes"] / leaves),
                    bytes_text(None if further is None else further / leaves),
                    bytes_text(cell["first_bytes"]),
                    bytes_text(cell.get("peak_bytes")),
                ]
            )
    head = ["tree", "library", "first spec, a leaf", "a further spec, a leaf", "first spec"]
    return table([*head, "peak of flatten"], rows)


def exceptions_table(result: Result) -> str:
    """Return the cells where we are below a floor or behind another library, and why."""
    rows = [
        [
            *(tree_label(cell.tree), cell.what, cell.label),
            ratio_text(cell.ratio) + (f" of {ratio_text(cell.floor)}" if cell.floor != 1 else ""),
            cell.reason,
        ]
        for cell in shortfalls(result)
    ]
    if not rows:
        return "None: no cell is below its floor, and no library is ahead anywhere."
    return table(["tree", "figure", "library", "its figure, ours 1", "why"], rows)


def misses(result: Result) -> list[str]:
    """Return a line for every cell that failed, is below its floor or behind a rival, and why."""
    figures = Figures(result)
    failed = [
        f"{tree_label(tree)}, {LABELS[operation]}: {figures.status(tree, operation, OURS)}"
        for tree, operation in _pairs(result, set(LABELS))
        if figures.status(tree, operation, OURS) not in ("ok", "missing")
    ]
    return [*failed, *(f"{cell} ({cell.reason})" for cell in shortfalls(result))]


TABLES = {
    "machine": machine_lines,
    "conclusion": conclusion_table,
    "speedup": speedup_table,
    "published": published_table,
    "matrix": matrix_table,
    "matrix_gc": matrix_gc_table,
    "cold": cold_table,
    "operations": operations_table,
    "custom": custom_table,
    "memory": memory_table,
    "exceptions": exceptions_table,
}
