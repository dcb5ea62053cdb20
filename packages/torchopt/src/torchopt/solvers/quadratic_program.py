# SPDX-License-Identifier: Apache-2.0
"""Small dense quadratic programs, differentiated by their conditions of optimality."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchopt.diff.implicit.root import ImplicitEngine
from torchopt.linear_solve.dense import LU
from torchopt.linear_solve.iterate import iterate
from torchopt.solvers.base import OnFail, SolveStatus, report_outcome

__all__ = ["QPSolution", "quadratic_program"]

State = tuple[Tensor, ...]


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


class Program(NamedTuple):
    """One problem without batch; p and m may be 0."""

    Q: Tensor
    c: Tensor
    A: Tensor
    b: Tensor
    G: Tensor
    h: Tensor


def quadratic_program(
    Q: Tensor,
    c: Tensor,
    A: Tensor | None = None,
    b: Tensor | None = None,
    G: Tensor | None = None,
    h: Tensor | None = None,
    *,
    tol: float = 1e-8,
    maxiter: int = 50,
    on_fail: OnFail = "warn",
) -> QPSolution:
    """Return the minimum of ½ xᵀQ x + cᵀx subject to A x = b and G x <= h.

    A primal-dual interior point method finds which constraints are active; the system of those is
    then solved once more, so the solution is exact to rounding. Its derivatives, to any order and
    in every mode, follow from the conditions of Karush, Kuhn and Tucker

        ½ (Q + Qᵀ) x + c + Aᵀν + Gᵀλ = 0,   A x - b = 0,   λ (G x - h) = 0 ,

    which determine them where the active constraints are independent and no multiplier of an active
    one is zero; elsewhere the linear system is singular, which is reported.

    Args:
        Q: `[*batch, n, n]`, positive semi-definite, and positive definite where A x = 0.
        c: `[*batch, n]`.
        A: `[*batch, p, n]` with independent rows, or None.
        b: `[*batch, p]`, or None.
        G: `[*batch, m, n]`, or None.
        h: `[*batch, m]`, or None.
        tol: The largest violation of the conditions that counts as solved, relative to the size
            of the problem.
        maxiter: The most interior point steps.
        on_fail: What to do with an infeasible or unbounded problem: "raise", "warn" or "ignore".

    Returns:
        The solution. Inputs with and without batch dimensions may be mixed; they broadcast.

    Raises:
        ValueError: Shapes that do not fit, or one of A and b (G and h) without the other.
        SolverError: A problem has no solution and `on_fail` is "raise".

    Cost: O((n + p)³) in each of about ten steps, dense; n up to a few hundred.

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
    program = _program(Q, c, A, b, G, h)
    batch = torch.broadcast_shapes(*(x.shape[: -_rank(i)] for i, x in enumerate(program)))

    def solve(*tensors: Tensor) -> tuple[Tensor, ...]:
        return _solve(Program(*tensors), tol, maxiter, on_fail)

    if not batch:
        return QPSolution(*solve(*program))
    flat = [
        x.expand(*batch, *x.shape[-_rank(i) :]).flatten(0, len(batch) - 1)
        for i, x in enumerate(program)
    ]
    found = torch.func.vmap(solve)(*flat)
    return QPSolution(*(x.unflatten(0, batch) for x in found))


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
        if matrix.ndim < 2 or matrix.shape[-1] != n or matrix.shape[-2] != vector.shape[-1]:
            raise ValueError(
                f"quadratic_program: {names}: expected [*batch, k, {n}] and [*batch, k], got "
                f"{tuple(matrix.shape)} and {tuple(vector.shape)}"
            )
        pairs += [matrix, vector]
    return Program(Q, c, *pairs)


def _solve(program: Program, tol: float, maxiter: int, on_fail: OnFail) -> tuple[Tensor, ...]:
    """Return (x, nu, lam) of one problem, differentiable."""

    def conditions(solution: tuple[Tensor, ...], given: list[Tensor]) -> tuple[Tensor, ...]:
        return _conditions(Program(*given), *solution)

    def interior(start: Any, given: list[Tensor]) -> tuple[Tensor, ...]:
        data = Program(*given)
        *solution, status = _refined(data, _interior_point(data, tol, maxiter), tol)
        report_outcome(status, on_fail, "quadratic_program")
        return tuple(solution)

    engine = ImplicitEngine(conditions, (1,), solve=LU(on_fail="warn"), on_fail="ignore")
    found: tuple[Tensor, ...] = engine(interior)(None, list(program))
    return found


def _conditions(data: Program, x: Tensor, nu: Tensor, lam: Tensor) -> tuple[Tensor, ...]:
    Q, c, A, b, G, h = data
    stationary = (Q @ x + Q.mT @ x) / 2 + c + A.mT @ nu + G.mT @ lam
    return stationary, A @ x - b, lam * (G @ x - h)


