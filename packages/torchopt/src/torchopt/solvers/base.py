# SPDX-License-Identifier: Apache-2.0
"""The base class of solvers, which solve a problem and differentiate its solution."""

from __future__ import annotations

import copy
import enum
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from torchopt.diff.closure import require_arguments
from torchopt.diff.engine import Engine
from torchopt.diff.implicit.inner import Implicit
from torchopt.diff.surroundings import Surroundings
from torchopt.diff.twice_differentiable import twice_differentiable
from torchopt.errors import TorchOptError, warn_caller
from torchopt.linear_solve.iterate import iterate, norm
from torchopt.linear_solve.layout import Layout
from torchopt.linear_solve.result import refuse_function
from torchopt.precision import present_autocast, without_autocast
from torchopt.shown import Described
from torchopt.solvers.adjoint import by_another_engine, require_adjoint, require_constants
from torchopt.torch_internals import without_saved_tensor_hooks
from torchopt.tree import is_smooth, tree_flatten, tree_leaves, tree_map, tree_unflatten
from torchopt.tree_function import (
    derivatives_wanted,
    is_transforming,
    max_over_batch,
    plain_entry,
    uncompiled,
)

__all__ = [
    "Outcome",
    "SolveResult",
    "SolveStatus",
    "Solver",
    "SolverError",
    "SolverWarning",
    "report_outcome",
]

OnFail = Literal["raise", "warn", "ignore"]
REMEDY = "Pass it as an argument after the start, or detach it."
Function = Callable[..., Any]
FlatMap = Callable[[Tensor], Tensor]


class SolverError(TorchOptError, RuntimeError):
    """A problem was not solved to the accuracy that was requested."""


class SolverWarning(UserWarning):
    """A problem was not solved to the accuracy that was requested."""


class SolveStatus(enum.IntEnum):
    """How a solve ended; a larger number is worse."""

    CONVERGED = 0
    MAX_ITERATIONS = 1
    STALLED = 2
    NO_BRACKET = 3
    INFEASIBLE = 4
    NON_FINITE = 5

    @property
    def sentence(self) -> str:
        """What happened and what to try."""
        return _SENTENCES[self]


_SENTENCES = {
    SolveStatus.CONVERGED: "The residual met `tol`, or is as small as rounding allows.",
    SolveStatus.MAX_ITERATIONS: (
        "`maxiter` iterations did not bring the residual to `tol`; derivatives are those of "
        "another point. Allow more iterations, loosen `tol`, start closer, or scale the problem."
    ),
    SolveStatus.STALLED: (
        "The line search found no better point before the residual met `tol`. Check that the "
        "objective is smooth and is the one whose gradient is taken; in half precision or float32, "
        "loosen `tol` or solve in float64."
    ),
    SolveStatus.NO_BRACKET: (
        "The function has the same sign at `lower` and `upper`, or changes it by a jump or a pole. "
        "Choose bounds around the root."
    ),
    SolveStatus.INFEASIBLE: (
        "No point satisfies the conditions of Karush, Kuhn and Tucker: the constraints contradict "
        "each other, the objective is unbounded below, or Q is not positive semi-definite. "
        "Check G x <= h and A x = b, or add a small multiple of the identity to Q."
    ),
    SolveStatus.NON_FINITE: (
        "The iteration produced NaN or infinity. Check the arguments and the start; for a fixed "
        "step take a smaller one, for a fixed point a damping."
    ),
}


class SolveResult(NamedTuple):
    """The result of `run`, without derivatives.

    Attributes:
        value: The solution, a tree like the start.
        status: A `SolveStatus` as a 0-dim integer tensor (batched under vmap).
        iterations: The number of iterations, 0-dim.
        residual_norm: ‖F(x)‖₂ of the optimality function of the solver, 0-dim.
    """

    value: Any
    status: Tensor
    iterations: Tensor
    residual_norm: Tensor


class Outcome(NamedTuple):
    """The result of the loop of a solver: vectors and 0-dim tensors.

    Attributes:
        value: The last point x.
        iterations: The number of iterations.
        residual_norm: ‖F(x)‖₂, or the width of a bracket.
        stalled: Whether the loop gave up.
        solved: Whether x counts as a solution whatever the norm, because rounding allows no better
            one.
    """

    value: Tensor
    iterations: Tensor
    residual_norm: Tensor
    stalled: Tensor
    solved: Tensor | bool = False


def report_outcome(status: Tensor, on_fail: OnFail, solver: object) -> None:
    """Raise or warn unless every entry of the batch converged; reads one number from the device.

    Raises:
        SolverError: `on_fail` is "raise" and the solve failed.
    """
    if on_fail == "ignore":
        return
    worst = SolveStatus(int(max_over_batch(status)))
    if worst is SolveStatus.CONVERGED:
        return
    message = f"{solver}: {worst.name}. {worst.sentence}"
    if on_fail == "raise":
        raise SolverError(message)
    warn_caller(message, SolverWarning)


