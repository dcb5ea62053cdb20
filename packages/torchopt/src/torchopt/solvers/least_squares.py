# SPDX-License-Identifier: Apache-2.0
"""Nonlinear least squares: trees of residuals, robust losses, bounds."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from torchopt.linear_solve.layout import Layout
from torchopt.linear_solve.solver import Solver as LinearSolver
from torchopt.shown import shown
from torchopt.solvers.base import (
    FlatMap,
    Function,
    Outcome,
    Solver,
    SolveResult,
)
from torchopt.solvers.least_squares_loop import Loop
from torchopt.solvers.normal_equations import Model
from torchopt.solvers.objective import tree_grad
from torchopt.solvers.robust_loss import LOSSES, RobustLoss
from torchopt.tree import prefix_leaves, tree_leaves
from torchopt.tree_function import max_over_batch

__all__ = ["LeastSquares"]


@dataclass(frozen=True)
class LeastSquares(Solver):
    """A solver of min f(x, *args) = ½ Σ C² rho(rᵢ(x, *args)² / C²) with lower ≤ x ≤ upper.

    Call it with r, as in `LevenbergMarquardt()(r, start, *args)`. r returns a tree of real tensors
    of any structure. F is ∇f; at an active bound it is the distance to the bound. A point also
    counts as solved if rounding hides any further decrease: the proposed steps change f or x by
    less than 100 times the eps of the dtype.

    If x lies on a bound and ∇f is zero, up to `tol`, the solution has a kink and no derivative. The
    linear system is then singular, which is reported.

    Attributes:
        loss: rho: "linear" (ρ(z) = z), "soft_l1", "huber", "cauchy" or "arctan", as in
            `scipy.optimize.least_squares`; or a function of z ≥ 0 that acts element by element and
            is twice differentiable, with ρ(0) = 0 and ρ'(0) = 1.
        scale: C > 0, in the units of r; larger residuals are outliers. A number, a 0-dim tensor, or
            a function of *args that returns one and is differentiated.
        lower: The lower bounds; a start outside the bounds is moved inside. None, a number, a
            tensor that broadcasts to all leaves of x, or a tree of those that is a prefix of x; or
            a function of *args that returns one and is differentiated.
        upper: The upper bounds, likewise.
        step_solver: How the linear systems of the steps are solved. "dense": by a QR factorisation
            of the Jacobian. "blocks": the same for all blocks together, if all leaves of x and r
            are `[blocks, ...]` and block i of r depends only on block i of x. A solver of
            `torchopt.linear_solve`: by products with J and Jᵀ only. None: "dense" up to 256
            unknowns, then `CG(rtol=1e-3)`.
    """

    loss: str | RobustLoss = "linear"
    scale: Any = 1.0
    lower: Any = None
    upper: Any = None
    step_solver: Literal["dense", "blocks"] | LinearSolver | None = None

    structure: ClassVar[dict[str, Any]] = {"symmetric": True}
    differentiates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        named = isinstance(self.loss, str) and self.loss in LOSSES
        if not named and not callable(self.loss):
            raise ValueError(
                f"loss: expected one of {', '.join(map(repr, LOSSES))} or a function of the "
                f"squared residuals, got {shown(self.loss)}"
            )
        if isinstance(self.scale, (int, float)) and not self.scale > 0:
            raise ValueError(f"scale: expected a number > 0, got {self.scale}")
        solver = self.step_solver
        if solver not in (None, "dense", "blocks") and not isinstance(solver, LinearSolver):
            raise ValueError(
                "step_solver: expected None, 'dense', 'blocks' or a solver of "
                f"torchopt.linear_solve, got {shown(solver)}"
            )

    # --- the method -------------------------------------------------------------------------------

    #: The largest number of attempts at a step.
    attempts: ClassVar[int] = 40

    @abstractmethod
    def first_control(self, model: Model, x: Tensor) -> Tensor:
        """Return the length, the radius or the damping of the first step, 0-dim."""

    @abstractmethod
    def proposals(self, model: Model) -> FlatMap:
        """Return the map from the control to the step p."""

    @abstractmethod
    def after(self, control: Tensor, ratio: Tensor, p: Tensor, model: Model) -> Tensor:
        """Return the next control after a step p that decreased f by `ratio` of the prediction."""

    @abstractmethod
    def after_failure(self, control: Tensor, count: Tensor, p: Tensor, model: Model) -> Tensor:
        """Return the control after the failed attempt number `count`."""

    # --- the problem ------------------------------------------------------------------------------

    @property
    def rho(self) -> RobustLoss:
        """The loss as a function."""
        return LOSSES[self.loss] if isinstance(self.loss, str) else self.loss

    def residuals(self, value: Any, blocks: int | None = None) -> Tensor:
        """Return the tree of residuals as a vector, sorted by blocks if there are any.

        Raises:
            TypeError: A leaf is not a tensor of real numbers.
            ValueError: A leaf is not `[blocks, ...]`.
        """
        what = f"{type(self).__name__}: value of the function"
        leaves = tree_leaves(value)
        for leaf in leaves:
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
                got = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
                raise TypeError(
                    f"{what}: expected a tree of floating-point residuals, got {got}; return the "
                    "real and the imaginary part of a complex residual"
                )
        if not leaves:
            raise TypeError(f"{what}: expected a tree with at least one tensor, got {shown(value)}")
        if blocks is None:
            return torch.cat([leaf.reshape(leaf.numel()) for leaf in leaves])
        _require_blocks([leaf.shape for leaf in leaves], blocks, what)
        return torch.cat([leaf.reshape(blocks, -1) for leaf in leaves], dim=1).flatten()

    def objective(self, function: Function) -> Function:
        """Return f."""

        def value(x: Any, *args: Any) -> Tensor:
            r = self.residuals(function(x, *args))
            scale = _called(self.scale, args)
            total: Tensor = (self.rho((r / scale) ** 2) * scale**2).sum() / 2
            return total

        return value

    def optimality(self, function: Function) -> Function:
        """Return ∇f, replaced by the distance to the bound where a bound is active."""
        gradient = tree_grad(self.objective(function))
        if self.lower is None and self.upper is None:
            return gradient

        def conditions(x: Any, *args: Any) -> Any:
            layout = Layout.of(x, f"{type(self).__name__}: solution")
            vector = layout.ravel(x)
            lower, upper = self.bounds(layout, vector, args)

            def slope(v: Tensor) -> Tensor:
                return layout.ravel(gradient(layout.unravel(v), *args))

            at = vector.detach()
            g = slope(at).detach()
            low, high = at <= lower.detach(), at >= upper.detach()
            kink = (low | high) & (g.abs() <= self.tolerance(at)) & (lower < upper).detach()
            low, high = low & (g >= 0), high & (g <= 0) & ~low
            bound = torch.where(low, lower, torch.where(high, upper, vector))
            # The gradient is taken at `bound`, which makes the Jacobian symmetric.
            free = torch.where(low | high, vector - bound, slope(bound))
            return layout.unravel(torch.where(kink, 0 * vector, free))

        return conditions

    def bounds(self, layout: Layout, x: Tensor, args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        """Return the bounds as vectors like x.

        Raises:
            ValueError: The bounds do not broadcast to x, or a lower bound exceeds an upper one.
            TypeError: The unknowns are complex.
        """
        found = []
        for name, given, default in (
            ("lower", _called(self.lower, args), -torch.inf),
            ("upper", _called(self.upper, args), torch.inf),
        ):
            what = f"{type(self).__name__}: {name}"
            if any(dtype.is_complex for dtype in layout.dtypes):
                raise TypeError(f"{what}: expected real unknowns, got complex ones")
            values = prefix_leaves(given, layout.unravel(x), what)
            leaves = []
            for value, shape, dtype in zip(values, layout.shapes, layout.dtypes):
                try:
                    value = default if value is None else value
                    if isinstance(value, Tensor) and value.is_complex():
                        raise TypeError("complex")
                    value = torch.as_tensor(value, dtype=dtype, device=x.device)
                    leaves.append(value.expand(shape))
                except (RuntimeError, TypeError) as error:
                    got: Any = repr(value)[:40]
                    if isinstance(value, Tensor):
                        got = value.dtype if value.is_complex() else tuple(value.shape)
                    raise ValueError(
                        f"{what}: expected numbers, or tensors that broadcast to the shape "
                        f"{tuple(shape)} of the start, got {got}"
                    ) from error
            found.append(layout.join(leaves))
        lower, upper = found
        if int(max_over_batch((lower > upper).any().long())):
            raise ValueError(
                f"{type(self).__name__}: lower, upper: expected lower <= upper everywhere, got "
                "bounds that leave no point; exchange them, or leave one out"
            )
        return lower, upper

    # --- the loop ---------------------------------------------------------------------------------

    def _run(
        self, function: Function, start: Any, args: tuple[Any, ...], keep_graph: bool
    ) -> SolveResult:
        """Return the solution after evaluating the options that are functions of the arguments."""
        names = [name for name in ("scale", "lower", "upper") if callable(getattr(self, name))]
        known = self._with({name: getattr(self, name)(*args) for name in names})
        return Solver._run(known, function, start, args, keep_graph)

    def solve_vector(self, function: Function, layout: Layout, x: Tensor) -> Outcome:
        """Return the minimum for one vector."""
        lower, upper = self.bounds(layout, x, ()) if self._is_bounded else (None, None)
        blocks = self._blocks(layout)
        scale = torch.as_tensor(self.scale, dtype=x.dtype, device=x.device)

        def residual(x: Tensor) -> Tensor:
            return self.residuals(function(layout.unravel(x)), blocks).to(x.dtype)

        loop = Loop(self, residual, scale, layout, blocks, lower, upper)
        return loop.minimum(loop.within(x))

    @property
    def _is_bounded(self) -> bool:
        return self.lower is not None or self.upper is not None

    def _blocks(self, layout: Layout) -> int | None:
        """Return the number of blocks, or None."""
        if self.step_solver != "blocks":
            return None
        what = f"{type(self).__name__}: start: step_solver='blocks'"
        blocks = layout.shapes[0][0] if layout.shapes[0] else 0
        _require_blocks(layout.shapes, blocks, what)
        return blocks


def _called(given: Any, args: tuple[Any, ...]) -> Any:
    return given(*args) if callable(given) else given


def _require_blocks(shapes: Any, blocks: int, what: str) -> None:
    for shape in shapes:
        if not shape or shape[0] != blocks or not blocks:
            raise ValueError(
                f"{what}: expected leaves [blocks, ...] with one number of blocks, at least 1, got "
                f"{', '.join(str(tuple(shape)) for shape in list(shapes)[:4])}"
            )
