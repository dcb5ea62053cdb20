# SPDX-License-Identifier: Apache-2.0
"""Implicit gradients against their peers: time, error, memory, Hessian-vector products.

    python benchmarks/torchopt/implicit.py            # everything, about five minutes
    python benchmarks/torchopt/implicit.py --quick    # smaller sizes, fewer rounds

Each library runs in a process of its own and its answer is compared with dense linear algebra
before it is timed. The rivals take turns; reported is the minimum of the processor times, of all
threads of a process together. Results go to `benchmarks/results/torchopt_implicit.json`, the tables
to the terminal.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.harness.process import KEEP_MEMORY, CaseError
from benchmarks.harness.results import RESULTS, new_result, write_result
from benchmarks.harness.tournament import Tournament
from benchmarks.torchopt.implicit_rivals import OURS, rivals

SUITE = "benchmarks.torchopt.implicit_suite"
CASES = (("logistic", 20), ("logistic", 200), ("logistic", 1000), ("equilibrium", 64))
BATCH = ("small_ridge", 1000)
STEPS = (10, 100, 1000, 10_000)
UNROLLED_STEPS = (10, 100, 1000)
SLOW_SECONDS = 3.0  # a rival that took longer than this has no further turns at a case
PRODUCTS = (1, 2, 5, 10, 20)
ENVIRONMENT = {
    **KEEP_MEMORY,
    "OMP_WAIT_POLICY": "passive",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
}


def ask(process: Any, name: str, case: dict[str, Any]) -> dict[str, Any]:
    """Return what a function of the suite says in a rival's process, or why it cannot."""
    try:
        return {"status": "ok", **process.ask("call", name=name, case=case, timeout=1200)}
    except CaseError as error:
        return {"status": error.kind, "reason": str(error)[:200]}


def time_case(tournament: Tournament, case: dict[str, Any], rounds: int) -> list[dict[str, Any]]:
    """Check one case on every rival, then time it in turns."""
    cells = {p.rival.name: ask(p, "check", case) for p in tournament.processes}
    times: dict[str, list[float]] = {name: [] for name in cells}
    for _ in range(rounds):
        for process in tournament.processes:
            name = process.rival.name
            if cells[name]["status"] == "ok" and sum(times[name]) < SLOW_SECONDS:
                times[name] += process.ask("call", name="seconds", case=case)["times"]
    for name, cell in cells.items():
        cell.update(table="time", **case, rival=name)
        if times[name]:
            cell.update(min=min(times[name]), median=statistics.median(times[name]))
    return list(cells.values())


def memory_cells(tournament: Tournament, quick: bool) -> list[dict[str, Any]]:
    """Return the peak bytes for each number of inner steps."""
    cells = []
    for process in tournament.processes:
        if process.rival.name not in (OURS, "torchopt-0.7.3"):
            continue
        modes = ("implicit", "unrolled") if process.rival.name == OURS else ("implicit",)
        for mode in modes:
            for steps in STEPS if mode == "implicit" else UNROLLED_STEPS:
                if quick and steps > 100:
                    continue
                case = {"mode": mode, "steps": steps}
                answer = ask(process, "memory", case)
                cells.append({"table": "memory", **case, "rival": process.rival.name, **answer})
    return cells


def product_cells(tournament: Tournament) -> list[dict[str, Any]]:
    """Return the products with the Hessian for each number of steps of conjugate gradients."""
    cells = []
    for process in tournament.processes:
        if process.rival.name in (OURS, "torchopt-0.7.3"):
            for steps in PRODUCTS:
                answer = ask(process, "products", {"steps": steps})
                name = process.rival.name
                cells.append({"table": "products", "steps": steps, "rival": name, **answer})
    return cells


def show(result: dict[str, Any]) -> None:
    """Print the tables."""
    cells = result["cells"]
    print("\ntime of a gradient, relative error, and the time divided by ours")
    base = {
        (c["problem"], c["size"]): c.get("min")
        for c in cells
        if c["table"] == "time" and c["rival"] == OURS
    }
    for cell in (c for c in cells if c["table"] == "time" and c["status"] != "unsupported"):
        case = (cell["problem"], cell["size"])
        if cell["status"] != "ok":
            print(f"  {case[0]:12} {case[1]:5} {cell['rival']:16} {cell['reason']}")
            continue
        ratio = cell["min"] / base[case]
        print(
            f"  {case[0]:12} {case[1]:5} {cell['rival']:16} {1e3 * cell['min']:10.3f} ms"
            f"  error {cell['error']:.1e}  {ratio:8.2f}x"
        )
    print("\npeak of live tensors against inner steps")
    for cell in (c for c in cells if c["table"] == "memory" and c["status"] == "ok"):
        print(
            f"  {cell['rival']:16} {cell['mode']:9} {cell['steps']:6} steps "
            f"{cell['peak_bytes'] / 2**20:9.2f} MiB  {cell['seconds']:8.3f} s"
        )
    print("\nproducts with the Hessian in a backward pass of k steps of conjugate gradients")
    for cell in (c for c in cells if c["table"] == "products" and c["status"] == "ok"):
        print(
            f"  {cell['rival']:16} k = {cell['steps']:3}: {cell['products']:3} products, "
            f"{cell['evaluations']} evaluations, error {cell['error']:.1e}"
        )


def main(arguments: list[str] | None = None) -> int:
    """Check, time, store and print; return 1 if an answer of ours is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="smaller sizes, fewer rounds")
    parser.add_argument("--out", type=Path, default=RESULTS / "torchopt_implicit.json")
    options = parser.parse_args(arguments)
    rounds = 2 if options.quick else 5
    cases = [*CASES[: 2 if options.quick else None], BATCH]

    def report(line: str) -> None:
        print(line, file=sys.stderr)

    with Tournament(rivals(), SUITE, environment=ENVIRONMENT, report=report) as tournament:
        settings = {"rounds": rounds, "threads": 1, "clock": "process_time"}
        result = new_result("torchopt_implicit", tournament.rivals, settings)
        for problem, size in cases:
            report(f"{problem} {size}")
            case = {"problem": problem, "size": size}
            result["cells"] += time_case(tournament, case, rounds)
            write_result(result, options.out)  # an interrupted run keeps what it has
        report("memory")
        result["cells"] += memory_cells(tournament, options.quick)
        result["cells"] += product_cells(tournament)
    write_result(result, options.out)
    show(result)
    ours = [c for c in result["cells"] if c["table"] == "time" and c["rival"] == OURS]
    return 0 if all(c["status"] == "ok" and c["error"] < 1e-6 for c in ours) else 1


if __name__ == "__main__":
    sys.exit(main())
