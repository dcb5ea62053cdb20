# SPDX-License-Identifier: Apache-2.0
"""Cases of the optimizer benchmarks in a rival's process: checked, then timed or counted."""

from __future__ import annotations

import gc
from typing import Any

import torch

from benchmarks.harness.case import Prepared, describe, function_of
from benchmarks.torchopt import matrices, problems, tasks
from benchmarks.torchopt.dispatched import Dispatched
from benchmarks.torchopt.rivals import torch_optim

__all__ = ["check", "count", "describe", "prepare"]

torch.set_num_threads(1)


def _function(rival: Any, case: dict[str, Any]) -> Any:
    if case["operation"] == "meta":
        return function_of(rival, "meta")(case["tree"], case["steps"])
    if case["operation"] in tasks.OPTIMIZERS:
        return function_of(rival, "task")(case["operation"], case["tree"])
    params, grads = problems.make_set(case["tree"])
    if case["operation"] in ("functional", "differentiable"):
        return function_of(rival, case["operation"])(params, grads)
    for p, g in zip(params, grads, strict=True):
        p.requires_grad_()
        p.grad = g
    return function_of(rival, "in_place")(params, case["operation"])


def prepare(rival: Any, case: dict[str, Any]) -> Prepared:
    """Return the statement of a case, after its answer has been checked.

    Args:
        rival: the module that adapts the library.
        case: `operation` ("meta", a row of `tasks.OPTIMIZERS`, "functional", "differentiable",
            or the name of an optimizer to step in place), `tree` (a row of `problems.SETS` or
            `problems.MATRICES`, a model, or a row of `tasks.NETWORKS`), and `steps`.

    Raises:
        AssertionError: the answer is wrong.
    """
    run = _function(rival, case)
    check(rival, case, run())
    return Prepared("run()", {"run": run})


def check(rival: Any, case: dict[str, Any], answer: Any) -> None:
    """Raise unless `answer` agrees with the plain formula; steps in place run on a copy."""
    if case["operation"] == "meta":
        _check_gradients(answer, problems.plain_meta_gradient(case["tree"], case["steps"])())
        return
    if case["operation"] in tasks.OPTIMIZERS:
        _check_gradients(answer, tasks.expected(case["operation"], case["tree"]))
        return
    params, grads = problems.make_set(case["tree"])
    if case["operation"] == "functional":
        expected = problems.plain_second_step(params, grads)()
        torch.testing.assert_close(list(answer), expected, rtol=1e-4, atol=1e-5)
    elif case["operation"] == "differentiable":
        leaves = [g.requires_grad_() for g in grads]
        ones = [torch.ones_like(p) for p in params]
        slopes = torch.autograd.grad(problems.plain_second_step(params, leaves)(), leaves, ones)
        torch.testing.assert_close(list(answer), list(slopes), rtol=1e-3, atol=1e-4)
    else:
        _check_in_place(rival, case["operation"], params, grads)


def _check_in_place(rival: Any, name: str, params: list[Any], grads: list[Any]) -> None:
    """Raise unless a step moves parameters as torch's for-loop does in double precision.

    Optimizers of matrices are compared with the loops of `matrices`. The tolerance is 2 % of the
    largest step, because single precision rounds parameters of size one to 1e-7.
    """
    twin = [p.clone().requires_grad_() for p in params]
    exact = [p.double().requires_grad_() for p in params]
    for tensors in (twin, exact):
        for p, g in zip(tensors, grads, strict=True):
            p.grad = g.to(p.dtype, copy=True)
    rival.in_place(twin, name)()
    if name in matrices.STEPS:
        matrices.one_by_one(exact, name)()
    else:
        torch_optim.in_place(exact, name, foreach=False)()
    steps = [e.detach() - p for e, p in zip(exact, params, strict=True)]
    largest = max(float(x.abs().max()) for x in steps)
    # Torch's Muon rounds to bfloat16, 0.4 %, in each of five products that amplify by up to 3.4.
    share = 0.1 if name == "muon" else 0.02
    for got, p, wanted in zip(twin, params, steps, strict=True):
        moved = got.detach().double() - p
        torch.testing.assert_close(moved, wanted, rtol=0, atol=share * largest + 2e-7)


def _check_gradients(answer: Any, expected: list[Any]) -> None:
    scale = max(float(e.abs().max()) for e in expected)
    for got, wanted in zip(answer, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-2 * scale)


def count(rival: Any, case: dict[str, Any]) -> dict[str, Any]:
    """Return the ATen operations of one step, and the peak of the bytes it holds at once."""
    run = _function(rival, case)
    run()
    gc.collect()
    with Dispatched() as counter:
        run()
    return {"aten": counter.operations, "peak_bytes": counter.peak}
