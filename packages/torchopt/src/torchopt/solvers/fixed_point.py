# SPDX-License-Identifier: Apache-2.0
"""Fixed points: plain iteration, Anderson mixing, Broyden's method."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchopt.linear_solve.iterate import dot, norm, quotient, wide
from torchopt.solvers.base import FlatMap, Outcome, false_like
from torchopt.solvers.kinds import FixedPointSolver

__all__ = ["Anderson", "Broyden", "FixedPointIteration"]

State = tuple[Tensor, ...]


def _push(rows: Tensor, row: Tensor) -> Tensor:
    return torch.cat([row[None], rows[:-1]])


def _outcome(state: State, count: Tensor) -> Outcome:
    return Outcome(state[0], count, norm(state[1]), false_like(state[0]))


@dataclass(frozen=True)
class FixedPointIteration(FixedPointSolver):
    """The iteration x ← x + damping (T(x) - x), which converges if T is a contraction.

    The common options are those of `Solver`.

    Attributes:
        damping: The factor of the step, in (0, 1]; 1 is the iteration without damping.

    Example:
        >>> import torch
        >>> from torchopt.solvers import FixedPointIteration
        >>> a = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
        >>> x = FixedPointIteration()(lambda x, a: (x + a / x) / 2, torch.ones_like(a), a)
        >>> x.backward()
        >>> round(x.item(), 6), round(a.grad.item(), 6)  # sqrt(a), 1 / (2 sqrt(a))
        (2.0, 0.25)
    """

    damping: float = 1.0

    def iterate(self, step: FlatMap, x: Tensor) -> Outcome:
        """Return the fixed point of a function of one vector."""

        def advance(state: State) -> State:
            x = state[0] + self.damping * state[1]
            return x, step(x) - x

        return _outcome(*self.repeat(advance, lambda s: s[1], (x, step(x) - x)))


@dataclass(frozen=True)
class Anderson(FixedPointSolver):
    """Anderson mixing: the next point is the combination of the last ones with least residual.

    For a linear T it is equivalent to GMRES, and exact after n + 1 evaluations if history ≥ n.

    The common options are those of `Solver`.

    Attributes:
        history: How many differences are kept, >= 1.
        damping: The share of the combined residual that is added, in (0, 1].
        ridge: The regularization of the small least-squares problem, relative to its trace; at
            least ten times the eps of the dtype is used.

    References:
        H. F. Walker, P. Ni, Anderson Acceleration for Fixed-Point Iterations, SIAM J. Numer. Anal.
        49, 2011, https://doi.org/10.1137/10078356X, equation 2.1

    Example:
        >>> import torch
        >>> from torchopt.solvers import Anderson
        >>> a = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        >>> x = Anderson()(lambda x, a: torch.cos(a * x), torch.zeros_like(a), a)
        >>> x.backward()
        >>> x.item(), a.grad.item()  # -x sin(a x) / (1 + a sin(a x))
        (0.5149..., -0.1626...)
    """

    history: int = 5
    damping: float = 1.0
    ridge: float = 1e-12

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.history < 1:
            raise ValueError(f"history: expected at least 1, got {self.history}")

    def iterate(self, step: FlatMap, x: Tensor) -> Outcome:
        """Return the fixed point of a function of one vector."""
        ridge = max(self.ridge, 10 * torch.finfo(x.dtype).eps)
        eye = torch.eye(self.history, dtype=wide(x).dtype, device=x.device)

        def advance(state: State) -> State:
            x, f, dX, dF = state
            rows = wide(dF)  # LAPACK has no half precision
            gram = rows.conj() @ rows.mT
            trace = gram.diagonal().real.sum() if gram.is_complex() else gram.diagonal().sum()
            shift = torch.where(trace > 0, ridge * trace, torch.ones_like(trace))
            gamma = torch.linalg.solve_ex(gram + shift * eye, rows.conj() @ wide(f))[0].to(x.dtype)
            new = x + self.damping * f - (dX + self.damping * dF).mT @ gamma
            residual = step(new) - new
            return new, residual, _push(dX, new - x), _push(dF, residual - f)

        none = torch.zeros_like(x).expand(self.history, -1).clone()
        start = (x, step(x) - x, none, none)
        return _outcome(*self.repeat(advance, lambda s: s[1], start))


@dataclass(frozen=True)
class Broyden(FixedPointSolver):
    """Broyden's method for T(x) - x; the inverse Jacobian starts as -I and gets rank-one updates.

    The common options are those of `Solver`.

    Attributes:
        history: How many updates are kept, two vectors each; the oldest is dropped.

    References:
        C. G. Broyden, A Class of Methods for Solving Nonlinear Simultaneous Equations, Math. Comp.
        19, 1965, https://doi.org/10.1090/S0025-5718-1965-0198670-6, the first ("good") update

    Example:
        >>> import torch
        >>> from torchopt.solvers import Broyden
        >>> a = torch.tensor(1.0, dtype=torch.float64)
        >>> x = Broyden()(lambda x, a: torch.cos(a * x), torch.zeros_like(a), a)
        >>> round(x.item(), 4)
        0.7391
    """

    history: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.history < 1:
            raise ValueError(f"history: expected at least 1, got {self.history}")

    def iterate(self, step: FlatMap, x: Tensor) -> Outcome:
        """Return the fixed point of a function of one vector."""

        def advance(state: State) -> State:
            x, g, U, V = state  # the inverse Jacobian is H = -I + Σ u vᴴ

            def apply(v: Tensor) -> Tensor:
                product: Tensor = U.mT @ (V.conj() @ v)
                return product - v

            dx = -apply(g)
            new = x + dx
            residual = step(new) - new
            dg = residual - g
            v = V.mT @ (U.conj() @ dx) - dx  # Hᴴ dx
            u = quotient(dx - apply(dg), dot(v, dg))
            return new, residual, _push(U, u), _push(V, v)

        none = torch.zeros_like(x).expand(self.history, -1).clone()
        start = (x, step(x) - x, none, none)
        return _outcome(*self.repeat(advance, lambda s: s[1], start))
