# SPDX-License-Identifier: Apache-2.0
"""Fixed points: plain iteration, Anderson's mixing, Broyden's method."""

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
    """x + damping (T(x) - x), repeated: converges where T is a contraction.

    Attributes:
        damping: In (0, 1]; 1 is the plain iteration.
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
    """Anderson's mixing: the next point is the combination of the last ones whose residual is
    least.

    On a linear T it is GMRES in disguise, and exact after n + 1 evaluations with history ≥ n.

    Attributes:
        history: Differences that are kept, at least 1.
        damping: How much of the combined residual is added, in (0, 1].
        ridge: Regularises the small least-squares problem, relative to its trace; at least ten
            times the rounding of the dtype is used.

    References:
        Walker, Ni, Anderson acceleration for fixed-point iterations, 2011, equation 2.1.

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
    """Broyden's method on T(x) - x, with the inverse Jacobian as -I and updates of rank one.

    Attributes:
        history: Updates that are kept, two vectors each; the oldest is dropped.

    References:
        Broyden, A class of methods for solving nonlinear simultaneous equations, 1965, the first
        ("good") update.
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
