# SPDX-License-Identifier: Apache-2.0
"""Time zero-order gradients: evaluations a second, error against evaluations, memory.

    python -m benchmarks.torchopt.zero_order                  # everything
    python -m benchmarks.torchopt.zero_order --group speed    # speed, error, memory

The clock is the processor time of the process, on one thread.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from typing import Any

from benchmarks.harness.program import Group, Suite, main
from benchmarks.harness.tournament import Effort
from benchmarks.torchopt.zero_order import report
from benchmarks.torchopt.zero_order.rivals import rivals
from benchmarks.torchopt.zero_order.suite import (
    CASES,
    MEMORY,
    MEMORY_SAMPLES,
    METHODS,
    REPETITIONS,
    SAMPLES,
)


def speed(quick: bool) -> list[dict[str, Any]]:
    """Return the cases that are timed."""
    names = list(CASES)[: 2 if quick else None]
    return [{"tree": name, "operation": "speed", "case": asdict(CASES[name])} for name in names]


def error(quick: bool) -> list[dict[str, Any]]:
    """Return the cases of the error against evaluations."""
    shared = {"sigma": 0.1, "repetitions": 4 if quick else REPETITIONS}
    return [
        {"tree": name, "operation": method, "samples": samples, **shared}
        for name in ("linear, offset 10", "ellipsoid", "Rosenbrock")
        for method in METHODS
        for samples in SAMPLES
    ]


def memory(quick: bool) -> list[dict[str, Any]]:
    """Return the cases of the memory against samples."""
    return [
        {"tree": "memory", "operation": "memory", "samples": n}
        | {"case": asdict(replace(MEMORY, samples=n))}
        for n in MEMORY_SAMPLES[: 2 if quick else None]
    ]


SUITE = Suite(
    "torchopt_zero_order",
    "benchmarks.torchopt.zero_order.suite",
    rivals,
    {
        "speed": Group(speed),
        "error": Group(error, asked="error"),
        "memory": Group(memory, asked="peak", fresh=True),
    },
    {"speed": report.speed_table, "error": report.error_table, "memory": report.memory_table},
    Effort(rounds=5, seconds=0.3, sample_seconds=0.1, slow_seconds=20.0),
)

if __name__ == "__main__":
    sys.exit(main(SUITE))
