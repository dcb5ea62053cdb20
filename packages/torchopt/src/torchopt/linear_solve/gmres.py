# SPDX-License-Identifier: Apache-2.0
"""Restarted GMRES."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchopt.linear_solve.condition import condition_of_singular_values, finite_or_zero
from torchopt.linear_solve.iterate import IterativeSolver, Problem, Run, State, norm, quotient

__all__ = ["GMRES"]


@dataclass(frozen=True)
class GMRES(IterativeSolver):
    """Generalised minimal residuals with restarts, for any non-singular A.

    It is preconditioned from the right, so it minimises the true residual. There are at most
    `maxiter` cycles, each with `restart` products and `restart` vectors in memory; if `restart` is
    at least n, the first cycle is exact. The Arnoldi basis is orthogonalised twice.

    The common options are those of `IterativeSolver`.

    Attributes:
        restart: The number of products in a cycle, >= 1.

    References:
        Y. Saad, M. H. Schultz, GMRES: A Generalized Minimal Residual Algorithm for Solving
        Nonsymmetric Linear Systems, SIAM J. Sci. Stat. Comput. 7, 1986,
        https://doi.org/10.1137/0907058

    Example:
        >>> import torch
        >>> from torchopt.linear_solve import GMRES, linear_solve
        >>> A = torch.tensor([[4.0, 1.0], [2.0, 3.0]])
        >>> linear_solve(A, torch.tensor([1.0, 2.0]), GMRES(restart=2)).value
        tensor([0.1000, 0.6000])
    """

    restart: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.restart < 1:
            raise ValueError(f"restart: expected at least 1, got {self.restart}")

    def run(self, problem: Problem, b: Tensor, x0: Tensor | None) -> Run:
        """Return the last iterate, the number of cycles and the condition number or None."""
        A, P = problem.operator.mv, problem.precondition.apply
        steps = min(self.restart, problem.operator.size)

        def cycle(state: State) -> State:
            x, r, condition = state
            beta = norm(r)
            basis, hessenberg = arnoldi(lambda v: A(P(v)), quotient(r, beta.to(r.dtype)), steps)
            first = torch.zeros_like(hessenberg[:, 0])
            first = torch.cat([beta.to(r.dtype).reshape(1), first[1:]])
            # After a breakdown the last columns are zero; the least-norm solution ignores them.
            clean, finite = finite_or_zero(hessenberg)
            y = torch.linalg.pinv(clean) @ torch.where(finite, first, torch.nan)
            x = x + P(basis[:-1].T @ y)
            if problem.estimate_condition:
                condition = torch.fmax(condition, condition_of_singular_values(hessenberg))
            return x, b - A(x), condition

        x0, r = problem.residual(b, x0)
        unknown = torch.full_like(norm(r), float("nan"))
        state, count = problem.iterate(cycle, lambda s: norm(s[1]), (x0, r, unknown))
        return state[0], count, state[2]


def arnoldi(A: object, start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Return V of shape [steps + 1, n] and H of shape [steps + 1, steps] with A V_kᵀ = Vᵀ H."""
    assert callable(A)
    basis = start[None]
    columns = []
    for k in range(steps):
        w = A(basis[k])
        size = norm(w)
        h = basis.conj() @ w
        w = w - h @ basis
        again = basis.conj() @ w
        w = w - again @ basis
        length = norm(w)
        # After a breakdown the remainder is only rounding error.
        negligible = length <= 10 * torch.finfo(length.dtype).eps * size
        length = torch.where(negligible, torch.zeros_like(length), length).to(w.dtype)
        basis = torch.cat([basis, quotient(w, length)[None]])
        padding = torch.zeros_like(h[:1]).expand(steps - k - 1)
        columns.append(torch.cat([h + again, length.reshape(1), padding]))
    return basis, torch.stack(columns, dim=1)
