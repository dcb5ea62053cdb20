# SPDX-License-Identifier: Apache-2.0
"""Small dense quadratic programs, differentiated by their optimality conditions."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchopt.diff.implicit.root import ImplicitEngine
from torchopt.linear_solve.dense import LU
from torchopt.linear_solve.iterate import wide
from torchopt.precision import without_autocast
from torchopt.solvers.base import OnFail, report_outcome
from torchopt.solvers.interior_point import (
    Program,
    minimize,
    null_projector,
    resolution,
    units_of_unknowns,
)
from torchopt.tree_function import uncompiled

__all__ = ["QPSolution", "quadratic_program"]


class QPSolution(NamedTuple):
    """The solution of a quadratic program; every part is differentiable.

    Attributes:
        x: The minimum, `[*batch, n]`.
        nu: The multipliers of A x = b, `[*batch, p]`.
        lam: The multipliers of G x <= h, ≥ 0, `[*batch, m]`.
    """

    x: Tensor
    nu: Tensor
    lam: Tensor


@uncompiled
def quadratic_program(
    Q: Tensor,
    c: Tensor,
    A: Tensor | None = None,
    b: Tensor | None = None,
    G: Tensor | None = None,
    h: Tensor | None = None,
    *,
    tol: float | None = None,
    maxiter: int = 50,
    on_fail: OnFail = "warn",
) -> QPSolution:
    """Return the minimum of ½ xᵀQ x + cᵀx subject to A x = b and G x <= h.

    A primal-dual interior point method finds the active constraints. The equations of these are
    then solved once more, so the solution is exact up to rounding. Its derivatives, to any order
    and in every mode, follow from the Karush-Kuhn-Tucker conditions

        ½ (Q + Qᵀ) x + c + Aᵀν + Gᵀλ = 0,   A x - b = 0,   λ (G x - h) = 0 .

    If active constraints depend on one another, the multipliers are those of least norm, provided
    that these have the right signs. The derivatives are those along changes that keep the
    dependence; along other changes there are none. If a constraint is active with a multiplier of
    zero, or the minimum is not unique, there is no derivative; the linear system is then singular,
    which is reported.

    Args:
        Q: `[*batch, n, n]`, positive semi-definite, and positive definite on A x = 0.
        c: `[*batch, n]`.
        A: `[*batch, p, n]`, or None. Rows may depend on one another.
        b: `[*batch, p]`, or None.
        G: `[*batch, m, n]`, or None.
        h: `[*batch, m]`, or None. Rows with infinity are ignored.
        tol: The largest violation of the conditions that counts as solved, relative to the size
            of the problem; None: 1e-8, or more if rounding of the arguments requires it. The
            solution is computed in float64 whatever the dtype; half precision is converted to
            float32 first.
        maxiter: The largest number of interior point steps.
        on_fail: What to do with a problem that is infeasible, unbounded or not convex, or that
            contains NaN: "raise", "warn" or "ignore". Its solution is NaN.

    Returns:
        The solution. Inputs with and without batch dimensions may be mixed; they broadcast. Each of
        about ten steps costs O((n + p)³); the method is dense, for n up to a few hundred.

    Raises:
        ValueError: Shapes or dtypes do not match, or one of A and b (or of G and h) is missing.
        SolverError: A problem has no solution and `on_fail` is "raise".

    References:
        Amos, Kolter, OptNet: differentiable optimization as a layer in neural networks, 2017.

        Mehrotra, On the implementation of a primal-dual interior point method, 1992.

    Example:
        >>> import torch
        >>> Q, c = torch.eye(2), torch.tensor([-1.0, -1.0])
        >>> G, h = torch.tensor([[1.0, 0.0]]), torch.tensor([0.25])
        >>> quadratic_program(Q, c, G=G, h=h).x
        tensor([0.2500, 1.0000])
        >>> torch.func.jacrev(lambda h: quadratic_program(Q, c, G=G, h=h).x)(h)
        tensor([[1.],
                [0.]])
    """
    if on_fail not in ("raise", "warn", "ignore"):
        raise ValueError(f"on_fail: expected 'raise', 'warn' or 'ignore', got {on_fail!r}")
    given = _program(Q, c, A, b, G, h)
    # In half precision, rounding would hide which rows are active.
    program = Program(*(wide(x) for x in given))
    batch = torch.broadcast_shapes(*(x.shape[: -_rank(i)] for i, x in enumerate(program)))

    def solve(*tensors: Tensor) -> tuple[Tensor, ...]:
        with without_autocast():
            return _solve(Program(*tensors), tol, maxiter, on_fail)

    if not batch:
        return QPSolution(*(x.to(c.dtype) for x in solve(*program)))
    if 0 in batch:
        return QPSolution(*(x.expand(*batch, x.shape[-1]) for x in given[1::2]))
    flat = [
        x.expand(*batch, *x.shape[-_rank(i) :]).flatten(0, len(batch) - 1)
        for i, x in enumerate(program)
    ]
    found = torch.func.vmap(solve)(*flat)
    return QPSolution(*(x.unflatten(0, batch).to(c.dtype) for x in found))


def _rank(position: int) -> int:
    return 1 if position % 2 else 2


def _program(
    Q: Tensor, c: Tensor, A: Tensor | None, b: Tensor | None, G: Tensor | None, h: Tensor | None
) -> Program:
    for name, matrix, vector in (("A and b", A, b), ("G and h", G, h)):
        if (matrix is None) != (vector is None):
            raise ValueError(f"quadratic_program: expected both of {name}, or neither")
    n = c.shape[-1] if c.ndim else 0
    if Q.ndim < 2 or Q.shape[-2:] != (n, n):
        raise ValueError(
            f"quadratic_program: Q: expected [*batch, {n}, {n}] to fit c {tuple(c.shape)}, got "
            f"{tuple(Q.shape)}"
        )
    if not Q.is_floating_point() or c.dtype != Q.dtype:
        raise ValueError(
            f"quadratic_program: expected one real dtype, got Q {Q.dtype} and c {c.dtype}"
        )
    pairs: list[Tensor] = []
    for names, matrix, vector in (("A, b", A, b), ("G, h", G, h)):
        if matrix is None or vector is None:
            matrix, vector = c.new_zeros(0, n), c.new_zeros(0)
        if matrix.is_complex() or vector.is_complex():
            raise ValueError(
                f"quadratic_program: {names}: expected real numbers, got {matrix.dtype} and "
                f"{vector.dtype}"
            )
        matrix, vector = matrix.to(c.dtype), vector.to(c.dtype)
        fits = matrix.ndim >= 2 and vector.ndim >= 1
        if not fits or matrix.shape[-1] != n or matrix.shape[-2] != vector.shape[-1]:
            raise ValueError(
                f"quadratic_program: {names}: expected [*batch, k, {n}] and [*batch, k], got "
                f"{tuple(matrix.shape)} and {tuple(vector.shape)}"
            )
        pairs += [matrix, vector]
    return Program(Q, c, *pairs)


def _solve(
    program: Program, tol: float | None, maxiter: int, on_fail: OnFail
) -> tuple[Tensor, ...]:
    """Return (x, nu, lam) of one problem, with derivatives."""
    if tol is None:
        size = sum(x.shape[0] for x in program[1::2])
        tol = max(1e-8, resolution(program.c.dtype, size))
    limit = tol

    def conditions(solution: tuple[Tensor, ...], given: list[Tensor]) -> tuple[Tensor, ...]:
        return _conditions(Program(*given), *solution)

    def interior(start: Any, given: list[Tensor]) -> tuple[Tensor, ...]:
        *solution, status = minimize(Program(*given), limit, maxiter)
        report_outcome(status, on_fail, "quadratic_program")
        return tuple(solution)

    engine = ImplicitEngine(conditions, (1,), solve=LU(on_fail="warn"), on_fail="ignore")
    found: tuple[Tensor, ...] = engine(interior)(None, list(program))
    return found


def _conditions(data: Program, x: Tensor, nu: Tensor, lam: Tensor) -> tuple[Tensor, ...]:
    """Return equations for (x, nu, lam) that are regular wherever there is a derivative.

    They are the equations of the active rows M, see `active_system`; a row is active if its
    multiplier is not zero. If a row holds with equality and a multiplier of zero, and is
    independent of the active rows, the solution has a kink. Then its equation is 0 = 0, which the
    linear solver reports.
    """
    Q, c, A, b, G, h = data
    p = b.shape[0]
    active = lam.detach() != 0
    rows = torch.cat([A, torch.where(active[:, None], G, 0.0)])
    right = torch.cat([b, torch.where(active, h, 0.0)])
    each = units_of_unknowns(Q.detach(), float(torch.finfo(c.dtype).eps))
    rows = rows * each
    length = torch.linalg.vector_norm(rows.detach(), dim=1)
    length = torch.where(length > 0, length, torch.ones_like(length))
    rounding = resolution(c.dtype, x.shape[0] + right.shape[0])
    rows = rows / length[:, None]
    P = null_projector(rows, rounding)
    right = right / length
    smallest = length.amin() if len(length) else 1.0
    multipliers = torch.cat([nu, lam])
    equations = rows @ (x / each) - (right - P @ right) + P @ (multipliers * (smallest / length))
    unknowns = x.detach() / each
    kink = _is_kink(data._replace(G=G * each), rows.detach(), unknowns, active, rounding)
    less = torch.where(kink, lam * torch.where(kink, G @ x - h, 0.0), equations[p:])
    stationary = (Q @ x + Q.mT @ x) / 2 + c + A.mT @ nu + G.mT @ lam
    # The equations are linear and would have a derivative even for a NaN solution.
    stationary = stationary * (1 + 0 * x.detach().sum())
    return stationary, equations[:p], less


def _is_kink(data: Program, rows: Tensor, x: Tensor, active: Tensor, rounding: float) -> Tensor:
    """Return which rows hold with equality, are not active, and are independent of active rows."""
    G, h = data.G.detach(), data.h.detach()
    met = (G @ x - h).abs() <= rounding * (h.abs() + G.abs() @ x.abs())
    rest = G @ null_projector(rows.mT, rounding)
    length, beside = torch.linalg.vector_norm(torch.stack([G, rest]), dim=2)
    kinks: Tensor = met & h.isfinite() & ~active & (beside > rounding**0.5 * length)
    return kinks
