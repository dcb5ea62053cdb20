# SPDX-License-Identifier: Apache-2.0
"""A batch of tasks in one program equals the loop over tasks."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch
from unrolled_loops import loss_of, outer, problem, unrolled, worst

import torchopt

TASKS, STEPS, TOLERANCE = 3, 3, 1e-12

TRACED = {"execute": "trace"}
DERIVATIVES = ("reverse", "mixed", "first_order", "forward")
WAYS = list(itertools.product(DERIVATIVES, ("all", "steps", 2)))


def inputs_of(shared: bool, derivative: str) -> tuple[Any, Any, Any, Any]:
    params, batch, scale = problem(tasks=TASKS)
    if not shared:
        params = {k: torch.stack([x, 1.1 * x, 0.9 * x]) for k, x in params.items()}
    few = derivative == "forward"
    params = {k: x.requires_grad_(not few or k == "s") for k, x in params.items()}
    batch = tuple(x.requires_grad_(not few) for x in batch)
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    return params, batch, scale.requires_grad_(), lr


@pytest.mark.filterwarnings("ignore:inner_loop. derivative=.forward.:UserWarning")
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("derivative", "keep"), WAYS)
def test_tasks_are_the_loop_over_them(derivative: str, keep: Any, shared: bool) -> None:
    params, batch, scale, lr = inputs_of(shared, derivative)
    inputs = [x for x in (*params.values(), *batch, scale, lr) if x.requires_grad]
    optimizer = torchopt.adam(lr=lr, eps=1e-2)
    total, losses = torch.tensor(0.0, dtype=torch.float64), []
    for i in range(TASKS):
        own = {k: x if shared else x[i] for k, x in params.items()}
        parts = unrolled(
            loss_of,
            optimizer,
            own,
            [tuple(x[i] for x in batch)] * STEPS,
            scale,
            first_order=derivative == "first_order",
        )
        total = total + outer(*parts[:2])
        losses.append(parts[1])
    expected = torch.autograd.grad(total, inputs, allow_unused=True)

    inner = torchopt.inner_loop(
        loss_of,
        torchopt.adam,
        steps=STEPS,
        derivative=derivative,
        keep=keep,
        tasks=(None if shared else 0, 0, None),
    )
    result = inner(params, batch, scale, lr=lr, eps=1e-2)
    torch.testing.assert_close(result.losses, torch.stack(losses), rtol=1e-13, atol=0)
    got = torch.autograd.grad(outer(result.params, result.losses), inputs, allow_unused=True)
    assert worst(expected, got, inputs) < TOLERANCE


@pytest.mark.filterwarnings("ignore:inner_loop. derivative=.forward.:UserWarning")
@pytest.mark.parametrize(("derivative", "keep"), WAYS)
def test_vmap_of_the_call_is_the_same(derivative: str, keep: Any) -> None:
    params, batch, scale, lr = inputs_of(False, derivative)
    inputs = [x for x in (*params.values(), *batch, scale, lr) if x.requires_grad]
    found = []
    for tasks in (None, (0, 0, None)):
        inner = torchopt.inner_loop(
            loss_of, torchopt.adam(lr=lr, eps=1e-2), steps=2, keep=keep, derivative=derivative,
            tasks=tasks,
        )  # fmt: skip

        def run(p: Any, b: Any, m: Any, inner: Any = inner) -> Any:
            result = inner(p, b, m)
            return result.params, result.losses

        batched = run if tasks else torch.func.vmap(run, (0, 0, None))
        got = batched(params, batch, scale)
        found.append(torch.autograd.grad(outer(*got), inputs, allow_unused=True))
    assert worst(*found, inputs) < TOLERANCE


@pytest.mark.parametrize("keep", ["all", "steps"])
def test_tasks_with_a_batch_for_each_step(keep: Any) -> None:
    params, _, scale = problem()
    _, batches, _ = problem(tasks=TASKS * STEPS)
    batches = tuple(x.unflatten(0, (STEPS, TASKS)).requires_grad_() for x in batches)
    params = {k: x.requires_grad_() for k, x in params.items()}
    inputs = [*params.values(), *batches]
    inner = torchopt.inner_loop(
        loss_of, torchopt.sgd(0.1), steps=STEPS, keep=keep, tasks=(None, 0, None)
    )
    result = inner(params, None, scale, batches=batches)
    got = torch.autograd.grad(outer(result.params, result.losses), inputs, allow_unused=True)
    total = torch.tensor(0.0, dtype=torch.float64)
    for i in range(TASKS):
        each = [tuple(x[t, i] for x in batches) for t in range(STEPS)]
        total = total + outer(*unrolled(loss_of, torchopt.sgd(0.1), params, each, scale)[:2])
    expected = torch.autograd.grad(total, inputs, allow_unused=True)
    assert worst(expected, got, inputs) < TOLERANCE


def test_each_task_draws_its_own_random_numbers_and_the_adjoint_the_same() -> None:
    def loss(w: Any, batch: Any) -> Any:
        return (torch.nn.functional.dropout(w, 0.5) ** 3 * batch).sum()

    w = torch.linspace(0.5, 1.5, 64, dtype=torch.float64).requires_grad_()
    batch = torch.ones(2, 1, dtype=torch.float64)
    found = []
    for derivative, keep in WAYS:
        if derivative == "first_order":
            continue
        torch.manual_seed(3)
        inner = torchopt.inner_loop(
            loss, torchopt.sgd(0.01), steps=3, derivative=derivative, keep=keep, tasks=(None, 0)
        )
        result = inner(w, batch)
        assert not torch.equal(result.params[0], result.params[1])
        found.append(torch.autograd.grad(result.params.pow(2).sum(), w)[0])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=TOLERANCE, atol=TOLERANCE)


def test_tasks_that_do_not_fit_are_refused() -> None:
    params, batch, scale = problem(tasks=TASKS)
    with pytest.raises(ValueError, match=r"for params, batch and each further argument \(3\)"):
        torchopt.inner_loop(loss_of, torchopt.sgd(0.1), steps=1, tasks=(None, 0))(
            params, batch, scale
        )
    inner = torchopt.inner_loop(loss_of, torchopt.sgd(0.1), steps=1, tasks=(None, (0, 0), None))
    with pytest.raises(ValueError, match="the same number of tasks"):
        inner(params, (batch[0], batch[1][:2]), scale)
    with pytest.raises(ValueError, match="a dimension 5"):
        torchopt.inner_loop(loss_of, torchopt.sgd(0.1), steps=1, tasks=(None, 5, None))(
            params, batch, scale
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inner = torchopt.inner_loop(loss_of, torchopt.sgd(0.1), steps=1, tasks=(None, 0, None))
        assert inner(params, batch, scale).losses.shape == (TASKS, 1)


@pytest.mark.parametrize("options", [{}, {"keep": "steps"}, {"derivative": "mixed"}, TRACED])
def test_a_number_of_the_state_starts_equal_and_evolves_for_each_task(options: Any) -> None:
    """The step size that Prodigy finds is a number; each task finds its own."""

    def loss(p: Any, b: Any) -> Any:
        return ((p - b) ** 2).sum()

    starts = torch.tensor([[1.0, 2.0], [0.5, -1.0], [3.0, 0.0]], dtype=torch.float64)
    goals = torch.tensor([[1.0], [9.0], [70.0]], dtype=torch.float64)
    inputs = [starts.requires_grad_(), goals.requires_grad_()]
    optimizer = torchopt.alias.prodigy(d0=0.1)
    one = torchopt.inner_loop(loss, optimizer, steps=1)(starts[0].detach(), goals[0].detach()).state
    moved = torchopt.tree.tree_map(
        lambda x: x.detach().requires_grad_() if x.is_floating_point() and not x.ndim else x, one
    )
    inputs += [x for x in torchopt.tree.tree_leaves(moved) if x.requires_grad]
    assert len(inputs) == 4
    found = []
    for tasks in ((0, 0), None):
        inner = torchopt.inner_loop(loss, optimizer, steps=9, tasks=tasks, **options)
        if tasks is None:
            ends = [inner(x, b, state=moved).params for x, b in zip(starts, goals)]
        else:
            each = torchopt.tree.tree_map(lambda x: x.expand(3, *x.shape) if x.ndim else x, moved)
            ends = inner(starts, goals, state=each).params
        total = sum((i * end).sum() for i, end in enumerate(ends, 1))
        found.append([total, *torch.autograd.grad(total, inputs)])
    for got, wanted in zip(*found):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
