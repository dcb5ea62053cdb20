# SPDX-License-Identifier: Apache-2.0
"""Native steps and torch operations have the same derivatives at extreme numbers.

Gradients are infinite, NaN, zero, huge or tiny, and hyper-parameters are zero.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from optimizers import ROWS, SMOOTH, hypers_of, with_hypers
from torch import Tensor

import torchopt
from torchopt.base import GradientTransformation
from torchopt.optimizers.native import FusedChain, with_backend

DOUBLE = torch.float64


def is_fused(optimizer: GradientTransformation) -> bool:
    chain = getattr(optimizer.update, "__self__", None)
    return isinstance(chain, FusedChain) and chain.part is not None


FUSED = sorted(
    case for case, (name, settings) in SMOOTH.items() if is_fused(ROWS[name].functional(**settings))
)
GRADIENTS = {
    "infinite": [math.inf, 1.0, 0.5],
    "minus infinite": [-math.inf, 1.0, 0.5],
    "NaN": [math.nan, 1.0, 0.5],
    "zero": [0.0, 1.0, 0.5],
    "all zero": [0.0, 0.0, 0.0],
    "huge": [1e200, 1.0, 0.5],
    "tiny": [1e-200, 1.0, 0.5],
}
HYPERS: dict[str, dict[str, float]] = {
    "usual": {},
    "first moments forget": {"betas0": 0.0, "momentum": 0.0},
    "all moments forget": {"betas": 0.0, "alpha": 0.0, "rho": 0.0, "momentum": 0.0},
    "no eps": {"eps": 0.0, "eps_root": 0.0},
    "no step": {"lr": 0.0},
    "no decay": {"weight_decay": 0.0},
}


def derivatives(
    case: str,
    backend: Any,
    gradient: list[float],
    changes: dict[str, float],
    kind: str,
    first: float = 0.3,
) -> tuple[Tensor, ...]:
    """Return the parameters after two steps, and the derivatives of their sum.

    `kind` says which hyper-parameters are learned tensors: "all", "lr" or "numbers" (none).
    `first` is the first parameter.
    """
    values = [
        changes.get(f"{name}{i}", changes.get(name, value))
        for (name, i), value in hypers_of(case).items()
    ]
    hypers: list[Any] = [torch.tensor(value, dtype=DOUBLE) for value in values]
    learned = [
        h.requires_grad_()
        for h, key in zip(hypers, hypers_of(case))
        if kind == "all" or (kind, key[0]) == ("lr", "lr")
    ]
    if kind == "numbers":
        hypers = values
    optimizer = ROWS[SMOOTH[case][0]].functional(**with_hypers(case, hypers))
    optimizer = with_backend(optimizer, backend)
    p = start = torch.tensor([first, -0.7, 1.1], dtype=DOUBLE, requires_grad=True)
    state = optimizer.init((start.detach(),))
    grads = [
        torch.tensor(g, dtype=DOUBLE, requires_grad=True) for g in ([0.4, -0.2, 0.8], gradient)
    ]
    for g in grads:
        (u,), state = optimizer.update((g,), state, params=(p,), inplace=False)
        p = p + u
    inputs = [start, *grads, *learned]
    found = torch.autograd.grad(p.sum(), inputs, allow_unused=True, materialize_grads=True)
    return (p.detach(), *found)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("case", FUSED)
def test_derivatives_in_hyper_parameters_agree(case: str, gradient: str) -> None:
    if gradient == "NaN" and SMOOTH[case][0] in ("lion", "rprop"):
        pytest.skip("they differ in the sign of NaN")
    for changes in HYPERS.values():
        for kind in ("all", "lr", "numbers"):
            if kind == "numbers" and changes.get("momentum") == 0.0 and "nesterov" in case:
                continue  # refused
            arguments = (GRADIENTS[gradient], changes, kind)
            got = derivatives(case, "native", *arguments)
            wanted = derivatives(case, "reference", *arguments)
            for x, y in zip(got, wanted, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-13, equal_nan=True)
            if gradient == "zero" and kind == "all" and not changes:
                assert all(x.isfinite().all() for x in got)
                assert sum(bool(x.any()) for x in got) > 2


@pytest.mark.parametrize("kind", ["all", "lr", "numbers"])
@pytest.mark.parametrize("case", FUSED)
def test_derivatives_at_an_infinite_parameter_agree(case: str, kind: str) -> None:
    for changes in ({}, {"weight_decay": 0.0}):
        arguments = (GRADIENTS["huge"], changes, kind, math.inf)
        got = derivatives(case, "native", *arguments)
        wanted = derivatives(case, "reference", *arguments)
        for x, y in zip(got, wanted, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-13, equal_nan=True)


@pytest.mark.parametrize("name", ["adamw", "amsgradw", "nadamw", "adan", "lion"])
def test_a_decay_apart_from_the_direction_keeps_its_derivative_at_bad_gradients(name: str) -> None:
    optimizer = with_backend(ROWS[name].functional(0.1, weight_decay=0.5), "native")
    for bad in (math.nan, math.inf):
        p = torch.tensor([0.3, -0.7], dtype=DOUBLE, requires_grad=True)
        g = torch.tensor([bad, 1.0], dtype=DOUBLE)
        (u,), _ = optimizer.update((g,), optimizer.init((p,)), params=(p,), inplace=False)
        (found,) = torch.autograd.grad(u.sum(), p)
        torch.testing.assert_close(found, torch.full_like(p, -0.05))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("backend", ["auto", "native", "reference"])
@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_a_decay_that_is_a_tensor_of_zero_needs_parameters(
    name: str, backend: Any, inplace: bool
) -> None:
    optimizer = with_backend(ROWS[name].functional(0.1, weight_decay=torch.tensor(0.0)), backend)
    g = (torch.ones(2),)
    with pytest.raises(AssertionError, match="Parameters are required"):
        optimizer.update(g, optimizer.init(g), inplace=inplace)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_each_side_of_a_maximum_has_half_of_its_derivative_where_they_are_equal(
    backend: str,
) -> None:
    """AdaMax with b2 nu = |g|: u = -lr g / max(b2 nu, |g|), with b1 = 0 and eps = 0."""
    g = torch.tensor([0.5, -0.5, 0.25], dtype=torch.float64, requires_grad=True)
    nu = torch.ones(3, dtype=torch.float64, requires_grad=True)
    optimizer = with_backend(torchopt.adamax(0.1, (0.0, 0.5), 0.0), backend)
    params = (torch.zeros(3, dtype=torch.float64),)
    state = tuple(
        part._replace(nu=[nu]) if hasattr(part, "nu") else part for part in optimizer.init(params)
    )
    updates, _ = optimizer.update((g,), state, params=params, inplace=False)
    got = torch.autograd.grad(updates[0].sum(), [g, nu])
    expected = [
        torch.tensor([-0.2 + 0.1, -0.2 + 0.1, -0.2], dtype=torch.float64),
        torch.tensor([0.05, -0.05, 0.05], dtype=torch.float64),
    ]
    torch.testing.assert_close(list(got), expected, rtol=1e-12, atol=0)
