# SPDX-License-Identifier: Apache-2.0
"""Time optree against its peers: every operation, every shape of tree, hot and cold.

    python -m benchmarks.optree.run                     # everything, ten minutes
    python -m benchmarks.optree.run --quick             # shorter rounds, no million leaves
    python -m benchmarks.optree.run --filter dict3      # cases with this text in tree:operation
    python -m benchmarks.optree.run --group cold        # matrix, cold, operations, custom, memory

Results go to `benchmarks/results/optree.json`, the tables to the terminal; `tools/bench_report.py`
writes the tables and plots of the documentation. The matrix is measured with the garbage collector
off and on.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.harness.process import KEEP_MEMORY, CaseError, RivalProcess
from benchmarks.harness.program import add_options, finish, say
from benchmarks.harness.results import new_result
from benchmarks.harness.rival import Rival, RivalError
from benchmarks.harness.tournament import Cell, Effort, Tournament
from benchmarks.optree import report
from benchmarks.optree.operations import CUSTOM, MATRIX, OTHER
from benchmarks.optree.rivals import OURS, rivals
from benchmarks.optree.trees import COLD_TREES, TREES

SUITE = "benchmarks.optree.suite"
GROUPS = ("matrix", "cold", "operations", "custom", "memory")
LARGEST = "million"
OPERATION_TREES = ("dict3", "resnet50", "state_flat")
MEMORY_TREES = (("resnet50", 200), ("resnet50_dicts", 200), ("state_flat", 200), ("million", 0))

FULL = Effort(rounds=5, seconds=0.02, sample_seconds=0.002)
QUICK = Effort(rounds=3, seconds=0.01, sample_seconds=0.001, slow_seconds=0.3)


def cases(group: str) -> list[dict[str, str]]:
    """Return the cases of a group."""
    if group == "matrix":
        return [{"tree": tree, "operation": op} for tree in TREES for op in MATRIX]
    if group == "cold":
        return [{"tree": tree, "operation": "cold_flatten"} for tree in COLD_TREES]
    if group == "operations":
        return [{"tree": tree, "operation": op} for op in OTHER for tree in OPERATION_TREES]
    if group == "custom":
        trees = ("custom1000", "dataclass1000")
        return [{"tree": tree, "operation": op} for tree in trees for op in CUSTOM]
    return []


def add_ours_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where our optree is."""
    parser.add_argument(
        "--ours-site",
        type=Path,
        metavar="DIR",
        help="folder of packages that holds our optree (default: the running interpreter's)",
    )
    parser.add_argument("--ours-python", metavar="PYTHON", help="interpreter that runs our optree")


