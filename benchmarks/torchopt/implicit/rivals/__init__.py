# SPDX-License-Identifier: Apache-2.0
"""The competitors: one module each with the same names.

Every module has `DISTRIBUTIONS` and `library`, and for each problem that it can solve a function of
its name, which takes the problem and returns a function without arguments: the gradient, as an
array. Those on torch that have them have `memory` and `products` too.
"""

from __future__ import annotations

from benchmarks.harness.rival import Rival

_HERE = "benchmarks.torchopt.implicit.rivals"
_TORCH = ("torch==2.13.0",)
_JAX = ("jax==0.10.2", "jaxlib==0.10.2")

OURS = "torchopt"


def rivals() -> list[Rival]:
    """Return the table of competitors, ours first."""
    return [
        Rival(OURS, "torchopt", f"{_HERE}.ours"),
        Rival("torchopt-loop", "torchopt, Python loop", f"{_HERE}.ours_loop"),
        Rival("unrolled", "torch autograd, unrolled", f"{_HERE}.unrolled"),
        Rival(
            "torchopt-0.7.3",
            "torchopt 0.7.3",
            f"{_HERE}.published",
            ("torchopt==0.7.3", "optree==0.17.0"),
            _TORCH,
            dependencies=False,
        ),
        Rival(
            "torchdeq", "torchdeq", f"{_HERE}.deq", ("torchdeq==0.1.0",), _TORCH, dependencies=False
        ),
        Rival("jaxopt", "jaxopt, jit", f"{_HERE}.jaxopt_api", (*_JAX, "jaxopt==0.8.5")),
        Rival(
            "optimistix", "optimistix, jit", f"{_HERE}.optimistix_api", (*_JAX, "optimistix==0.1.0")
        ),
    ]
