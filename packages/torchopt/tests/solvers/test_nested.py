# SPDX-License-Identifier: Apache-2.0
"""A solver inside the function of another solver: nested bilevel problems."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from torchopt import solvers
from torchopt.errors import NotDifferentiableError

SOLVERS = {
    "lbfgs": solvers.LBFGS(tol=1e-10),
    "newton_cg": solvers.NewtonCG(tol=1e-10),
}


def bilevel(solver: solvers.Solver, t: Tensor) -> Tensor:
    def outer(x: Tensor, t: Tensor) -> Tensor:
        y = solver(lambda y, x, t: ((y - x * t) ** 2).sum() + y**2 / 2, torch.zeros_like(x), x, t)
        return (y - 1) ** 2 + x**2 / 10

    found: Tensor = solver(outer, torch.zeros((), dtype=torch.float64), t)
    return found


def solution(t: Tensor) -> Tensor:
    a = 2 * t / 3  # y = a x
    return a / (a**2 + 0.1)


@pytest.mark.parametrize("name", SOLVERS)
def test_autograd_follows_both(name: str) -> None:
    t = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    found, expected = bilevel(SOLVERS[name], t), solution(t)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    (got,) = torch.autograd.grad(found, t)
    (want,) = torch.autograd.grad(expected, t)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacfwd])
@pytest.mark.parametrize("name", SOLVERS)
def test_a_transform_around_both_is_refused_with_the_reason(name: str, transform: object) -> None:
    t = torch.tensor(1.3, dtype=torch.float64)
    with pytest.raises(NotDifferentiableError, match=r"a solver.*inside.*by torch\.autograd\.grad"):
        transform(lambda t: bilevel(SOLVERS[name], t))(t)  # type: ignore[operator]
