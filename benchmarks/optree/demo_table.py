# SPDX-License-Identifier: Apache-2.0
"""Compare optree with other libraries on the module trees of ResNets, as table and plot.

    python -m benchmarks.optree.demo_table            # a minute
    python -m benchmarks.optree.demo_table --quick    # twenty seconds
    python -m benchmarks.optree.demo_table --out DIR  # where tree_speed.png and .json go

Every library runs in its own process, from its own folder under `benchmarks/.rivals/`,
and its answers are checked before they are timed. One that cannot be installed is named in
the table with the reason.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks.harness.plot import PlottingError, draw_bars
from benchmarks.harness.process import KEEP_MEMORY
from benchmarks.harness.program import say
from benchmarks.harness.results import Figures, new_result, write_result
from benchmarks.harness.tournament import Effort, Tournament
from benchmarks.optree.report import labels, machine_lines, speedup_table
from benchmarks.optree.rivals import OURS
from benchmarks.optree.run import SUITE, add_ours_options, ours_and_rivals, progress
from benchmarks.optree.trees import RESNETS, tree_label

RIVALS = (OURS, "optree-0.20.0", "jax", "torch", "dm-tree")
OPERATIONS = {"flatten": "flatten", "unflatten": "unflatten", "map_c": "map"}

FULL = Effort(rounds=7, seconds=0.04, sample_seconds=0.004)
QUICK = Effort(rounds=3, seconds=0.01, sample_seconds=0.002, slow_seconds=0.3)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table, draw the plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    parser.add_argument(
        "--out", type=Path, default=Path("demo_out"), metavar="DIR", help="default: demo_out"
    )
    add_ours_options(parser)
    options = parser.parse_args(arguments)
    effort = QUICK if options.quick else FULL
    result = measure(options, effort)
    print("\nTime of every library on the module trees of ResNets, and as a multiple of optree's:")
    print("J jax, P PyTorch (torch.utils._pytree), D dm-tree, O optree. More is better for us.\n")
    print(speedup_table(result))
    for entry in result["rivals"].values():
        if not entry["available"]:
            print(f"{entry['label']}: not available: {entry['reason']}")
    print("\nmap calls a C function on every leaf, so that the library is timed and not the")
    print("function. torch and dm-tree treat empty entries (None) as leaves.")
    print(machine_lines(result))
    write_result(result, options.out / "tree_speed.json")
    try:
        plot(result, options.out / "tree_speed.png")
    except PlottingError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    print(f"plot: {options.out / 'tree_speed.png'}, figures: {options.out / 'tree_speed.json'}")
    return 0 if result["rivals"][OURS]["available"] and _complete(result) else 1


def measure(options: argparse.Namespace, effort: Effort) -> dict[str, Any]:
    """Return the result of all module trees, operations and rivals."""
    table = [rival for rival in ours_and_rivals(options) if rival.name in RIVALS]
    settings = {
        "rounds": effort.rounds,
        "seconds": effort.seconds,
        "sample_seconds": effort.sample_seconds,
        "environment": {**KEEP_MEMORY, "PYTHONHASHSEED": "0"},
        "gc": "off",
    }
    cases = [{"tree": tree, "operation": name} for tree in RESNETS for name in OPERATIONS]
    with Tournament(table, SUITE, report=say) as tournament:
        result = new_result("optree_modules", tournament.rivals, settings)
        for index, case in enumerate(cases):
            progress(index, len(cases), f"{tree_label(case['tree'])}, {case['operation']}")
            result["cells"] += tournament.play(case, effort, reference=OURS)
    progress(len(cases), len(cases), "")
    return result


def _complete(result: dict[str, Any]) -> bool:
    """Return whether optree itself has every figure; report missing ones."""
    lacking = [cell for cell in result["cells"] if cell["rival"] == OURS and cell["status"] != "ok"]
    for cell in lacking:
        sys.stderr.write(
            f"optree failed at {cell['tree']}, {cell['operation']}: {cell['reason']}\n"
        )
    return not lacking


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw every library's time as a multiple of ours."""
    figures = Figures(result)
    names = labels(result)
    others = [name for name in RIVALS if name != OURS and result["rivals"][name]["available"]]
    panels = []
    for operation, label in OPERATIONS.items():
        series = [
            (names[name], [figures.ratio(tree, operation, name, OURS) for tree in RESNETS])
            for name in others
        ]
        groups = [tree_label(tree).replace(" modules", "") for tree in RESNETS]
        panels.append((label, groups, series))
    draw_bars(path, "Module trees: time of each library ÷ time of optree", panels, "times slower")


if __name__ == "__main__":
    sys.exit(main())
