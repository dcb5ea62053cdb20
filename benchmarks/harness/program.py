# SPDX-License-Identifier: Apache-2.0
"""The command line of a suite: check, take turns, store, print."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness.process import KEEP_MEMORY
from benchmarks.harness.results import RESULTS, LoadError, new_result, store
from benchmarks.harness.rival import Rival
from benchmarks.harness.tournament import Cell, Effort, Tournament

ENVIRONMENT = {
    **KEEP_MEMORY,
    "OMP_WAIT_POLICY": "passive",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "JAX_PLATFORMS": "cpu",
}
Case = dict[str, Any]


@dataclass(frozen=True)
class Group:
    """Cases that belong together.

    Attributes:
        cases: by whether the run is quick.
        asked: the function of the suite that returns the figures; None if times are measured.
        counted: a function of the suite whose figures are added to each time.
        fresh: whether each case runs in new processes with the system's malloc.
    """

    cases: Callable[[bool], Sequence[Case]]
    asked: str | None = None
    counted: str | None = None
    fresh: bool = False


@dataclass(frozen=True)
class Suite:
    """A suite of benchmarks. Its `module` runs in the processes of the rivals, see `worker`.

    Attributes:
        name: the name of the result in `results/`.
        module: with `prepare(rival, case)`, `describe(rival)`, and what groups ask for.
        rivals: the competitors, ours first.
        groups: the groups by name.
        tables: the functions that print the tables, by group.
        full: how long to measure.
        quick: the same with `--quick`.
    """

    name: str
    module: str
    rivals: Callable[[], list[Rival]]
    groups: Mapping[str, Group]
    tables: Mapping[str, Callable[[dict[str, Any]], str]]
    full: Effort
    quick: Effort = field(default=Effort(3, 0.03, 0.003, 0.5))


def say(line: str) -> None:
    """Print a line about progress."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def main(suite: Suite, arguments: list[str] | None = None) -> int:
    """Run the chosen cases, store the result and print the tables."""
    parser = argparse.ArgumentParser(prog=f"python -m {suite.module}")
    add_options(parser, suite.name)
    parser.add_argument("--group", action="append", choices=list(suite.groups), help="or several")
    parser.add_argument("--filter", default="", metavar="TEXT", help="text in operation:tree")
    options = parser.parse_args(arguments)
    names = options.group or list(suite.groups)
    effort = suite.quick if options.quick else suite.full
    started = time.monotonic()
    result: dict[str, Any] = {}
    for name in names:
        # New processes for each group, so that none starts with the heap of an earlier group.
        with Tournament(
            suite.rivals(), suite.module, environment=ENVIRONMENT, report=say
        ) as players:
            settings = {**asdict(effort), "threads": 1, "environment": ENVIRONMENT}
            result = result or new_result(suite.name, players.rivals, settings)
            for case in suite.groups[name].cases(options.quick):
                if options.filter in f"{case['operation']}:{case['tree']}":
                    say(f"{time.monotonic() - started:4.0f} s {name}: {case}")
                    result["cells"] += play(players, suite, suite.groups[name], case, effort)
    status = finish(result, options)
    for name in names:
        print(f"\n{suite.tables[name](result)}")
    return status


def play(players: Tournament, suite: Suite, group: Group, case: Case, effort: Effort) -> list[Cell]:
    """Return a cell for each rival that supports the case."""
    if group.fresh:
        cells = []
        for rival in (process.rival for process in players.processes):
            with Tournament([rival], suite.module, environment={}) as alone:
                cells.append(alone.ask(rival.name, str(group.asked), case))
        return cells
    names = [process.rival.name for process in players.processes]
    if group.asked is not None:
        cells = [players.ask(name, group.asked, case) for name in names]
        return [cell for cell in cells if cell["status"] != "unsupported"]
    cells = players.play(case, effort)
    for cell in cells if group.counted else ():
        if cell["status"] == "ok":
            counted = players.ask(cell["rival"], str(group.counted), case)
            cell.update({k: v for k, v in counted.items() if k not in cell})
    return cells


def add_options(parser: argparse.ArgumentParser, name: str) -> None:
    """Add the options that say how long to measure and where the result goes."""
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    parser.add_argument("--output", type=Path, default=RESULTS / f"{name}.json", metavar="FILE")
    parser.add_argument("--update", action="store_true", help="keep the other cells of the file")
    parser.add_argument(
        "--under-load", action="store_true", help="store what was measured on a busy machine too"
    )


def finish(result: dict[str, Any], options: argparse.Namespace) -> int:
    """Store a result, or say why not, and return the exit status."""
    try:
        store(result, options.output, under_load=options.under_load, update=options.update)
    except LoadError as error:
        say(str(error))
        return 1
    say(f"written to {options.output}")
    return 0
