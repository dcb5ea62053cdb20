# SPDX-License-Identifier: Apache-2.0
"""LSMR: minimal residuals for the normal equations, without forming them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchopt.linear_solve.condition import condition_of_bidiagonal
from torchopt.linear_solve.iterate import (
    IterativeSolver,
    Problem,
    Run,
    State,
    norm,
    quotient,
    safe_norm,
    unit,
    wide,
)
from torchopt.linear_solve.result import Status
from torchopt.linear_solve.solver import Computed

__all__ = ["LSMR"]


@dataclass(frozen=True)
class LSMR(IterativeSolver):
    """LSMR, for any A; for a singular A it tends to the least-squares solution.

    Without rounding the iterates are those of MINRES for AᴴA x = Aᴴ b. They are computed from
    the Golub-Kahan bidiagonalisation of A, which loses fewer digits than the squared operator. A
    step takes one product with A and one with Aᴴ.

    It is preconditioned from the right and stops by the true ‖b - A x‖, whose residual vector is
    updated in each step. If the residual does not vanish because b is not in the range of A, the
    status is SINGULAR and the value is the least-squares solution.

    The common options are those of `IterativeSolver`.

    References:
        D. C.-L. Fong, M. Saunders, LSMR: An Iterative Algorithm for Sparse Least-Squares Problems,
        SIAM J. Sci. Comput. 33, 2011, https://doi.org/10.1137/10079687X

    Example:
        >>> import torch
        >>> from torchopt.linear_solve import LSMR, linear_solve
        >>> A = torch.tensor([[4.0, 1.0], [2.0, 3.0]])
        >>> linear_solve(A, torch.tensor([1.0, 2.0]), LSMR()).value
        tensor([0.1000, 0.6000])
    """

    def compute(self, state: Problem, b: Tensor, x0: Tensor | None = None) -> Computed:
        """Return the solution for one vector b."""
        found = super().compute(state, b, x0)
        # If ‖Aᴴ r‖ = 0 but r ≠ 0, the remainder of b is outside the range of A.
        adjoint = state.operator.rmv
        scale = unit(wide(b))
        b, x = wide(b) / scale, wide(found.value) / scale
        gradient = safe_norm(adjoint(b - state.operator.mv(x)))
        least = gradient <= 1e3 * state.eps * safe_norm(adjoint(b))
        unsolved = found.status == int(Status.MAX_ITERATIONS)
        status = torch.where(unsolved & least, int(Status.SINGULAR), found.status)
        return found._replace(status=status)

    def run(self, problem: Problem, b: Tensor, x0: Tensor | None) -> Run:
        """Return the last iterate, the number of iterations and the condition number or None."""
        A, At = problem.operator.mv, problem.operator.rmv
        P, Pt = problem.precondition.apply, problem.precondition.adjoint
        x0, r = problem.residual(b, x0)
        beta = norm(r).to(r.dtype)
        u = quotient(r, beta)
        v = Pt(At(u))
        alpha = norm(v).to(r.dtype)
        v = quotient(v, alpha)
        one, zero, none = torch.ones_like(beta), torch.zeros_like(beta), torch.zeros_like(r)
        # (x, residual, u, v | directions h, A h, h̄, A h̄ | alpha, ᾱ, ζ̄, ρ, ρ̄, c̄, s̄, θ / ρ | beta)
        # Until the end, x is P⁻¹ (x - x0).
        start: State = (none, r, u, v, none, none, none, none)
        start = (*start, alpha, alpha, alpha * beta, one, one, one, zero, zero, beta)

        def step(state: State) -> State:
            x, r, u, v, h, Ah, h_bar, Ah_bar, *scalars, _ = state
            alpha, alpha_bar, zeta_bar, rho_old, rho_bar_old, c_bar, s_bar, ratio = scalars
            Av = A(P(v))
            h, Ah = v - ratio * h, Av - ratio * Ah
            u = Av - alpha * u
            beta = norm(u).to(r.dtype)
            u = quotient(u, beta)
            v = Pt(At(u)) - beta * v
            alpha = norm(v).to(r.dtype)
            v = quotient(v, alpha)
            rho = torch.sqrt(alpha_bar * alpha_bar + beta * beta)
            c, s = quotient(alpha_bar, rho), quotient(beta, rho)
            theta, alpha_bar = s * alpha, c * alpha
            theta_bar, rho_temp = s_bar * rho, c_bar * rho
            rho_bar = torch.sqrt(rho_temp * rho_temp + theta * theta)
            c_bar, s_bar = quotient(rho_temp, rho_bar), quotient(theta, rho_bar)
            zeta, zeta_bar = c_bar * zeta_bar, -s_bar * zeta_bar
            back = quotient(theta_bar * rho, rho_old * rho_bar_old)
            h_bar, Ah_bar = h - back * h_bar, Ah - back * Ah_bar
            tau = quotient(zeta, rho * rho_bar)
            x, r = x + tau * h_bar, r - tau * Ah_bar
            ratio = quotient(theta, rho)
            scalars = [alpha, alpha_bar, zeta_bar, rho, rho_bar, c_bar, s_bar, ratio]
            return (x, r, u, v, h, Ah, h_bar, Ah_bar, *scalars, beta)

        def remaining(state: State) -> Tensor:
            # ‖Aᴴ r‖ = |ζ̄|; below rounding, the residual is as small as it can be.
            gradient = state[10].abs()
            first = start[10].abs()
            floor = 4 * torch.finfo(gradient.dtype).eps * first
            size = norm(state[1])
            return torch.where(gradient > floor, size, torch.zeros_like(size))

        recorder = problem.recorder(lambda s: (s[8], s[16]))
        state, count = problem.iterate(step, remaining, start, recorder)
        x = x0 + P(state[0])
        if recorder is None or not recorder.rows:
            return x, count, None
        live, alphas, betas = recorder.columns()
        first = alpha.real if alpha.is_complex() else alpha
        diagonal = torch.cat([first[None], alphas[:-1]])
        return x, count, condition_of_bidiagonal(live, diagonal, betas)