def _saddle(data: Program, weights: Tensor) -> State:
    """Return the factors of [[Q + Gᵀ W G, Aᵀ], [A, 0]]."""
    Q, _, A, _, G, _ = data
    p = A.shape[0]
    top = torch.cat([(Q + Q.mT) / 2 + G.mT @ (weights[:, None] * G), A.mT], dim=1)
    bottom = torch.cat([A, A.new_zeros(p, p)], dim=1)
    return LU().factor(torch.cat([top, bottom]))[0]


def _interior_point(data: Program, tol: float, maxiter: int) -> State:
    """Return (x, nu, s, lam) close to the solution, s = h - G x."""
    Q, c, A, b, G, h = data
    n, m = c.shape[0], h.shape[0]
    symmetric = (Q + Q.mT) / 2
    ones = torch.ones_like(h)

    def linear(factors: State, top: Tensor, bottom: Tensor) -> State:
        both = LU().substitute(factors, torch.cat([top, bottom])[:, None], adjoint=False)[:, 0]
        return both[:n], both[n:]

    # With all weights one: the point that satisfies all but the signs.
    x, nu = linear(_saddle(data, ones), G.mT @ h - c, b)
    if m == 0:
        return x, nu, h, h
    s = h - G @ x
    lam = -s
    s = torch.where(s.amin() <= 0, s + 1 - s.amin(), s)
    lam = torch.where(lam.amin() <= 0, lam + 1 - lam.amin(), lam)
    size = 1 + torch.stack([c.abs().amax(), h.abs().amax()]).amax()

    def residuals(state: State) -> State:
        x, nu, s, lam = state
        return symmetric @ x + c + A.mT @ nu + G.mT @ lam, A @ x - b, G @ x + s - h

    def step(state: State) -> State:
        *_, s, lam = state
        dual, equal, slack = residuals(state)
        factors = _saddle(data, lam / s)

        def direction(complementary: Tensor) -> State:
            right = (lam * slack - complementary) / s
            dx, dnu = linear(factors, -dual - G.mT @ right, -equal)
            ds = -slack - G @ dx
            return dx, dnu, ds, (-complementary - lam * ds) / s

        *_, ds, dlam = direction(s * lam)
        mu = (s * lam).mean()
        length = _longest((s, ds), (lam, dlam))
        after = ((s + length * ds) * (lam + length * dlam)).mean()
        sigma = (after / mu) ** 3
        change = direction(s * lam + ds * dlam - sigma * mu)
        length = torch.clamp(0.99 * _longest((s, change[2]), (lam, change[3])), max=1.0)
        return tuple(value + length * d for value, d in zip(state, change))

    def active(state: State) -> Tensor:
        worst = torch.cat([*residuals(state), (state[2] * state[3]).mean()[None]]).abs().amax()
        # Far below the tolerance: the active constraints have to be told from the others.
        return (worst > 1e-3 * tol * size) & worst.isfinite()

    check_every = 1 if c.device.type == "cpu" else 8
    state, _ = iterate(step, active, (x, nu, s, lam), maxiter, check_every)
    return state


def _longest(*pairs: tuple[Tensor, Tensor]) -> Tensor:
    """Return the longest step in (0, 1 / 0.99] that keeps all values positive."""
    steps = [torch.where(d < 0, -value / d, torch.inf).amin() for value, d in pairs]
    return torch.clamp(torch.stack(steps).amin(), max=1 / 0.99)


def _refined(data: Program, found: State, tol: float) -> tuple[Tensor, ...]:
    """Return (x, nu, lam, status): the equations of the active constraints solved exactly."""
    Q, c, A, b, G, h = data
    n, p, m = c.shape[0], b.shape[0], h.shape[0]
    x, nu, s, lam = found
    active = lam > s
    mask = active.to(c.dtype)[:, None]
    matrix = torch.cat(
        [
            torch.cat([(Q + Q.mT) / 2, A.mT, G.mT], dim=1),
            torch.cat([A, c.new_zeros(p, p + m)], dim=1),
            torch.cat([mask * G, c.new_zeros(m, p), torch.diag(1 - mask[:, 0])], dim=1),
        ]
    )
    right = torch.cat([-c, b, torch.where(active, h, torch.zeros_like(h))])
    exact = torch.linalg.solve_ex(matrix, right)[0].split([n, p, m])
    size = 1 + torch.cat([c, b, h]).abs().amax()

    def violation(x: Tensor, nu: Tensor, lam: Tensor) -> Tensor:
        equations = torch.cat(_conditions(data, x, nu, lam)).abs().amax()
        signs = torch.cat([torch.clamp(G @ x - h, min=0), torch.clamp(-lam, min=0), c.new_zeros(1)])
        return torch.maximum(equations, signs.amax()) / size

    before, after = violation(x, nu, lam), violation(*exact)
    better = after <= torch.where(before.isfinite(), before, torch.inf)
    solution = [torch.where(better, new, old) for new, old in zip(exact, (x, nu, lam))]
    worst = torch.where(better, after, before)
    status = torch.where(worst <= tol, int(SolveStatus.CONVERGED), int(SolveStatus.INFEASIBLE))
    return (*solution, status)
