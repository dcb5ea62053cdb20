# SPDX-License-Identifier: Apache-2.0
"""Nonlinear least squares: trees of residuals, robust losses, bounds."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from torchopt.linear_solve.cg import CG
from torchopt.linear_solve.iterate import iterate, norm
from torchopt.linear_solve.layout import Layout
from torchopt.linear_solve.solver import Solver as LinearSolver
from torchopt.solvers.base import (
    FlatMap,
    Function,
    Outcome,
    Solver,
    SolveResult,
    false_like,
    gradient_norm,
    tree_grad,
)
from torchopt.solvers.normal_equations import (
    Model,
    dense_model,
    linearized,
    matrix_free_model,
)
from torchopt.solvers.robust_loss import LOSSES, RobustLoss
from torchopt.tree import prefix_leaves, tree_leaves
from torchopt.tree_function import max_over_batch

__all__ = ["LeastSquares"]

#: The most unknowns for which the Jacobian is formed without being asked for.
DENSE_LIMIT = 256
#: A step is taken where f falls by this part of what the model promises.
ENOUGH = 1e-4
#: Up to this multiple of rounding of f, the gradient tells whether a step is better.
FLAT = 1e4
#: A minimum is found to rounding where the model promises less than this multiple of it.
ROUNDING = 100.0


@dataclass(frozen=True)
class LeastSquares(Solver):
    """A solver of min f(x, *args) = ½ Σ C² rho(rᵢ(x, *args)² / C²) with lower ≤ x ≤ upper.

    Called with r: `LevenbergMarquardt()(r, start, *args)`. r returns a tree of real tensors, of any
    structure. F is ∇f; at a bound that holds x back it is the distance to the bound. Also solved is
    a point where rounding hides every further decrease: the steps that the model proposes change f
    or x by less than 100 times the rounding of the dtype.

    Where x lies on a bound and ∇f is zero, up to `tol`, the solution has a kink. Its derivative
    does not exist; the linear system is singular then, which is reported.

    Attributes:
        loss: rho: "linear" (ρ(z) = z), "soft_l1", "huber", "cauchy" or "arctan", as in
            `scipy.optimize.least_squares`; or a function of z ≥ 0, element by element, twice
            differentiable, with ρ(0) = 0 and ρ'(0) = 1.
        scale: C > 0, in the unit of r: residuals beyond it are outliers. A number, a 0-dim tensor,
            or a function of *args that returns one and may be differentiated.
        lower: The lower bounds; a start outside of them is moved inside. None, a number, a tensor
            that broadcasts to every leaf of x, or a tree of those that x begins like; or a function
            of *args that returns one and may be differentiated.
        upper: The upper bounds, likewise.
        step_solver: How the linear systems of the steps are solved. "dense": by QR factorisation of
            the Jacobian. "blocks": the same where every leaf of x and of r is `[blocks, ...]`, and
            block i of r depends on block i of x alone; all blocks at once. A solver of
            `torchopt.linear_solve`: by products with J and Jᵀ alone. None: "dense" up to 256
            unknowns, then `CG(rtol=1e-3)`.
    """

    loss: str | RobustLoss = "linear"
    scale: Any = 1.0
    lower: Any = None
    upper: Any = None
    step_solver: Literal["dense", "blocks"] | LinearSolver | None = None

    structure: ClassVar[dict[str, Any]] = {"symmetric": True}

    def __post_init__(self) -> None:
        super().__post_init__()
        named = isinstance(self.loss, str) and self.loss in LOSSES
        if not named and not callable(self.loss):
            raise ValueError(
                f"loss: expected one of {', '.join(map(repr, LOSSES))} or a function of the "
                f"squared residuals, got {self.loss!r}"
            )
        if isinstance(self.scale, (int, float)) and not self.scale > 0:
            raise ValueError(f"scale: expected a number > 0, got {self.scale}")
        solver = self.step_solver
        if solver not in (None, "dense", "blocks") and not isinstance(solver, LinearSolver):
            raise ValueError(
                "step_solver: expected None, 'dense', 'blocks' or a solver of "
                f"torchopt.linear_solve, got {solver!r}"
            )

    # --- the method -------------------------------------------------------------------------------

    #: The most attempts at a step.
    attempts: ClassVar[int] = 40

    @abstractmethod
    def first_control(self, model: Model, x: Tensor) -> Tensor:
        """Return the length, the radius or the damping of the first step, 0-dim."""

    @abstractmethod
    def proposals(self, model: Model) -> FlatMap:
        """Return the map control -> p."""

    @abstractmethod
    def after(self, control: Tensor, ratio: Tensor, p: Tensor, model: Model) -> Tensor:
        """Return the next control, after a step p of which f fell by `ratio` of the promise."""

    @abstractmethod
    def after_failure(self, control: Tensor, count: Tensor, p: Tensor, model: Model) -> Tensor:
        """Return the control after a step that was not taken, the one numbered `count`."""

    # --- the problem ------------------------------------------------------------------------------

    @property
    def rho(self) -> RobustLoss:
        """The loss as a function."""
        return LOSSES[self.loss] if isinstance(self.loss, str) else self.loss

    def residuals(self, value: Any, blocks: int | None = None) -> Tensor:
        """Return the tree of residuals as a vector, block after block if there are blocks.

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
            raise TypeError(f"{what}: expected a tree with at least one tensor, got {value!r}")
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
        """Return ∇f, and the distance to the bound where one holds x back."""
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
            # With the bounds in their place the Jacobian is symmetric.
            free = torch.where(low | high, vector - bound, slope(bound))
            return layout.unravel(torch.where(kink, 0 * vector, free))

        return conditions

    def bounds(self, layout: Layout, x: Tensor, args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        """Return the bounds as vectors like x.

        Raises:
            ValueError: They do not fit x.
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
                    value = torch.as_tensor(value, dtype=dtype, device=x.device)
                    leaves.append(value.expand(shape))
                except (RuntimeError, TypeError) as error:
                    got = tuple(value.shape) if isinstance(value, Tensor) else repr(value)[:40]
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
        """Return the solution, with what is a function of the arguments filled in."""
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

        problem = _Problem(self, residual, scale, layout, blocks, lower, upper)
        return problem.minimum(problem.within(x))

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


@dataclass(frozen=True)
class _Problem:
    """A problem on vectors.

    Attributes:
        solver: The method.
        residual: The map x -> r.
        scale: C.
        layout: Of x.
        blocks: The number of blocks, or None.
        lower: The lower bounds, or None if there are no bounds.
        upper: The upper bounds, likewise.
    """

    solver: LeastSquares
    residual: FlatMap
    scale: Tensor
    layout: Layout
    blocks: int | None
    lower: Tensor | None
    upper: Tensor | None

    def within(self, x: Tensor) -> Tensor:
        """Return the nearest point within the bounds; NaN stays."""
        if self.lower is None or self.upper is None:
            return x
        return torch.minimum(torch.maximum(x, self.lower), self.upper)

    def gradient_and_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return ∇f and f."""

        def value(x: Tensor) -> Tensor:
            z = (self.residual(x) / self.scale) ** 2
            return (self.solver.rho(z) * self.scale**2).sum() / 2

        found: tuple[Tensor, Tensor] = torch.func.grad_and_value(value)(x)
        return found

    def free_gradient(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Return ∇f without what a bound holds back."""
        if self.lower is None or self.upper is None:
            return gradient
        held = ((x <= self.lower) & (gradient > 0)) | ((x >= self.upper) & (gradient < 0))
        return torch.where(held, 0.0, gradient)

    def model(self, x: Tensor, units: Tensor) -> Model:
        """Return the quadratic model at x."""
        here = linearized(self.residual, self.solver.rho, self.scale, x)

        def pin(units: Tensor) -> Tensor:
            """Return which unknowns the step -D⁻² g, that of their diagonal, leads out."""
            ahead = x - here.gradient / units**2
            return self.within(ahead) != ahead

        solver = self.solver.step_solver
        n = x.shape[0]
        if solver is None:
            solver = "dense" if n <= DENSE_LIMIT else CG(rtol=1e-3, on_fail="ignore")
        if isinstance(solver, LinearSolver):
            return matrix_free_model(here, solver, self.layout, units, pin)
        return dense_model(here, self._order(x), units, pin)

    def _order(self, x: Tensor) -> Tensor:
        """Return the places of the unknowns of each block, [blocks, k]."""
        places = torch.arange(x.shape[0], device=x.device)
        if self.blocks is None:
            return places[None]
        parts = places.split(self.layout.sizes)
        return torch.cat([part.reshape(self.blocks, -1) for part in parts], dim=1)

    def minimum(self, x: Tensor) -> Outcome:
        """Return the minimum, from x."""
        solver = self.solver
        gradient, value = self.gradient_and_value(x)
        # No units and no control yet.
        start = (x, value, gradient, torch.zeros_like(x), -torch.ones_like(value), false_like(x))

        def residual(state: tuple[Tensor, ...]) -> Tensor:
            x, value, gradient, *_ = state
            free = self.free_gradient(x, gradient)
            return torch.where(value.isfinite(), free, torch.nan)

        state, count = solver.repeat(self._step, residual, start, lambda s: s[5])
        x, value, gradient, units, _, stalled = state
        size = gradient_norm(value, self.free_gradient(x, gradient))
        if not x.numel():
            return Outcome(x, count, size, stalled)
        with torch.no_grad():
            solved = stalled & self._is_rounding(x, units)
        return Outcome(x, count, size, stalled, solved)

    def _step(self, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the state after one step, found in several attempts."""
        x, value, gradient, units, control, _ = state
        solver, eps = self.solver, torch.finfo(x.dtype).eps
        model = self.model(x, units)
        propose = solver.proposals(model)
        control = torch.where(control < 0, solver.first_control(model, x), control)

        steepness = norm(self.free_gradient(x, gradient) / model.units)

        def attempt(state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            control, count, *_ = state
            ahead = self.within(x + propose(control))
            p = ahead - x
            promise = model.decrease(p)
            slope, there = self.gradient_and_value(ahead)
            ratio = (value - there) / torch.where(promise > 0, promise, 1.0)
            fell = (promise > 0) & (ratio > ENOUGH)
            noise = FLAT * eps * value
            flat = (promise > 0) & (promise <= noise) & (there <= value + noise)
            flatter = norm(self.free_gradient(ahead, slope) / model.units) < steepness
            better = fell | (flat & flatter)
            following = torch.where(
                better,
                solver.after(control, torch.where(fell, ratio, 1.0), p, model),
                solver.after_failure(control, count, p, model),
            )
            return following, count + 1, ahead, there, slope, better

        first = (control, torch.zeros_like(value), x, value, gradient, false_like(x))
        found, _ = iterate(attempt, lambda s: ~s[5], first, solver.attempts, solver.asks(x))
        control, _, *new, better = found
        kept = (torch.where(better, a, b) for a, b in zip(new, (x, value, gradient)))
        return *kept, model.units, control, ~better

    def _is_rounding(self, x: Tensor, units: Tensor) -> Tensor:
        """Return whether the step without damping is as small as rounding of f or of x."""
        model = self.model(x, units)
        eps = torch.finfo(x.dtype).eps
        p = self.within(x + model.damped(torch.full_like(model.here.value, eps))) - x
        small = model.decrease(p) <= ROUNDING * eps * model.here.value
        return small | (norm(model.units * p) <= ROUNDING * eps * norm(model.units * x))


def _called(given: Any, args: tuple[Any, ...]) -> Any:
    return given(*args) if callable(given) else given


def _require_blocks(shapes: Any, blocks: int, what: str) -> None:
    for shape in shapes:
        if not shape or shape[0] != blocks or not blocks:
            raise ValueError(
                f"{what}: expected leaves [blocks, ...] with one number of blocks, at least 1, got "
                f"{', '.join(str(tuple(shape)) for shape in list(shapes)[:4])}"
            )
