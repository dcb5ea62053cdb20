# SPDX-License-Identifier: Apache-2.0
"""Implicit gradients against their peers: time, error, memory, Hessian-vector products.

    python -m benchmarks.torchopt.implicit            # everything
    python -m benchmarks.torchopt.implicit --quick    # smaller sizes, fewer rounds

The answer of each library is compared with dense linear algebra before it is timed. The clock is
the processor time of all threads of a process together.
"""

from __future__ import annotations

import sys
from typing import Any

from benchmarks.harness.program import Group, Suite, main
from benchmarks.harness.tournament import Effort
from benchmarks.torchopt.implicit import report
from benchmarks.torchopt.implicit.rivals import rivals

CASES = (
    *(("logistic", n, f"{n} unknowns") for n in (20, 200, 1000)),
    *((name, 64, "64 unknowns, 32 layers") for name in ("equilibrium", "anderson")),
    ("small_ridge", 1000, "1000 of 5 unknowns"),
)
STEPS, UNROLLED_STEPS, PRODUCTS = (10, 100, 1000), (10, 100, 1000), (1, 2, 5, 10, 20)


def solves(quick: bool) -> list[dict[str, Any]]:
    """Return the cases that are timed."""
    chosen = CASES[: 2 if quick else None]
    return [{"operation": name, "tree": text, "size": size} for name, size, text in chosen]


def memory(quick: bool) -> list[dict[str, Any]]:
    """Return the cases of the bytes after some inner steps."""
    steps = STEPS[: 2 if quick else None]
    modes = ("implicit", "unrolled")
    return [{"operation": mode, "tree": "memory", "steps": n} for mode in modes for n in steps]


def products(quick: bool) -> list[dict[str, Any]]:
    """Return the cases of products with the Hessian."""
    return [{"operation": "products", "tree": "60 unknowns", "steps": n} for n in PRODUCTS]


SUITE = Suite(
    "torchopt_implicit",
    "benchmarks.torchopt.implicit.suite",
    rivals,
    {
        "solves": Group(solves),
        "memory": Group(memory, asked="memory"),
        "products": Group(products, asked="products"),
    },
    {
        "solves": report.solves_table,
        "memory": report.memory_table,
        "products": report.products_table,
    },
    Effort(rounds=5, seconds=0.3, sample_seconds=0.02, slow_seconds=3.0),
)

if __name__ == "__main__":
    sys.exit(main(SUITE))
