# SPDX-License-Identifier: Apache-2.0
"""The settings of an implicit engine: the equation, its tags, the solver, and the tolerance."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from torch import Tensor

from torchopt.diff.implicit.certificate import GradientReport
from torchopt.linear_solve.auto import Auto
from torchopt.linear_solve.callable import as_solver
from torchopt.linear_solve.operator import LinearOperator, Tag
from torchopt.linear_solve.result import Stats
from torchopt.linear_solve.solver import Solver, solve_vector
from torchopt.linear_solve.warm_start import WarmStart

__all__ = ["WHERE", "Settings", "solve_system", "with_condition"]

WHERE = "custom_root(optimality_fn)(solver_fn)(*args)"


@dataclass(frozen=True)
class Settings:
    """The fields of `ImplicitEngine`; see there."""

    optimality_fn: Callable[..., Any]
    argnums: tuple[int, ...]
    has_aux: bool = False
    solve: Callable[..., Any] = field(default_factory=lambda: Auto(on_fail="warn"))
    symmetric: bool = False
    positive_definite: bool = False
    diagonal: bool = False
    polish: int = 0
    tol: float | None = None
    on_fail: Literal["raise", "warn", "unroll", "ignore"] = "warn"
    report: Callable[[GradientReport], Any] | None = None

    where: str = field(default=WHERE, repr=False)
    remedy: str = field(
        default="Pass it as an argument of solver_fn, with its position in argnums, or detach it.",
        repr=False,
    )

    def __post_init__(self) -> None:
        if not all(isinstance(i, int) for i in self.argnums):
            raise TypeError(
                "argnums: expected the position of an argument of solver_fn, or a tuple of "
                f"positions, got {self.argnums!r:.60}"
            )
        if not self.argnums or any(i == 0 for i in self.argnums):
            raise AssertionError(
                "argnums: expected positions of arguments of solver_fn other than 0, which is the "
                f"start of the solver and does not determine the solution; got {self.argnums}"
            )
        if any(i < 0 for i in self.argnums):
            raise ValueError(f"argnums: expected positions counted from 0, got {self.argnums}")
        if self.polish < 0:
            raise ValueError(f"polish: expected a count >= 0, got {self.polish}")
        if self.on_fail not in ("raise", "warn", "unroll", "ignore"):
            raise ValueError(
                f"on_fail: expected 'raise', 'warn', 'unroll' or 'ignore', got {self.on_fail!r}"
            )

        self._require_one_equation()

    def _require_one_equation(self) -> None:
        if not getattr(self.solve, "is_stochastic", False):
            return
        named = {"polish": self.polish or None, "tol": self.tol, "report": self.report}
        for name in (k for k, x in named.items() if x is not None):
            raise ValueError(
                f"{name}: expected none with {type(self.solve).__name__}, which draws new random "
                "numbers in each evaluation of the equation; solve by CG() or another "
                "deterministic solver, which uses the random numbers of the end of the inner loop."
            )

    @functools.cached_property
    def solver(self) -> Solver:
        """`solve` as a solver."""
        return as_solver(self.solve)

    @property
    def known_tags(self) -> frozenset[Tag]:
        """The known properties of ∂F/∂x."""
        tags = set()
        if self.symmetric or self.positive_definite:
            tags.add(Tag.SYMMETRIC)
        if self.positive_definite:
            tags.add(Tag.POSITIVE_DEFINITE)
        if self.diagonal:
            tags.add(Tag.DIAGONAL)
        return frozenset(tags)

    def linear(self, operator: LinearOperator, b: Tensor) -> Tensor:
        """Return A⁻¹ b."""
        solver = self.solver
        return solve_system(solver, operator, b, solver.failure)[0]


def with_condition(solver: Solver) -> Solver:
    """Return the solver with its estimate of the condition number on, if it has one."""
    if isinstance(solver, WarmStart):
        return replace(solver, solver=with_condition(solver.solver))
    if any(f.name == "estimate_condition" for f in fields(solver)):
        return replace(solver, estimate_condition=True)  # type: ignore[call-arg]  # checked above
    return solver


def solve_system(
    solver: Solver, operator: LinearOperator, b: Tensor, on_fail: Literal["raise", "warn", "ignore"]
) -> tuple[Tensor, Stats, Tensor]:
    """Return A⁻¹ b, the statistics and the status of the solve."""
    start = solver.start(operator.layout)
    starts = () if start is None else (start,)
    solver, operator, b = solver.reformulate(operator, b)
    return solve_vector(solver, operator, b, starts, on_fail)
