# SPDX-License-Identifier: Apache-2.0
"""Solves whose operator depends on tensors in a closure.

matvec may depend on tensors that are not arguments. With a constant x̂ close to the solution,

    x = x̂ + A⁻¹ (b - A x̂)

is the solution. Autograd records A x̂. The outer A⁻¹ has a derivative rule, which is a solve with Aᴴ
or A by this same function. The rule ignores the dependence of A⁻¹ itself. The ignored term is
multiplied by b - A x̂, which is zero, and each further correction makes one more derivative of it
zero. So k corrections are exact up to the k-th derivative in the tensors that A depends on. A
derivative of a solve is a solve of the next generation, and the one that would begin derivative
k + 1 raises. If A depends on no differentiated tensor, one correction is exact for any derivative
in b.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchopt.errors import NotDifferentiableError
from torchopt.linear_solve.layout import Layout
from torchopt.linear_solve.operator import FlatMap, LinearOperator, transpose_linear
from torchopt.linear_solve.result import report_failure
from torchopt.precision import present_autocast, without_autocast
from torchopt.tree_function import apply_rule, is_tracked, require_entries_of_vmaps

if TYPE_CHECKING:
    from torchopt.linear_solve.solver import Solver

__all__ = ["solve_closure"]

Tensors = tuple[Tensor, ...]

CLOSURE_ORDER = 2
EXPLICIT = (
    "Pass the tensors as arguments: linear_solve(LinearOperator.from_function(function, params, "
    "like), b, solver) is differentiable to any order, in every mode."
)


@dataclass(frozen=True)
class _Correction:
    """The rule r -> A⁻¹ r, where r = b - A x̂ is so small that the value is set to zero."""

    solver: Solver
    operator: LinearOperator  # without parameters, which are in its closure
    generation: int
    needs_its_closure: bool

    @property
    def num_differentiable_inputs(self) -> int:
        return 1

    @property
    def num_kept_inputs(self) -> int:
        return 1

    @property
    def num_differentiable_outputs(self) -> int:
        return 1

    def evaluate(self, *inputs: Tensor) -> Tensors:
        return (torch.zeros_like(inputs[0]),)

    def pull_back(self, inputs: Tensors, outputs: Tensors, cotangents: Tensors) -> Tensors:
        return (self._solve(self.operator.T, cotangents[0]),)

    def push_forward(self, inputs: Tensors, outputs: Tensors, tangents: Tensors) -> Tensors:
        return (self._solve(self.operator, tangents[0]),)

    def _solve(self, operator: LinearOperator, b: Tensor) -> Tensor:
        generation = self.generation + 1 if self.needs_its_closure else 0
        try:
            return _solve_closed(self.solver, operator, b, generation)
        except RuntimeError as error:
            if "escaped?" not in str(error):  # torch: a tensor of a transform that has ended
                raise
            raise NotDifferentiableError(
                "linear solver: the operator is a closure over tensors of a torch.func transform "
                f"that has ended. {EXPLICIT}"
            ) from error


def solve_closure(solver: Solver, matvec: Callable[[Any], Any], b: Any) -> Any:
    """Return the solution x, a tree like b, of matvec(x) = b."""
    if not callable(matvec):
        raise TypeError(
            f"linear solver: matvec: expected a function of a tree like b, got "
            f"{type(matvec).__name__}; for a matrix, call linear_solve(A, b, solver)"
        )
    require_entries_of_vmaps()
    layout = Layout.of(b, "linear solver: b")
    rhs = layout.ravel(b)
    matvec = present_autocast()(matvec)

    def mv(v: Tensor) -> Tensor:
        return layout.ravel(matvec(layout.unravel(v)), "linear solver: output of matvec")

    # Not b itself, because a derivative may be taken after the transform of b has ended.
    example = partial(torch.zeros, rhs.shape, dtype=rhs.dtype, device=rhs.device)

    def bind() -> tuple[FlatMap, FlatMap]:
        """Return the products, linearised in the caller's grad mode and transforms."""
        pulls: list[FlatMap] = []

        def rmv(v: Tensor) -> Tensor:
            if not pulls:
                pulls.append(transpose_linear(mv, example()))
            return pulls[0](v)

        return mv, rmv

    start = solver.start(layout)
    solver, operator, rhs = solver.reformulate(LinearOperator(bind, (), layout), rhs)
    return layout.unravel(_solve_closed(solver, operator, rhs, 0, start))


def _solve_closed(
    solver: Solver,
    operator: LinearOperator,
    b: Tensor,
    generation: int,
    start: Tensor | None = None,
) -> Tensor:
    if generation > CLOSURE_ORDER:
        raise NotDifferentiableError(
            f"linear solver: derivative {generation} of a solve with an operator that is a closure "
            f"over differentiated tensors; expected at most {CLOSURE_ORDER}. {EXPLICIT}"
        )
    with torch.no_grad(), without_autocast():
        constant = b.detach()
        state = solver.init(operator.bound(), constant)
        found = solver.compute(state, constant, start)
    report_failure(found.status.detach(), solver.failure, solver)
    x = found.value.detach()
    mv = operator.bound().mv
    if not is_tracked(mv(torch.zeros(b.shape, dtype=b.dtype, device=b.device))):
        return x + apply_rule(_Correction(solver, operator, 0, False), b)[0]
    correction = _Correction(solver, operator, generation, True)
    for _ in range(CLOSURE_ORDER):
        x = x + apply_rule(correction, b - mv(x))[0]
    return x
