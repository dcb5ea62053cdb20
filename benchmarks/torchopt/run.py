# SPDX-License-Identifier: Apache-2.0
"""Time torchopt against its peers: steps in place, functional, differentiated, and meta-learning.

    python benchmarks/torchopt/run.py                   # everything, about half an hour
    python benchmarks/torchopt/run.py --quick           # shorter rounds, small cases
    python benchmarks/torchopt/run.py --group step      # step, optimizers, meta; may be repeated

Results go to `benchmarks/results/torchopt.json`, the tables to the terminal. A figure is the
minimum of the samples; ATen operations and peak bytes are counted, once each.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.harness.process import KEEP_MEMORY, CaseError
from benchmarks.harness.results import RESULTS, new_result, read_result, write_result
from benchmarks.harness.tournament import Effort, Tournament
from benchmarks.torchopt import report, tasks
from benchmarks.torchopt.rivals import rivals

SUITE = "benchmarks.torchopt.suite"
SETS = ("6 x 1k", "50 x 1k", "500 x 1k", "5000 x 1k", "ResNet-50", "transformer, 12 blocks")
OPTIMIZERS = (
    "sgd", "momentum", "adamw", "amsgrad", "nadam", "radam", "adamax", "rmsprop", "adagrad",
    "adadelta", "asgd", "rprop", "adafactor",
)  # fmt: skip
MODELS = ("MLP", "conv4", "transformer, 2 blocks")
STEPS = (1, 5, 10, 20, 50)
GROUPS = ("step", "optimizers", "meta", "tasks")

FULL = Effort(rounds=7, seconds=0.1, sample_seconds=0.01, slow_seconds=6.0)
QUICK = Effort(rounds=3, seconds=0.03, sample_seconds=0.003, slow_seconds=0.5)


def cases(group: str, *, quick: bool) -> list[dict[str, Any]]:
    """Return the cases of a group."""
    if group == "step":
        sets = SETS[:3] if quick else SETS
        operations = ("adam", "functional", "differentiable")
        return [{"tree": name, "operation": op} for op in operations for name in sets]
    if group == "optimizers":
        sets = (report.EACH_OPTIMIZER,) if quick else SETS
        return [{"tree": tree, "operation": name} for tree in sets for name in OPTIMIZERS]
    if group == "tasks":
        networks = list(tasks.NETWORKS)[: 1 if quick else None]
        return [{"tree": n, "operation": op} for op in tasks.OPTIMIZERS for n in networks]
    steps = STEPS[:2] if quick else STEPS
    return [{"tree": m, "operation": "meta", "steps": n} for m in MODELS for n in steps]


def main(arguments: list[str] | None = None) -> int:
    """Run the chosen cases, write the JSON and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    parser.add_argument("--group", action="append", choices=GROUPS, help="may be repeated")
    parser.add_argument("--filter", default="", metavar="TEXT", help="text in operation:tree")
    parser.add_argument("--update", action="store_true", help="keep the other cells of the file")
    parser.add_argument("--output", type=Path, default=RESULTS / "torchopt.json", metavar="FILE")
    options = parser.parse_args(arguments)
    effort = QUICK if options.quick else FULL
    environment = {**KEEP_MEMORY, "OMP_WAIT_POLICY": "passive"}
    settings = {"rounds": effort.rounds, "seconds": effort.seconds, "environment": environment}
    chosen = [
        case
        for group in options.group or GROUPS
        for case in cases(group, quick=options.quick)
        if options.filter in f"{case['operation']}:{case['tree']}"
    ]
    with Tournament(rivals(), SUITE, environment=environment, report=say) as tournament:
        result = new_result("torchopt", tournament.rivals, settings)
        for index, case in enumerate(chosen):
            say(f"{index + 1}/{len(chosen)} {case}, {time.monotonic() - _started:.0f} s")
            cells = tournament.play(case, effort)
            for cell in cells:
                if cell["status"] == "ok":
                    cell.update(_counted(tournament, cell["rival"], case))
            result["cells"] += cells
    if options.update and options.output.is_file():
        new = {report.key(cell) for cell in result["cells"]}
        old = read_result(options.output.stem, options.output.parent)["cells"]
        result["cells"] = [c for c in old if report.key(c) not in new] + result["cells"]
    write_result(result, options.output)
    print(report.all_tables(result))
    print(f"\nwritten to {options.output}")
    return 0


def _counted(tournament: Tournament, rival: str, case: dict[str, Any]) -> dict[str, Any]:
    process = next(p for p in tournament.processes if p.rival.name == rival)
    try:
        return process.ask("call", name="count", case=case)
    except CaseError as error:
        return {"count_failed": str(error)}


_started = time.monotonic()


def say(line: str) -> None:
    """Tell the user what takes time."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