def ours_and_rivals(options: argparse.Namespace) -> list[Rival]:
    """Return the table of rivals with the options about ours applied."""
    site = options.ours_site.resolve() if options.ours_site else None
    return rivals(site, options.ours_python)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_options(parser, "optree")
    parser.add_argument("--filter", default="", metavar="TEXT", help="text in tree:operation")
    parser.add_argument("--group", action="append", choices=GROUPS, help="may be repeated")
    parser.add_argument("--rival", action="append", metavar="NAME", help="may be repeated")
    parser.add_argument("--gc", choices=("off", "on", "both"), default="both",
                        help="garbage collector in the matrix (default both)")  # fmt: skip
    parser.add_argument("--default-malloc", action="store_true",
                        help="leave malloc as the system sets it")  # fmt: skip
    add_ours_options(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the chosen cases, write the JSON and print the tables."""
    options = parse(arguments)
    table = ours_and_rivals(options)
    if options.rival:
        unknown = set(options.rival) - {rival.name for rival in table}
        if unknown:
            known = ", ".join(rival.name for rival in table)
            sys.stderr.write(f"expected rivals among {known}; got {', '.join(unknown)}\n")
            return 2
        table = [rival for rival in table if rival.name in {*options.rival, OURS}]
    groups = options.group or GROUPS
    effort = QUICK if options.quick else FULL
    environment = {} if options.default_malloc else KEEP_MEMORY
    collect = {"off": (False,), "on": (True,), "both": (False, True)}[options.gc]
    settings = {
        "rounds": effort.rounds,
        "seconds": effort.seconds,
        "sample_seconds": effort.sample_seconds,
        "environment": {**environment, "PYTHONHASHSEED": "0"},
        "gc": options.gc,
    }
    chosen = [
        (group, case)
        for group in groups
        for case in cases(group)
        if options.filter in f"{case['tree']}:{case['operation']}"
        and not (options.quick and case["tree"] == LARGEST and not options.filter)
    ]
    with Tournament(table, SUITE, environment=environment, report=say) as tournament:
        result = new_result("optree", tournament.rivals, settings)
        for index, (group, case) in enumerate(chosen):
            progress(index, len(chosen), f"{case['tree']}:{case['operation']}")
            # A collection walks every object: minutes in all for the largest tree.
            both = group in ("matrix", "custom") and case["tree"] != LARGEST
            modes = collect if both else (False,)
            result["cells"] += tournament.play(case, effort, collect=modes, reference=OURS)
    progress(len(chosen), len(chosen), "")
    if "memory" in groups:
        result["cells"] += measure_memory(table, options)
    status = finish(result, options)
    print_tables(result, groups)
    return status


def measure_memory(table: list[Rival], options: argparse.Namespace) -> list[Cell]:
    """Return the memory cells; each needs a fresh process whose malloc counts every object."""
    cells: list[Cell] = []
    for tree, copies in MEMORY_TREES:
        skipped = options.quick and tree == LARGEST and not options.filter
        if options.filter not in f"{tree}:memory" or skipped:
            continue
        for rival in table:
            cell: Cell = {"tree": tree, "operation": "memory", "rival": rival.name, "gc": False}
            try:
                request = {"tree": tree, "copies": copies}
                cell.update(_ask_fresh(rival, "memory", request, {"PYTHONMALLOC": "malloc"}))
                if tree == LARGEST:  # of a small tree, pages and not bytes would be counted
                    cell.update(_ask_fresh(rival, "peak", request, {}))
                cell["status"] = "ok"
            except CaseError as error:
                cell.update(status=error.kind, reason=str(error))
            except RivalError as error:
                cell.update(status="missing", reason=str(error))
            cells.append(cell)
    return cells


def _ask_fresh(
    rival: Rival, function: str, case: dict[str, Any], environment: dict[str, str]
) -> dict[str, Any]:
    process = RivalProcess.start(rival, SUITE, environment=environment)
    try:
        return process.ask("call", name=function, case=case)
    finally:
        process.stop()


def print_tables(result: dict[str, Any], groups: Any) -> None:
    """Print what was measured, and where it falls short."""
    print("\n" + report.machine_lines(result))
    tables = {"matrix": ("speedup", "published", "matrix", "matrix_gc")}
    print("\nOur time; every other column is that library's time as a multiple of ours.")
    print("J jax, P PyTorch (torch.utils._pytree), D dm-tree, O optree.")
    for group in GROUPS:
        for name in tables.get(group, (group,)) if group in groups else ():
            text = report.TABLES[name](result)
            if text.count("\n") > 1:  # more than the head of a table
                print(f"\n{name}\n\n{text}")
    shortfalls = report.misses(result)
    print(f"\nBelow a floor or behind a rival: {len(shortfalls)}")
    for line in shortfalls:
        print(f"- {line}")


_started = time.monotonic()


def progress(done: int, total: int, text: str) -> None:
    """Draw a progress bar on a terminal; elsewhere write a line for every tenth."""
    if not total:
        return
    elapsed = time.monotonic() - _started
    if sys.stderr.isatty():
        filled = 30 * done // total
        bar = "#" * filled + "." * (30 - filled)
        sys.stderr.write(f"\r\033[K[{bar}] {done}/{total} {elapsed:4.0f} s {text}")
        if done == total:
            sys.stderr.write("\n")
    elif done and (done == total or 10 * done // total > 10 * (done - 1) // total):
        sys.stderr.write(f"{done}/{total} cases measured, {elapsed:.0f} s\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