@dataclass(frozen=True)
class Solver(Described, ABC):
    """A method to solve a problem that depends on arguments; its options are fields.

    * `solver(function, start, *args)` returns the solution. It is differentiable with respect to
      every tensor in args, by the equation that it solves and not through the steps: to any order,
      in forward and reverse mode, under autograd and `torch.func`. Under `torch.func.vmap` each
      problem of the batch stops independently. With `adjoint=`, the derivatives are those of
      another engine.
    * `solver.run(function, start, *args)` returns a `SolveResult`, without derivatives.

    Autocast applies to the function, not to the iterations and their derivatives.

    Attributes:
        tol: The largest ‖F(x)‖₂ that counts as solved, >= 0, in the units of F; None: √eps of the
            dtype, 1.5e-8 in float64 and 3.5e-4 in float32.
        maxiter: The largest number of iterations, >= 0.
        check_every: After how many iterations the host checks whether to stop. None: after each
            one on the CPU, after 16 elsewhere. 0: not at all.
        on_fail: What to do with an unconverged answer: "raise", "warn" or "ignore".
        linear_solve: The solver of the linear system of the derivatives, as `solve=` of
            `custom_root`.
        adjoint: The engine that computes the derivatives, without a problem of its own. None or
            `Implicit(...)`: those of the equation. `Explicit()`: those of the iterations, which
            keep their graph. `ZeroOrder(...)`: estimates from whole solutions.
    """

    tol: float | None = None
    maxiter: int = 500
    check_every: int | None = None
    on_fail: OnFail = "warn"
    linear_solve: Callable[..., Any] | None = None
    adjoint: Engine | None = field(default=None, kw_only=True)

    #: The known properties of ∂F/∂x, as keywords of `Implicit.rule`.
    structure: ClassVar[dict[str, Any]] = {}
    differentiates: ClassVar[bool] = False  # whether iterations differentiate the function twice

    def __post_init__(self) -> None:
        refuse_function(self.tol, self, "(function, start, *args)")
        if (self.tol is not None and self.tol < 0) or self.maxiter < 0:
            raise ValueError(
                f"expected tol >= 0 and maxiter >= 0, got tol={self.tol}, maxiter={self.maxiter}"
            )
        if self.on_fail not in ("raise", "warn", "ignore"):
            raise ValueError(f"on_fail: expected 'raise', 'warn' or 'ignore', got {self.on_fail!r}")
        require_adjoint(self.adjoint, self.linear_solve)

    @abstractmethod
    def optimality(self, function: Function) -> Function:
        """Return the function F(x, *args), a tree like x that is zero at the solution."""

    @abstractmethod
    def solve_vector(self, function: Function, layout: Layout, x: Tensor) -> Outcome:
        """Return the solution for one vector.

        Args:
            function: The function of the caller, as a function of the tree x alone.
            layout: Converts between trees and vectors.
            x: The start, a vector.
        """

    @uncompiled
    def run(self, function: Function, start: Any, *args: Any) -> SolveResult:
        """Return the solution with its status, without derivatives.

        Raises:
            NotDifferentiableError: The function depends on a tensor that a transform of torch.func,
                or forward mode, differentiates, since its derivative would be zero.
            SolverError: The solve failed and `on_fail` is "raise".
            TypeError: The start is not a tree of floating-point tensors.
        """
        require_constants((function, args), type(self).__name__)
        return self._run(function, start, args, keep_graph=False)

    def _run(
        self, function: Function, start: Any, args: tuple[Any, ...], keep_graph: bool
    ) -> SolveResult:
        """Return the solution, with the graph of the iterations if `keep_graph` is True."""
        layout = Layout.of(start, f"{type(self).__name__}: start", real=True)
        function = twice_differentiable(function) if self.differentiates else function
        function = present_autocast()(function)
        # Hooks for saved tensors, such as those of a checkpoint, are only for graphs that are kept.
        hooks = nullcontext() if keep_graph else without_saved_tensor_hooks()
        with hooks, without_autocast(), torch.set_grad_enabled(keep_graph):
            x = layout.ravel(tree_map(torch.detach, start))
            found = self.solve_vector(lambda x: function(x, *args), layout, x)
        with torch.no_grad():
            status = self._status(found)
        report_outcome(status, self.on_fail, self)
        value = layout.unravel(found.value.clone())  # it may be the start, or an argument
        return SolveResult(value, status, found.iterations, found.residual_norm)

    def _status(self, found: Outcome) -> Tensor:
        size = found.residual_norm
        failed = torch.where(
            found.stalled, int(SolveStatus.STALLED), int(SolveStatus.MAX_ITERATIONS)
        )
        solved = (size <= self.tolerance(size)) | found.solved
        status = torch.where(solved, int(SolveStatus.CONVERGED), failed)
        finite = size.isfinite() & found.value.isfinite().all()
        return torch.where(finite, status, int(SolveStatus.NON_FINITE))

    @uncompiled
    def __call__(self, function: Function, start: Any, *args: Any) -> Any:
        """Return the solution, differentiable with respect to the tensors in args.

        Raises:
            NotDifferentiableError: The function depends on a tensor that requires a gradient and is
                not an argument.
            TypeError: The start is not a tree of floating-point tensors.
            SolverError: The solve failed and `on_fail` is "raise".
        """
        Layout.of(start, f"{type(self).__name__}: start")
        leaves, spec = tree_flatten(args)
        smooth = [is_smooth(x) for x in leaves]
        chosen = [x for x, flag in zip(leaves, smooth) if flag]
        # Other leaves are passed the same way, so that a vmap applies to them too.
        others = [x for x, flag in zip(leaves, smooth) if not flag]
        options = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {
            k: v for k, v in options.items() if any(isinstance(x, Tensor) for x in tree_leaves(v))
        }

        def filled(chosen: list[Tensor], others: list[Any]) -> Any:
            first, second = iter(chosen), iter(others)
            return tree_unflatten(spec, [next(first if s else second) for s in smooth])

        surroundings = Surroundings((function, self, others), (*chosen, *tree_leaves(start)))
        surroundings.settle()
        function = surroundings.freeze(function)
        if derivatives_wanted():
            known: Any = tree_map(_plain, (chosen, others))
            self._require_no_closure(function, start, filled(*known))
        if not chosen and not is_transforming():
            return self._run(function, start, args, keep_graph=False).value

        if self.adjoint is not None and not isinstance(self.adjoint, Implicit):
            return by_another_engine(
                self, lambda x, keep: self._run(function, start, filled(x, others), keep), chosen
            )

        def optimality(x: Any, chosen: Any, others: Any, tensors: Any) -> Any:
            return self._with(tensors).optimality(function)(x, *filled(chosen, others))

        def solve(start: Any, chosen: Any, others: Any, tensors: Any) -> Any:
            solver = self._with(tensors)
            return solver._run(function, start, filled(chosen, others), keep_graph=False).value

        engine = (self.adjoint or Implicit(solve=self.linear_solve, on_fail="ignore")).rule(
            optimality,
            where=type(self).__name__,
            remedy=REMEDY,
            **self.structure,
        )
        # If nothing is differentiated, the engine is still needed under vmap.
        return engine(solve)(start, chosen or [torch.empty(0)], others, tensors)

    def _with(self, values: dict[str, Any]) -> Solver:
        """Return the solver with other values of fields, without checking them again."""
        if not values:
            return self
        solver = copy.copy(self)
        for name, value in values.items():
            object.__setattr__(solver, name, value)
        return solver

    @without_saved_tensor_hooks()
    def _require_no_closure(self, function: Function, start: Any, args: Any) -> None:
        """Raise if F depends on tensors that are not arguments, whose gradient would be zero."""
        optimality = self.optimality(function)
        start = tree_map(plain_entry, start)
        value = optimality(start, *args)
        require_arguments(value, (start, args), optimality, type(self).__name__, REMEDY)

    def repeat(
        self,
        step: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]],
        residual: Callable[[tuple[Tensor, ...]], Tensor],
        state: tuple[Tensor, ...],
        stalled: Callable[[tuple[Tensor, ...]], Tensor] | None = None,
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Repeat `step` until ‖residual‖ reaches the tolerance; return the state and the count."""

        def active(state: tuple[Tensor, ...]) -> Tensor:
            size = norm(residual(state))
            live = (size > self.tolerance(size)) & size.isfinite()
            return live if stalled is None else live & ~stalled(state)

        return iterate(step, active, state, self.maxiter, self.asks(state[0]))

    def tolerance(self, x: Tensor) -> float:
        """Return `tol`, or its default for the dtype of x."""
        return float(torch.finfo(x.dtype).eps) ** 0.5 if self.tol is None else self.tol

    def asks(self, x: Tensor) -> int:
        """Return after how many iterations the host checks whether to stop."""
        if self.check_every is not None:
            return self.check_every
        return 1 if x.device.type == "cpu" else 16


def _plain(x: Any) -> Any:
    return plain_entry(x) if isinstance(x, Tensor) else x


def gradient_norm(value: Tensor, gradient: Tensor) -> Tensor:
    """Return ‖∇f‖, or NaN if f is not finite, because x is then no minimum for any gradient."""
    return torch.where(value.isfinite(), norm(gradient), torch.nan)


def false_like(x: Tensor) -> Tensor:
    """Return a 0-dim False on the device of x, batched like x."""
    return torch.zeros_like(x.sum(), dtype=torch.bool)
