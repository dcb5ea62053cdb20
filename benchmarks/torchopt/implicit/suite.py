# SPDX-License-Identifier: Apache-2.0
"""The part of the implicit benchmark that runs in a rival's process."""

from __future__ import annotations

import time
import warnings
from typing import Any

from benchmarks.harness.case import Prepared, describe, function_of
from benchmarks.torchopt.implicit.problems import make, relative_error

__all__ = ["describe", "memory", "prepare", "products"]

# Systems are solved to a residual of 1e-8 and have condition numbers below 30.
LARGEST_ERROR = 1e-6


def prepare(rival: Any, case: dict[str, Any]) -> Prepared:
    """Return the statement of a case, after its answer has been checked."""
    warnings.simplefilter("ignore")
    build = function_of(rival, case["operation"])
    problem = make(case)
    run = build(problem)
    error = relative_error(run(), problem)
    if not error <= LARGEST_ERROR:
        raise ArithmeticError(f"expected an error of at most {LARGEST_ERROR}, got {error:.1e}")
    return Prepared("run()", {"run": run}, clock=time.process_time, facts={"error": error})


def memory(rival: Any, case: dict[str, Any]) -> dict[str, Any]:
    """Return the peak of live tensor bytes of a meta-gradient, and its seconds."""
    warnings.simplefilter("ignore")
    answer: dict[str, Any] = function_of(rival, "memory")(case["operation"], case["steps"])
    return answer


def products(rival: Any, case: dict[str, Any]) -> dict[str, Any]:
    """Return the Hessian-vector products of a backward pass of k steps of conjugate gradients."""
    warnings.simplefilter("ignore")
    answer: dict[str, Any] = function_of(rival, "products")(case["steps"])
    return answer
