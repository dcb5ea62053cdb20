# SPDX-License-Identifier: Apache-2.0
"""Stabilised bi-conjugate gradients."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from torchopt.linear_solve.iterate import IterativeSolver, Problem, Run, State, dot, norm, quotient

__all__ = ["BiCGSTAB"]


@dataclass(frozen=True)
class BiCGSTAB(IterativeSolver):
    """Stabilised bi-conjugate gradients, for any non-singular A.

    A step takes two products with A and none with Aᴴ. It needs seven vectors of memory, whatever
    the number of steps. The residual may increase and the recurrence may break down; then use
    GMRES.

    The common options are those of `IterativeSolver`.

    References:
        H. A. van der Vorst, Bi-CGSTAB: A Fast and Smoothly Converging Variant of Bi-CG for the
        Solution of Nonsymmetric Linear Systems, SIAM J. Sci. Stat. Comput. 13, 1992,
        https://doi.org/10.1137/0913035

    Example:
        >>> import torch
        >>> from torchopt.linear_solve import BiCGSTAB, linear_solve
        >>> A = torch.tensor([[4.0, 1.0], [2.0, 3.0]])
        >>> linear_solve(A, torch.tensor([1.0, 2.0]), BiCGSTAB()).value
        tensor([0.1000, 0.6000])
    """

    def run(self, problem: Problem, b: Tensor, x0: Tensor | None) -> Run:
        """Return the last iterate, the number of iterations, and no condition number."""
        A, P = problem.operator.mv, problem.precondition.apply
        x0, shadow = problem.residual(b, x0)

        def step(state: State) -> State:
            x, r, p, rho = state
            p_hat = P(p)
            v = A(p_hat)
            alpha = quotient(rho, dot(shadow, v))
            s = r - alpha * v
            s_hat = P(s)
            t = A(s_hat)
            omega = quotient(dot(t, s), dot(t, t))
            r = s - omega * t
            new_rho = dot(shadow, r)
            beta = quotient(new_rho, rho) * quotient(alpha, omega)
            return x + alpha * p_hat + omega * s_hat, r, r + beta * (p - omega * v), new_rho

        start = (x0, shadow, shadow, dot(shadow, shadow))
        state, count = problem.iterate(step, lambda s: norm(s[1]), start)
        return state[0], count, None
