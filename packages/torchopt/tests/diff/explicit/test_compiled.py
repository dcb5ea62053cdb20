# SPDX-License-Identifier: Apache-2.0
"""A compiled run equals the eager one, up to the precision of its numbers."""

from __future__ import annotations

from typing import Any

import optimizers
import pytest
import torch
from torch import Tensor
from unrolled_loops import loss_of, outer, problem, worst

import torchopt
from torchopt.errors import NotTraceableError

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
QUICK = ("sgd-momentum",)
READING = ("shampoo", "soap")
# Derivative, keep, window, tasks and steps per program; each value with each optimizer in turn.
WAYS: list[tuple[str, Any, int | None, int | None, int]] = [
    ("reverse", "all", None, None, 1),
    ("reverse", "all", None, 3, 1),
    ("reverse", "all", None, 3, 2),
    ("reverse", 2, 3, None, 1),
    ("reverse", "1MiB", 3, 3, 1),
    ("mixed", "all", 3, None, 1),
    ("mixed", 2, None, 3, 1),
    ("mixed", "1MiB", None, None, 1),
    ("first_order", "all", 3, 3, 1),
    ("first_order", 2, None, None, 1),
    ("forward", "all", 3, 3, 1),
]


def decaying(lr: Any) -> Any:
    """Return Adam with a schedule made of a tensor."""
    return torchopt.adamw(torchopt.schedule.exponential_decay(lr, 10, 0.9), eps=0.1)


def clipped(lr: Any) -> Any:
    """Return a chain with a part that reads all parameters at once."""
    return torchopt.chain(torchopt.clip.clip_grad_norm(0.1), torchopt.sgd(lr, momentum=0.9))


OPTIMIZERS: list[tuple[Any, dict[str, float]]] = [
    (torchopt.sgd, {"lr": 0.1, "momentum": 0.9}),
    (torchopt.adam, {"lr": 0.05, "eps": 0.1}),
    (decaying, {"lr": 0.05}),
    (clipped, {"lr": 0.1}),
    (torchopt.adamax, {"lr": 0.05, "eps": 0.1}),
    (torchopt.rmsprop, {"lr": 0.05, "eps": 0.1}),
]
FEW = [(1, torch.float64), (6, torch.float64), (10, torch.float64)]  # in every run of the tests
SWEEP = [(way, OPTIMIZERS[i % len(OPTIMIZERS)]) for i, way in enumerate(WAYS)]


