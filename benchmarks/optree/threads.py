# SPDX-License-Identifier: Apache-2.0
"""How the work of one thread grows when another does the same at the same time.

    python3.13t benchmarks/optree/threads.py

For each operation: microseconds of one thread alone, then for two threads, each on a tree of its
own and both on one tree, the throughput over that of one thread (2 is perfect, 1 is what the
global interpreter lock allows) and the processor time of a call over that of one thread alone
(1 is perfect; it is what sharing costs, and does not suffer from a busy machine).
Minimum of several rounds. Standard library and optree only.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import optree

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
    barrier = threading.Barrier(len(calls) + 1)
    spent: list[float] = []

    def work(call: Callable[[], Any]) -> None:
        for _ in range(max(1, count // 20)):
            call()
        barrier.wait()
        start = time.thread_time()
        for _ in range(count):
            call()
        spent.append(time.thread_time() - start)
        barrier.wait()

    threads = [threading.Thread(target=work, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    barrier.wait()
    start = time.perf_counter()
    barrier.wait()
    wall = time.perf_counter() - start
    for thread in threads:
        thread.join()
    return wall / count, min(spent) / count


def best(calls: list[Callable[[], Any]], count: int) -> tuple[float, float]:
    """Return the minimum over the rounds of both times."""
    results = [measure(calls, count) for _ in range(ROUNDS)]
    return min(wall for wall, _ in results), min(spent for _, spent in results)


def main() -> None:
    """Print the table."""
    lock = getattr(sys, "_is_gil_enabled", lambda: True)()
    print(f"Python {sys.version.split()[0]}, {'with' if lock else 'without'} the interpreter lock")
    print("| tree | operation | us | two threads, own trees | one tree |")
    print("|---|---|---:|---:|---:|")
    for name, (make, count) in TREES.items():
        mine, other = make(), make()
        for operation in operations(mine):
            one, other_one = operations(mine)[operation], operations(other)[operation]
            wall, spent = best([one], count)
            cells = []
            for second in (other_one, operations(mine)[operation]):
                two_wall, two_spent = best([one, second], count)
                cells.append(f"{2 * wall / two_wall:.2f} (cost {two_spent / spent:.2f})")
            print(f"| {name} | {operation} | {wall * 1e6:.2f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
