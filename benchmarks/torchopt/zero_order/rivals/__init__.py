# SPDX-License-Identifier: Apache-2.0
"""The competitors: one module each with the same names.

Every module has `DISTRIBUTIONS`, `library`, and

* `estimator(case, weights, x, y)` -> a function without arguments that returns the estimated
  gradient of `case.samples` antithetic pairs as a flat NumPy array;
* optionally `toy(fn, point, method, samples, sigma, seed)` -> the estimate for a toy function of a
  torch vector, and its number of evaluations.
"""

from __future__ import annotations

from benchmarks.harness.rival import Rival

OURS = "torchopt"


def rivals() -> list[Rival]:
    """Return the competitors, ours first."""
    here, torch = "benchmarks.torchopt.zero_order.rivals", ("torch==2.13.0",)
    published = ("torchopt==0.7.3", "optree==0.20.0")
    return [
        Rival(OURS, "torchopt", f"{here}.ours"),
        Rival("low rank", "torchopt, rank 1", f"{here}.low_rank"),
        Rival("torchopt-0.7.3", "torchopt 0.7.3", f"{here}.decorated", published, torch, False),
        Rival("vmap", "vmap by hand", f"{here}.hand_vmap"),
        Rival("evosax", "evosax on jax", f"{here}.evosax_jax", ("evosax==0.3.2", "jax==0.10.2")),
    ]
