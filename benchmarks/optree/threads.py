# SPDX-License-Identifier: Apache-2.0
"""Measure how two threads that do the same work slow each other down.

    python3.13t -m benchmarks.optree.threads            # a minute
    python3.13t -m benchmarks.optree.threads --quick    # ten seconds

For each operation, the table has the time of one thread alone. For two threads, on separate trees
and on one shared tree, it has the throughput relative to one thread (2 is perfect, 1 is what the
global interpreter lock allows) and the processor time of a call relative to one thread (1 is
perfect; this is the cost of sharing, and a busy machine does not affect it). Times are minima of
several rounds. It needs only optree and the standard library.
"""

from __future__ import annotations

import argparse
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optree
from benchmarks.harness.results import RESULTS, new_result, write_result
from benchmarks.optree.threads_report import machine_lines, scaling_table

ROUNDS = 7
TREES: dict[str, tuple[Callable[[], Any], int]] = {
    "dict of 3": (lambda: {"a": 1.0, "b": (2.0, 3.0)}, 20_000),
    "nested dicts, 200 leaves": (
        lambda: {
            f"layer{i}": {"weight": float(i), "bias": [float(i), (1.0, 2.0)]} for i in range(50)
        },
        800,
    ),
    "list of 1000": (lambda: [float(i) for i in range(1000)], 1500),
}


def operations(tree: Any) -> dict[str, Callable[[], Any]]:
    """Return the calls to measure on one tree."""
    leaves, treespec = optree.tree_flatten(tree)
    return {
        "flatten": lambda: optree.tree_flatten(tree),
        "unflatten": lambda: treespec.unflatten(leaves),
        "map, C function": lambda: optree.tree_map(abs, tree),
        "map, Python function": lambda: optree.tree_map(lambda x: x, tree),
    }


def measure(calls: list[Callable[[], Any]], count: int) -> tuple[float, float]:
    """Return seconds of a call by the clock and by a thread's processor time, per call."""
    barrier = threading.Barrier(len(calls))
    spent: list[float] = []
    starts: list[float] = []
    ends: list[float] = []

    def work(call: Callable[[], Any]) -> None:
        for _ in range(max(1, count // 20)):
            call()
        barrier.wait()
        starts.append(time.perf_counter())
        before = time.thread_time()
        for _ in range(count):
            call()
        spent.append(time.thread_time() - before)
        ends.append(time.perf_counter())

    threads = [threading.Thread(target=work, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # Measured by the threads themselves, because this one may wake up late on a busy machine.
    return (max(ends) - min(starts)) / count, min(spent) / count


def best(calls: list[Callable[[], Any]], count: int, rounds: int) -> tuple[float, float]:
    """Return the minimum over the rounds of both times."""
    results = [measure(calls, count) for _ in range(rounds)]
    return min(wall for wall, _ in results), min(spent for _, spent in results)


def cells(rounds: int) -> Iterator[dict[str, Any]]:
    """Measure every tree and operation; `throughput` and `cost` are those of two threads."""
    for name, (make, count) in TREES.items():
        mine, other = make(), make()
        for operation in operations(mine):
            one, other_one = operations(mine)[operation], operations(other)[operation]
            wall, spent = best([one], count, rounds)
            cell: dict[str, Any] = {"tree": name, "operation": operation, "min": wall}
            for which, second in (("own", other_one), ("shared", operations(mine)[operation])):
                two_wall, two_spent = best([one, second], count, rounds)
                cell[which] = {"throughput": 2 * wall / two_wall, "cost": two_spent / spent}
            yield cell


def main(arguments: list[str] | None = None) -> int:
    """Measure, store the result and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, metavar="FILE", help="where the result goes; "
                        "by default benchmarks/results/optree_threads.json on a Python without "
                        "the interpreter lock, and nowhere on another")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="one round")
    options = parser.parse_args(arguments)
    lock = bool(getattr(sys, "_is_gil_enabled", lambda: True)())
    output = options.output or (None if lock else RESULTS / "optree_threads.json")
    rounds = 1 if options.quick else ROUNDS
    settings = {
        "python": platform.python_version(),
        "optree": optree.__version__,
        "lock": lock,
        "rounds": rounds,
    }
    result = new_result("optree_threads", {}, settings)
    for cell in cells(rounds):
        result["cells"].append(cell)
        sys.stderr.write(f"{cell['tree']}, {cell['operation']} measured\n")
    print(f"{machine_lines(result)}\n\n{scaling_table(result)}")
    if output is not None:
        write_result(result, output)
        print(f"\nwritten to {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
