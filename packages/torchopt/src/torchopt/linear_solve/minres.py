# SPDX-License-Identifier: Apache-2.0
"""Minimal residuals for symmetric operators."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchopt.linear_solve.condition import condition_of_tridiagonal
from torchopt.linear_solve.iterate import IterativeSolver, Problem, Run, State, dot, norm, quotient

__all__ = ["MINRES"]


@dataclass(frozen=True)
class MINRES(IterativeSolver):
    """Minimal residuals, for Hermitian A that may be indefinite. M must be positive definite.

    A step takes one product with A. The Lanczos matrix is reduced to triangular form by Givens
    rotations, as in section 6.2 of the reference. The residual vector is updated in each step, so
    that the iteration stops by ‖b - A x‖ also with a preconditioner.

    The common options are those of `IterativeSolver`.

    References:
        C. C. Paige, M. A. Saunders, Solution of Sparse Indefinite Systems of Linear Equations, SIAM
        J. Numer. Anal. 12, 1975, https://doi.org/10.1137/0712047

    Example:
        >>> import torch
        >>> from torchopt.linear_solve import MINRES, linear_solve
        >>> A = torch.tensor([[4.0, 1.0], [1.0, -3.0]])  # indefinite
        >>> linear_solve(A, torch.tensor([1.0, 2.0]), MINRES()).value
        tensor([ 0.3846, -0.5385])
    """

    def run(self, problem: Problem, b: Tensor, x0: Tensor | None) -> Run:
        """Return the last iterate, the number of iterations and the condition number or None."""
        A, P = problem.operator.mv, problem.precondition.apply
        x0, r = problem.residual(b, x0)
        z = P(r)
        beta = torch.sqrt(dot(r, z).real) if r.is_complex() else torch.sqrt(dot(r, z))
        beta = beta.to(r.dtype)
        zero, none = torch.zeros_like(beta), torch.zeros_like(r)
        one = torch.ones_like(beta)
        # (x, residual | Lanczos: previous u, u, scaled z = M u, beta | c, s of the last two
        # rotations | the last two directions w, and A w for both | phi: the part of the right-hand
        # side still to be reduced, the diagonal entry of the Lanczos matrix)
        v = quotient(r, beta)
        start: State = (x0, r, none, v, quotient(z, beta), zero, one, zero, one, zero)
        start = (*start, none, none, none, none, beta, zero)

        def step(state: State) -> State:
            x, r, v_old, v, z, beta, c_old, s_old, c, s, w_old, w, Aw_old, Aw, phi, _ = state
            Az = A(z)
            alpha = dot(z, Az)
            v_new = Az - alpha * v - beta * v_old
            z_new = P(v_new)
            squared = dot(v_new, z_new)
            length = torch.sqrt(torch.clamp(squared.real if r.is_complex() else squared, min=0))
            length = length.to(r.dtype)
            # Apply the old rotations to the column (beta, alpha, length) of the tridiagonal matrix.
            epsilon = s_old * beta
            delta = c * (c_old * beta) + s * alpha
            gamma = c * alpha - s * (c_old * beta)
            rho = torch.sqrt(gamma * gamma + length * length)
            c_new, s_new = quotient(gamma, rho), quotient(length, rho)
            w_new = quotient(z - delta * w - epsilon * w_old, rho)
            Aw_new = quotient(Az - delta * Aw - epsilon * Aw_old, rho)
            tau = c_new * phi
            return (
                x + tau * w_new,
                r - tau * Aw_new,
                v,
                quotient(v_new, length),
                quotient(z_new, length),
                length,
                c,
                s,
                c_new,
                s_new,
                w,
                w_new,
                Aw,
                Aw_new,
                -s_new * phi,
                alpha,
            )

        recorder = problem.recorder(lambda s: (s[15], s[5]))
        state, count = problem.iterate(step, lambda s: norm(s[1]), start, recorder)
        if recorder is None or not recorder.rows:
            return state[0], count, None
        return state[0], count, condition_of_tridiagonal(*recorder.columns())
