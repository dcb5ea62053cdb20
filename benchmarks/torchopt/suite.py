# SPDX-License-Identifier: Apache-2.0
"""Cases of the optimizer benchmarks, in a rival's process: checked first, then timed or counted."""

from __future__ import annotations

import gc
import importlib.metadata
from typing import Any

import torch

from benchmarks.harness.case import Prepared
from benchmarks.torchopt import problems
from benchmarks.torchopt.dispatched import Dispatched

torch.set_num_threads(1)


def describe(rival: Any) -> dict[str, Any]:
    """Return versions and origin of a rival."""
    versions = {name: importlib.metadata.version(name) for name in rival.DISTRIBUTIONS}
    return {"versions": versions, "file": rival.library.__file__}


def _function(rival: Any, case: dict[str, Any]) -> Any:
    if case["operation"] == "meta":
        return rival.meta(case["tree"], case["steps"])
    params, grads = problems.make_set(case["tree"])
    if case["operation"] in ("functional", "differentiable"):
        return getattr(rival, case["operation"])(params, grads)
    for p, g in zip(params, grads):
        p.requires_grad_()
        p.grad = g
    return rival.in_place(params, case["operation"])


def prepare(rival: Any, case: dict[str, Any]) -> Prepared:
    """Return a statement that was checked to compute the right thing.

    Args:
        rival: the module that adapts the library.
        case: `operation` ("meta", "functional", "differentiable", or the name of an optimizer
            to step in place), `tree` (a row of `problems.SETS`, or a model), and `steps`.

    Raises:
        AssertionError: the answer is wrong.
    """
    run = _function(rival, case)
    check(rival, case, run())
    return Prepared("run()", {"run": run})


def check(rival: Any, case: dict[str, Any], answer: Any) -> None:
    """Raise unless `answer` is that of the plain formula; steps in place are checked on a twin."""
    if case["operation"] == "meta":
        expected = problems.plain_meta_gradient(case["tree"], case["steps"])()
        scale = max(float(e.abs().max()) for e in expected)
        for got, wanted in zip(answer, expected):
            torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-2 * scale)
        return
    params, grads = problems.make_set(case["tree"])
    zeros = [torch.zeros_like(p) for p in params]
    if case["operation"] == "functional":
        expected = problems.plain_second_step(params, grads)()
        torch.testing.assert_close(list(answer), expected, rtol=1e-4, atol=1e-5)
    elif case["operation"] == "differentiable":
        leaves = [g.requires_grad_() for g in grads]
        ones = [torch.ones_like(p) for p in params]
        slopes = torch.autograd.grad(problems.plain_second_step(params, leaves)(), leaves, ones)
        torch.testing.assert_close(list(answer), list(slopes), rtol=1e-3, atol=1e-4)
    elif case["operation"] == "adam":
        twin = [p.clone().requires_grad_() for p in params]
        for p, g in zip(twin, grads):
            p.grad = g
        rival.in_place(twin, "adam")()
        expected = problems.plain_adam(params, grads, zeros, zeros, 1)[0]
        torch.testing.assert_close([p.detach() for p in twin], expected, rtol=1e-4, atol=1e-5)


def count(rival: Any, case: dict[str, Any]) -> dict[str, Any]:
    """Return the ATen operations of one step, and the peak of the bytes it holds at once."""
    run = _function(rival, case)
    run()
    gc.collect()
    with Dispatched() as counter:
        run()
    return {"aten": counter.operations, "peak_bytes": counter.peak}
