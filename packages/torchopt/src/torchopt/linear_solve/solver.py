# SPDX-License-Identifier: Apache-2.0
"""The interface of linear solvers, and the differentiable solve that uses it.

A solve x = A(p)⁻¹ b is differentiated by its equation, whatever the solver does:

    ẋ = A⁻¹ (ḃ - Ȧ x)            forward
    b̄ = A⁻ᴴ x̄,  p̄ = -(∂/∂p A(p) x)ᴴ b̄    reverse

Both are linear solves again, so they are differentiable to any order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchopt.linear_solve.hidden import solve_closure
from torchopt.linear_solve.layout import Layout
from torchopt.linear_solve.operator import BoundOperator, LinearOperator, in_present_autocast
from torchopt.linear_solve.result import OnFail, Solution, Stats, report_failure
from torchopt.precision import without_autocast
from torchopt.shown import Described
from torchopt.tree import tree_map
from torchopt.tree_function import apply_rule, derivatives_wanted, linearize, uncompiled

__all__ = ["Computed", "Solver", "linear_solve", "push_forward", "solve_once", "solve_vector"]

Tensors = tuple[Tensor, ...]


class Computed(NamedTuple):
    """The result of a solver for one right-hand side: vectors and 0-dim tensors."""

    value: Tensor
    iterations: Tensor
    residual_norm: Tensor
    status: Tensor
    condition: Tensor | None = None


@dataclass(frozen=True)
class Solver(Described, ABC):
    """A method to solve A x = b; its options are fields.

    A solver can be used in three ways:

    * `linear_solve(operator, b, solver)` is differentiable with respect to b and the parameters of
      the operator.
    * `solver(matvec, b)` takes any callable, as `solve=` of `custom_root` does. It is
      differentiable to second order with respect to tensors in the closure of matvec. A third
      derivative, nested forward modes, and reverse mode through an enclosing vmap raise; they need
      the explicit parameters of `linear_solve`.
    * `state = solver.init(A)`, `solver.compute(state, b)` and `solver.transpose(state)` work on
      vectors, without derivatives, for several right-hand sides of one operator; `torch.func.vmap`
      over b solves for all of them together.

    Autocast applies to the functions that define an operator, not to matrices or to the solver.
    """

    @abstractmethod
    def init(self, operator: BoundOperator, like: Tensor) -> Any:
        """Return everything that does not depend on b, such as a factorisation.

        Args:
            operator: A.
            like: A vector of the dtype and device of the right-hand sides.
        """

    @abstractmethod
    def compute(self, state: Any, b: Tensor, x0: Tensor | None = None) -> Computed:
        """Return the solution for one vector b.

        Args:
            state: From `init` or `transpose`.
            b: The right-hand side, [n].
            x0: The start of an iterative solver; None: zero.
        """

    @abstractmethod
    def transpose(self, state: Any) -> Any:
        """Return the state for Aᴴ, given the state for A."""

    @property
    def failure(self) -> OnFail:
        """What `solver(matvec, b)` does with an unconverged answer."""
        return "warn"

    @property
    def is_stochastic(self) -> bool:
        """Whether each product should draw new random numbers; otherwise A must not change."""
        return False

    @property
    def shift(self) -> float | Tensor | None:
        """The shift, if the solver solves (A + shift I) x = b; None: no shift."""
        return None

    def reformulate(
        self, operator: LinearOperator, b: Tensor
    ) -> tuple[Solver, LinearOperator, Tensor]:
        """Return a solver, an operator and a right-hand side for the system to solve.

        By default it is the given system with the shift added to A. The returned system is the one
        that is differentiated.
        """
        if self.shift is None:
            return self, operator, b
        # The shift becomes a part of the operator and is differentiated with it.
        return replace(self, ridge=None), operator.shifted(self.shift), b  # type: ignore[call-arg]

    def start(self, layout: Layout) -> Tensor | None:
        """Return the default x0 as a vector, or None."""
        return None

    @uncompiled
    def __call__(self, matvec: Callable[[Any], Any], b: Any) -> Any:
        """Return x with matvec(x) = b, a tree like b."""
        return solve_closure(self, matvec, b)


@uncompiled
def linear_solve(
    operator: LinearOperator | Tensor,
    b: Any,
    solver: Solver,
    *,
    x0: Any = None,
    on_fail: OnFail | None = None,
) -> Solution:
    """Solve A x = b.

    Args:
        operator: A, a `LinearOperator` or an [n, n] matrix, whose parameters are differentiated.
        b: The right-hand side, a tree of tensors that A maps; it is differentiated.
        solver: The method.
        x0: The start of an iterative solver, a tree like b, which is not differentiated; None: the
            start of the solver, or zero. Direct solvers ignore it.
        on_fail: What to do if the solver did not converge: "raise", "warn", or "ignore", which
            only sets the status and reads nothing from the device. None: "ignore" if the solver
            was made with that, else "raise".

    Returns:
        The solution, differentiable to any order, in forward and reverse mode, under vmap.

    Raises:
        LinearSolveError: The solve failed and `on_fail` is "raise".
        TypeError: A matrix and b have different dtypes, or `solver` is not a solver.
        ValueError: b or x0 do not match the operator in structure or shapes.

    Example:
        >>> import torch
        >>> from torchopt.linear_solve import CG, linear_solve
        >>> A = torch.tensor([[4.0, 1.0], [1.0, 3.0]])
        >>> linear_solve(A, torch.tensor([1.0, 2.0]), CG()).value
        tensor([0.0909, 0.6364])
    """
    if not isinstance(solver, Solver):
        made = f"the class {solver.__name__}; call it" if isinstance(solver, type) else repr(solver)
        raise TypeError(
            f"linear_solve(operator, b, solver): expected a solver, such as CG(), got {made:.60}"
        )
    if isinstance(operator, Tensor):
        casts = torch.is_autocast_enabled(operator.device.type)
        if isinstance(b, Tensor) and b.dtype != operator.dtype and not casts:
            raise TypeError(
                f"linear_solve: b: expected {operator.dtype} as the matrix has, got {b.dtype}; "
                "convert one of them with .to(...)"
            )
        if casts and isinstance(b, Tensor):
            operator = operator.to(b.dtype)
        operator = LinearOperator.from_matrix(operator)
    else:
        operator = in_present_autocast(operator)
    if on_fail is None:
        on_fail = "ignore" if solver.failure == "ignore" else "raise"
    layout = operator.layout
    rhs = layout.ravel(b, "linear_solve: b")
    start: Tensors
    if x0 is not None:
        start = (layout.ravel(tree_map(torch.detach, x0), "linear_solve: x0"),)
    else:
        known = solver.start(layout)
        start = () if known is None else (known.detach(),)
    solver, operator, rhs = solver.reformulate(operator, rhs)
    value, stats, status = solve_vector(solver, operator, rhs, start, on_fail)
    return Solution(layout.unravel(value), status, stats)


def solve_vector(
    solver: Solver, operator: LinearOperator, b: Tensor, start: Tensors, on_fail: OnFail
) -> tuple[Tensor, Stats, Tensor]:
    """Solve for one vector b; this is `linear_solve` for vectors.

    Args:
        solver: The method, whose shift is not applied.
        operator: A.
        b: The right-hand side, [n].
        start: Empty, or the vector to start from.
        on_fail: See `linear_solve`.

    Returns:
        (x, statistics, status).
    """
    differentiable = tuple(
        i for i, p in enumerate(operator.params) if p.is_floating_point() or p.is_complex()
    )
    constant = tuple(i for i in range(len(operator.params)) if i not in differentiable)
    order = differentiable + constant
    rule = _LinearSolve(
        solver, replace(operator, params=()), order, len(differentiable), len(start), on_fail
    )
    inputs = (b, *(operator.params[i] for i in order), *start)
    # Function.apply takes 20 us, also where it records nothing.
    outputs = apply_rule(rule, *inputs) if derivatives_wanted() else rule.evaluate(*inputs)
    value, iterations, residual_norm, status, condition = outputs
    report_failure(status, on_fail, solver)
    info = torch.finfo(b.dtype)
    vector = b.detach()
    size: Tensor | float = 1.0
    if b.numel():  # squares stay in the range of the dtype
        size = torch.linalg.vector_norm(vector, torch.inf).clamp(info.tiny, info.max)
    rhs_norm = torch.linalg.vector_norm(vector / size) * size
    return value, Stats(iterations, residual_norm, rhs_norm, condition), status


@dataclass(frozen=True)
class _LinearSolve:
    """The rule (b, params..., x0) -> (x, iterations, residual norm, status, condition)."""

    solver: Solver
    operator: LinearOperator  # its params are the inputs of the rule
    order: tuple[int, ...]  # for each parameter among the inputs, its position in operator.params
    num_params: int
    num_starts: int
    on_fail: OnFail

    needs_its_closure = False

    @property
    def num_differentiable_inputs(self) -> int:
        return 1 + self.num_params

    @property
    def num_kept_inputs(self) -> int:
        return 1 + len(self.order)

    @property
    def num_differentiable_outputs(self) -> int:
        return 1

    def _params(self, tensors: Tensors) -> Tensors:
        placed = dict(zip(self.order, tensors))
        return tuple(placed[i] for i in range(len(self.order)))

    def evaluate(self, *inputs: Tensor) -> Tensors:
        b, *rest = inputs
        params = self._params(tuple(rest[: len(self.order)]))
        x0 = rest[-1] if self.num_starts else None
        with without_autocast():
            state = self.solver.init(self.operator.bound(params), b)
            value, *stats, condition = self.solver.compute(state, b, x0)
        if condition is None:
            condition = torch.full_like(stats[1], float("nan"))
        return (value if x0 is None else value.clone(), *stats, condition)

    def _solve(self, operator: LinearOperator, b: Tensor) -> Tensor:
        return solve_vector(self.solver, operator, b, (), self.on_fail)[0]

    def _apply(self, inputs: Tensors, x: Tensor) -> Callable[..., Tensor]:
        """Return p -> A(p) x."""
        constants = inputs[1 + self.num_params : 1 + len(self.order)]

        def apply(*params: Tensor) -> Tensor:
            return self.operator.bind(*self._params((*params, *constants)))[0](x)

        return apply

    def pull_back(self, inputs: Tensors, outputs: Tensors, cotangents: Tensors) -> Tensors:
        params = inputs[1 : 1 + self.num_params]
        operator = replace(self.operator, params=self._params(inputs[1 : 1 + len(self.order)]))
        rhs = self._solve(operator.T, cotangents[0])
        if not params:
            return (rhs,)
        _, pull = linearize(self._apply(inputs, outputs[0]), *params)
        return (rhs, *pull(-rhs))

    def push_forward(self, inputs: Tensors, outputs: Tensors, tangents: Tensors) -> Tensors:
        params = inputs[1 : 1 + self.num_params]
        operator = replace(self.operator, params=self._params(inputs[1 : 1 + len(self.order)]))
        rhs = tangents[0]
        if params:
            rhs = rhs - push_forward(self._apply(inputs, outputs[0]), params, tangents[1:])
        return (self._solve(operator, rhs),)


def push_forward(function: Callable[..., Tensor], primals: Tensors, tangents: Tensors) -> Tensor:
    """Return the Jacobian-vector product of a function with one tensor as its value.

    The vector-Jacobian product c -> Jᴴ c is linear, so its own vector-Jacobian product with v is
    J v. Unlike a nested forward mode, this works inside every transform and for operations
    without forward mode.
    """
    output, pull = linearize(function, *primals)
    _, transpose = linearize(pull, torch.zeros_like(output))
    pushed: Tensor = transpose(tangents)[0]
    return pushed


def solve_once(solver: Solver, operator: BoundOperator, b: Tensor) -> Tensor:
    """Return the solution of A x = b from a solver, with its ridge and without derivatives."""
    mv, rmv, layout, tags = operator.mv, operator.rmv, operator.layout, operator.tags
    solver, system, b = solver.reformulate(LinearOperator(lambda: (mv, rmv), (), layout, tags), b)
    answer: Tensor = solver.compute(solver.init(system.bound(), b), b).value
    return answer