def gradients(
    optimizer: Any, hypers: dict[str, Any], dtype: torch.dtype, tasks: int | None, **options: Any
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """Return the gradients of everything that a run returns, and the tensors they belong to."""
    params, batch, scale = problem(tasks)
    params = {k: x.to(dtype, copy=True).requires_grad_() for k, x in params.items()}
    batch = tuple(x.to(dtype, copy=True).requires_grad_() for x in batch)
    scale = scale.to(dtype, copy=True).requires_grad_()
    dims = None if tasks is None else (None, 0, None)
    inner = torchopt.inner_loop(loss_of, optimizer, tasks=dims, **{"steps": 4, **options})
    result = inner(params, batch, scale, **hypers)
    numbers = [
        y
        for x in hypers.values()
        for y in (x if isinstance(x, tuple) else (x,))
        if isinstance(y, Tensor)
    ]
    inputs = [*params.values(), *batch, scale, *numbers]
    total = outer(result.params, result.losses, result.state)
    return torch.autograd.grad(total, inputs, allow_unused=True), inputs


def assert_same(
    optimizer: Any, hypers: dict[str, Any], dtype: torch.dtype, *, unroll: int = 1, **options: Any
) -> None:
    expected, inputs = gradients(optimizer, hypers, dtype, **options)
    got, _ = gradients(optimizer, hypers, dtype, **options, execute="compile", unroll=unroll)
    assert worst(expected, got, inputs) < TOLERANCE[dtype]
    assert max(g.abs().max() for g in expected if g is not None) > 1e-3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*expected fewer scalars:UserWarning")
@pytest.mark.parametrize(
    ("number", "dtype"),
    [
        pytest.param(
            number,
            dtype,
            marks=() if (number, dtype) in FEW else pytest.mark.exhaustive,
            id=f"{number}-{name}",
        )
        for number in range(len(SWEEP))
        for name, dtype in (("double", torch.float64), ("single", torch.float32))
    ],
)
def test_a_compiled_run_has_the_gradient_of_the_run(number: int, dtype: torch.dtype) -> None:
    (derivative, keep, window, tasks, unroll), (optimizer, values) = SWEEP[number]
    hypers = {k: torch.tensor(x, dtype=dtype, requires_grad=True) for k, x in values.items()}
    assert_same(
        optimizer,
        hypers,
        dtype,
        tasks=tasks,
        derivative=derivative,
        keep=keep,
        window=window,
        unroll=unroll,
    )


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case, marks=() if case in QUICK else (pytest.mark.slow, pytest.mark.exhaustive)
        )
        for case in optimizers.SMOOTH
        if case not in READING
    ],
)
def test_optimizers_of_every_kind_are_compiled(case: str) -> None:
    values = optimizers.hypers_of(case).values()
    numbers = [torch.tensor(float(x), dtype=torch.float64, requires_grad=True) for x in values]
    make = optimizers.ROWS[optimizers.SMOOTH[case][0]].functional
    hypers = optimizers.with_hypers(case, numbers)
    assert_same(make, hypers, torch.float64, tasks=None)


@pytest.mark.slow
@pytest.mark.parametrize("case", READING)
def test_an_optimizer_that_reads_tensors_on_the_host_is_named(case: str) -> None:
    name, settings = optimizers.SMOOTH[case]
    with pytest.raises(NotTraceableError, match="depends on a value"):
        gradients(
            optimizers.ROWS[name].functional,
            settings,
            torch.float64,
            None,
            execute="compile",
        )


def draw(seed: int) -> Tensor:
    return torch.randn(3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("place", ["held", "batch", "parameter"])
def test_negated_views_are_read_with_their_sign(place: str) -> None:
    held = [draw(0)]

    def loss(p: Any, batch: Tensor) -> Tensor:
        return ((p["a"] * held[0] + batch) ** 3).sum()

    loops = [
        torchopt.inner_loop(loss, torchopt.sgd(0.01), steps=3, execute=execute)
        for execute in ("eager", "compile")
    ]
    for view in (True, False):  # both are calls of one program
        given = dict(zip(("held", "batch", "parameter"), map(draw, range(3))))
        if view:
            given[place] = torch._neg_view(given[place])
            assert given[place].is_neg()
        held[0], leaf = given["held"], given["parameter"].requires_grad_()
        found = []
        for inner in loops:
            result = inner({"a": leaf}, given["batch"])
            total = result.params["a"].pow(2).sum() + result.losses[0]
            found.append((result.params["a"], result.losses, *torch.autograd.grad(total, leaf)))
        for compiled, eager in zip(*found[::-1]):
            assert eager.norm() > 0.1
            torch.testing.assert_close(compiled, eager, rtol=1e-12, atol=1e-14)


def test_a_compiled_function_reads_negated_views_with_their_sign() -> None:
    held, x, y = torch._neg_view(draw(0)), draw(1).requires_grad_(), torch._neg_view(draw(2))

    def value(x: Tensor, y: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad(((x * held) ** 3 + y * x**2 + x).sum(), x, create_graph=True)
        return grad.pow(2).sum()

    expected, found = value(x, y), torchopt.second_order.compile(value, execute="compile")(x, y)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    (grad,), (eager,) = torch.autograd.grad(found, x), torch.autograd.grad(expected, x)
    assert eager.norm() > 0.1
    torch.testing.assert_close(grad, eager, rtol=1e-12, atol=1e-14)
