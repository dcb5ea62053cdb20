# SPDX-License-Identifier: Apache-2.0
"""What a rival's process does in the implicit benchmark.

A rival is a module with `versions()`, `FILE`, and `BUILD`: by the name of a problem, a function
that takes the problem and returns a function without arguments, which computes the gradient and
returns it as an array. The rivals on torch also have `memory` and `products`.
"""

from __future__ import annotations

import time
import warnings
from typing import Any

from benchmarks.harness.case import UnsupportedError
from benchmarks.torchopt.implicit_problems import make, relative_error

_ready: dict[tuple[Any, ...], Any] = {}


def describe(rival: Any) -> dict[str, Any]:
    """Return the versions of a rival and where it was imported from."""
    return {"versions": rival.versions(), "file": rival.FILE}


def check(rival: Any, case: dict[str, Any]) -> dict[str, Any]:
    """Make a case ready and return the error of its answer and the seconds of its first run."""
    warnings.simplefilter("ignore")
    if case["problem"] not in rival.BUILD:
        raise UnsupportedError(f"no {case['problem']}")
    problem = make(case)
    run = rival.BUILD[case["problem"]](problem)
    start = time.perf_counter()
    error = relative_error(run(), problem)
    _ready.clear()
    _ready[tuple(case.values())] = run
    return {"error": error, "first": time.perf_counter() - start}


def seconds(rival: Any, case: dict[str, Any]) -> dict[str, Any]:
    """Return the times of some runs of the case made ready last.

    The clock is the processor time of all threads of the process: it leaves out what other
    processes take, and counts the threads that jax works in.
    """
    run = _ready[tuple(case.values())]
    times: list[float] = []
    stop = time.perf_counter() + 0.5
    while not times or (time.perf_counter() < stop and len(times) < 50):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return {"times": times}


def memory(rival: Any, case: dict[str, Any]) -> dict[str, Any]:
    """Return the peak of live tensor bytes of a meta-gradient, and its seconds."""
    if not hasattr(rival, "memory"):
        raise UnsupportedError("no byte counter outside of torch")
    warnings.simplefilter("ignore")
    answer: dict[str, Any] = rival.memory(case["mode"], case["steps"])
    return answer


def products(rival: Any, case: dict[str, Any]) -> dict[str, Any]:
    """Return the Hessian-vector products of a backward pass of k steps of conjugate gradients."""
    if not hasattr(rival, "products"):
        raise UnsupportedError("no counter of products outside of torch")
    warnings.simplefilter("ignore")
    answer: dict[str, Any] = rival.products(case["steps"])
    return answer
