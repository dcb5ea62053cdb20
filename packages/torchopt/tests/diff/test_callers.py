# SPDX-License-Identifier: Apache-2.0
"""Solvers and estimates in functions that are compiled or checkpointed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torchopt
from torchopt.diff.implicit import (
    certified_grad,
    custom_root,
    root_jvp,
    root_vjp,
)
from torchopt.diff.zero_order import seed_replay
from torchopt.diff.zero_order.search import PGPE, SearchDistribution
from torchopt.linear_solve import CG, GMRES, LinearOperator, linear_solve
from torchopt.solvers import (
    LBFGS,
    Anderson,
    GradientDescent,
    LevenbergMarquardt,
    Newton,
    ProximalGradient,
    prox_l1,
    quadratic_program,
)

# The compiler reads .grad of intermediate tensors, which causes a warning of torch.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)

F64 = torch.float64
Q = torch.tensor([[3.0, 1.0, 0.0], [1.0, 2.0, 0.5], [0.0, 0.5, 4.0]], dtype=F64)
ZERO = torch.zeros(3, dtype=F64)


def residual(x: Tensor, b: Tensor) -> Tensor:
    return Q @ x - b


def objective(x: Tensor, b: Tensor) -> Tensor:
    return x @ Q @ x / 2 - b @ x


def step(x: Tensor, b: Tensor) -> Tensor:
    return x - 0.2 * residual(x, b)


class Minimum(torchopt.nn.ImplicitMetaGradientModule):
    def __init__(self, b: Tensor) -> None:
        super().__init__()
        self.b = b
        self.x = nn.Parameter(torch.zeros(3, dtype=F64))

    def objective(self) -> Tensor:
        return objective(self.x, self.b)

    def solve(self) -> None:
        with torch.no_grad():
            self.x.copy_(torch.linalg.solve(Q, self.b))


def of_tree(b: Tensor) -> Tensor:
    def product(p: Tensor, v: Any) -> Any:
        return {"x": p @ v["x"] + 0 * v["y"], "y": v["y"]}

    like = {"x": ZERO, "y": ZERO[0]}
    operator = LinearOperator.from_function(product, Q, like)
    return linear_solve(operator, {"x": b, "y": b[0]}, GMRES(1e-13)).value["x"]


b0 = torch.tensor([1.0, -2.0, 0.5], dtype=F64, requires_grad=True)
root = custom_root(torch.func.grad(objective), 1)(lambda start, b: torch.linalg.solve(Q, b))
inner = torchopt.diff.Implicit(objective, torchopt.sgd(0.2), steps=200)
minimum = Minimum(b0)
descent = GradientDescent(lr=0.2, tol=1e-13, adjoint=torchopt.diff.Explicit())
lasso = ProximalGradient(tol=1e-13, prox=lambda v, s, b: prox_l1(v, 0 * s))
tight: dict[str, Any] = {"tol": 1e-13, "on_fail": "ignore"}


def of_module(b: Tensor) -> Tensor:
    minimum.solve()
    return minimum.x * 1


SOLUTIONS: dict[str, Callable[[Tensor], Any]] = {
    "custom_root": lambda b: root(None, b),
    "Implicit": lambda b: inner(ZERO, b).params,
    "ImplicitMetaGradientModule": of_module,
    "linear_solve": of_tree,
    "a linear solver of a closure": lambda b: CG(1e-13)(lambda v: Q @ v, b),
    "Newton": lambda b: Newton(**tight)(residual, ZERO, b),
    "Anderson": lambda b: Anderson(**tight)(step, ZERO, b),
    "LevenbergMarquardt": lambda b: LevenbergMarquardt(**tight)(residual, ZERO, b),
    "ProximalGradient": lambda b: lasso(objective, ZERO, b),
    "adjoint=Explicit()": lambda b: descent(objective, ZERO, b),
    "quadratic_program": lambda b: quadratic_program(Q, -b).x,
}


def compiled(function: Callable[[Tensor], Tensor]) -> Tensor:
    torch._dynamo.reset()
    result: Tensor = torch.compile(function, backend="eager")(b0)
    return result


def computed_again(function: Callable[[Tensor], Tensor]) -> Tensor:
    result: Tensor = checkpoint(function, b0, use_reentrant=False)
    return result


def kept_on_the_host(function: Callable[[Tensor], Tensor]) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return function(b0)


CALLERS = [
    (call, name)
    for call in (compiled, computed_again, kept_on_the_host)
    for name in SOLUTIONS
    # Its steps keep a graph, which torch refuses under hooks for saved tensors.
    if call is compiled or name != "adjoint=Explicit()"
]


@pytest.mark.parametrize(("call", "name"), CALLERS)
def test_callers_get_the_solution_and_its_derivative(
    call: Callable[..., Tensor], name: str
) -> None:
    x = call(lambda b: 3 * SOLUTIONS[name](b))
    (gradient,) = torch.autograd.grad(x.square().sum(), b0)
    solution = torch.linalg.solve(Q, b0.detach())
    torch.testing.assert_close(x.detach(), 3 * solution, rtol=1e-10, atol=1e-10)
    expected = 18 * torch.linalg.solve(Q, solution)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-9)


def _perturbed(b: Tensor) -> Tensor:
    weight = b.clone()
    options: dict[str, Any] = {"num_samples": 3, "seed": 0}
    return seed_replay.estimate(lambda: weight.square().sum(), [weight], **options).coefficients


def _searched(b: Tensor) -> Tensor:
    search = SearchDistribution.around(b, 0.5)
    mean: Tensor = PGPE(4).estimate(lambda x: x.square().sum(), search).gradient.mean
    return mean


ones = torch.ones(3, dtype=F64)
estimate = torchopt.diff.ZeroOrder(torch.randn, "antithetic", num_samples=4)
certified = certified_grad(lambda x, b: x.square().sum(), root)

NUMBERS: dict[str, Callable[[Tensor], Tensor]] = {
    "run": lambda b: LBFGS().run(objective, ZERO, b).value,
    "ProximalGradient.run": lambda b: lasso.run(objective, ZERO, b).value,
    "root_vjp": lambda b: root_vjp(residual, torch.linalg.solve(Q, b), (b,), ones)[0],
    "root_jvp": lambda b: root_jvp(residual, torch.linalg.solve(Q, b), (b,), (ones,)),
    "certified_grad": lambda b: certified(None, b)[1][0],
    "ZeroOrder.estimate": lambda b: estimate.estimate(lambda x: x.square().sum(), b).gradient,
    "seed_replay.estimate": _perturbed,
    "PGPE": _searched,
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("name", NUMBERS)
def test_compiled_callers_get_the_numbers_of_eager_ones(name: str) -> None:
    b = b0.detach()
    torch._dynamo.reset()
    torch.manual_seed(0)
    found = torch.compile(NUMBERS[name], backend="eager")(b)
    torch.manual_seed(0)
    torch.testing.assert_close(found, NUMBERS[name](b), rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("mode", ["forward-mode", "reverse-mode"])
# torch's own operations fail under its vmap in the first; the second already has its argument.
@pytest.mark.parametrize(
    "name", sorted(SOLUTIONS.keys() - {"adjoint=Explicit()", "ImplicitMetaGradientModule"})
)
def test_all_columns_of_a_jacobian_are_computed_at_once(name: str, mode: str) -> None:
    found = torch.autograd.functional.jacobian(
        SOLUTIONS[name], b0.detach(), strategy=mode, vectorize=True
    )
    torch.testing.assert_close(found, torch.linalg.inv(Q), rtol=1e-9, atol=1e-9)
