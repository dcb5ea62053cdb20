# SPDX-License-Identifier: Apache-2.0
"""The numerical solution of a quadratic program: an interior point method, then exact equations.

Everything here runs without a graph, in float64 if the device supports it, for one problem (or for
a batch under `torch.func.vmap`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from torchopt.linear_solve.condition import finite_or_zero
from torchopt.linear_solve.dense import LU
from torchopt.linear_solve.iterate import iterate, power_of_two
from torchopt.solvers.base import SolveStatus

__all__ = [
    "Program",
    "active_system",
    "minimize",
    "null_projector",
    "resolution",
    "units_of_unknowns",
]

State = tuple[Tensor, ...]

# Regularization of the Newton matrices, for scaled problems with dependent rows or flat directions.
REGULARISATION = 1e-10
PROXIMITY = 1e-12
# Forces below this are rounding.
LEAST_FORCE = 1e-6
# The accuracy of the interior point method; active rows must differ clearly from the others.
TARGET = 1e-12


class Program(NamedTuple):
    """One problem without a batch; the numbers of rows p and m may be 0."""

    Q: Tensor
    c: Tensor
    A: Tensor
    b: Tensor
    G: Tensor
    h: Tensor


class Scales(NamedTuple):
    """The units of the scaled problem: of x, each unknown, the objective, rows of A and of G."""

    x: Tensor
    each: Tensor
    objective: Tensor
    equal: Tensor
    less: Tensor


def resolution(dtype: torch.dtype, size: int) -> float:
    """Return the relative error that rounding of `size` numbers causes."""
    return float(torch.finfo(dtype).eps) * 64 * math.sqrt(max(size, 1))


def minimize(given: Program, tol: float, maxiter: int) -> tuple[Tensor, ...]:
    """Return (x, nu, lam, status); multipliers of inactive rows are exactly zero.

    x, nu and lam are NaN if there is no solution.
    """
    dtype, device = given.c.dtype, given.c.device
    wide = torch.float32 if device.type == "mps" else torch.float64
    finite = torch.stack([x.isfinite().all() for x in given[:5]] + [~given.h.isnan().any()]).all()
    data = Program(*(torch.where(finite, x, torch.zeros_like(x)).to(wide) for x in given))
    data = _without_idle_rows(data)
    scaled, scales = _scaled(data, float(torch.finfo(dtype).eps))
    rounding = resolution(dtype, sum(scaled.c.shape + scaled.b.shape + scaled.h.shape))
    point = _interior_point(_relaxed(scaled, rounding), rounding, maxiter)
    rows = torch.cat([scales.equal, scales.less])
    weights = (rows.amin() / rows) ** 2 if rows.numel() else rows
    found, violation = _exact(scaled, point, weights, rounding, tol)
    none = _has_no_point(scaled, point, rounding, 1e-6)
    none = none | _has_no_bound(scaled, point[0], 1e-6)
    status = torch.where(none, int(SolveStatus.INFEASIBLE), int(SolveStatus.MAX_ITERATIONS))
    status = torch.where(violation <= tol, int(SolveStatus.CONVERGED), status)
    # A minimum that exists only because of rounding of the arguments does not count.
    convex = ~_has_no_bound(scaled, point[0], rounding / 16)
    convex = convex & _is_convex(_as_given(scaled, scales.each), rounding)
    status = torch.where(convex, status, int(SolveStatus.INFEASIBLE))
    status = torch.where(finite, status, int(SolveStatus.NON_FINITE))
    exists = (status == int(SolveStatus.CONVERGED)) | (status == int(SolveStatus.MAX_ITERATIONS))
    x, nu, lam = _unscaled(found, scales)
    return (*(torch.where(exists, v, torch.nan).to(dtype) for v in (x, nu, lam)), status)


def _largest(*tensors: Tensor) -> Tensor:
    """Return the largest absolute value; 0 if there are no values."""
    flat = torch.cat([x.reshape(x.numel()) for x in tensors])
    return torch.cat([flat.abs(), flat.new_zeros(1)]).amax()


def _one_if_zero(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.ones_like(x))


def _without_idle_rows(data: Program) -> Program:
    """Return the program with rows G x <= inf replaced by 0 <= 1, G x <= -inf by 0 <= -1."""
    infinite = data.h.isinf()
    G = torch.where(infinite[:, None], torch.zeros_like(data.G), data.G)
    return data._replace(G=G, h=torch.where(infinite, data.h.sign(), data.h))


def units_of_unknowns(Q: Tensor, eps: float) -> Tensor:
    """Return a power of two for each unknown as its unit, so that curvatures are about equal.

    Curvatures that are rounding errors of the largest one are ignored.
    """
    curvature = Q.diagonal() / _one_if_zero(_largest(Q.diagonal()))
    return 1 / power_of_two(torch.where(curvature > 8 * eps, curvature, 1.0).sqrt())


def _as_given(data: Program, each: Tensor) -> Program:
    """Return Q and A in the original units of the unknowns."""
    return data._replace(Q=data.Q / each[:, None] / each, A=data.A / each)


def _scaled(data: Program, eps: float) -> tuple[Program, Scales]:
    """Return the same problem in units in which its numbers are of order one."""
    Q, c, A, b, G, h = data
    each = units_of_unknowns(Q, eps)
    Q, c, A, G = Q * each[:, None] * each, c * each, A * each, G * each
    equal, less = (_one_if_zero(torch.linalg.vector_norm(M, dim=1)) for M in (A, G))
    A, b, G, h = A / equal[:, None], b / equal, G / less[:, None], h / less
    largest_Q, largest_c = _largest(Q), _largest(c)
    # The size of x: the largest of the free minimum, the equations and the median bound.
    free = torch.where(largest_Q > 0, largest_c / _one_if_zero(largest_Q), 0.0)
    bounds = torch.where(h != 0, h.abs(), torch.nan)
    middle = torch.cat([bounds, bounds.new_full((1,), torch.nan)]).nanmedian().nan_to_num()
    unit = _one_if_zero(torch.stack([free, _largest(b), middle]).amax())
    objective = _one_if_zero(torch.maximum(largest_Q * unit, largest_c)) * unit
    symmetric = (Q + Q.mT) / 2
    scaled = Program(
        symmetric * (unit / objective) * unit, c * (unit / objective), A, b / unit, G, h / unit
    )
    return scaled, Scales(unit, each, objective, equal, less)


def _relaxed(data: Program, rounding: float) -> Program:
    """Return the program without contradictions that are within rounding of its numbers."""
    rest = null_projector(data.A, rounding) @ data.b
    negligible = rest.abs() <= rounding * (1 + data.b.abs())
    b = torch.where(negligible.all(), data.b - rest, data.b)
    return data._replace(b=b, h=data.h + rounding * (1 + data.h.abs()))


def _unscaled(found: State, scales: Scales) -> State:
    x, nu, lam = found
    dual = scales.objective / scales.x
    return x * scales.each * scales.x, nu * dual / scales.equal, lam * dual / scales.less


# --- the interior point method --------------------------------------------------------------------


def _interior_point(data: Program, rounding: float, maxiter: int) -> State:
    """Return (x, nu, s, lam) close to the solution, s = h - G x.

    Mehrotra's predictor-corrector method. The Newton matrix is that of a proximal method, which is
    regular for every program; the residuals are those of the program itself.
    """
    Q, c, A, b, G, h = data
    n, p = c.shape[0], b.shape[0]
    eye, corner = _eye(n, c), -REGULARISATION * _eye(p, c)
    eps = torch.finfo(c.dtype).eps

    def newton(weights: Tensor) -> State:
        curvature = Q + G.mT @ (weights[:, None] * G)
        # So that large weights do not round the regularization away.
        small = torch.clamp(eps * _largest(curvature), min=REGULARISATION)
        top = torch.cat([curvature + small * eye, A.mT], dim=1)
        matrix = torch.cat([top, torch.cat([A, corner], dim=1)])
        return LU().factor(finite_or_zero(matrix)[0])[0]

    def linear(factors: State, top: Tensor, bottom: Tensor) -> State:
        both = LU().substitute(factors, torch.cat([top, bottom])[:, None], adjoint=False)[:, 0]
        return both[:n], both[n:]

    def residuals(state: State) -> State:
        x, nu, s, lam = state
        return Q @ x + c + A.mT @ nu + G.mT @ lam, A @ x - b, G @ x + s - h

    def gap(state: State) -> Tensor:
        return (state[2] * state[3]).sum() / max(h.shape[0], 1)

    def step(state: State) -> State:
        *point, _ = state
        *_, s, lam = point
        dual, equal, slack = residuals(tuple(point))
        factors = newton(lam / s)

        def direction(complementary: Tensor) -> State:
            right = (lam * slack - complementary) / s
            dx, dnu = linear(factors, -dual - G.mT @ right, -equal)
            ds = -slack - G @ dx
            return dx, dnu, ds, (-complementary - lam * ds) / s

        *_, ds, dlam = direction(s * lam)
        mu = gap(tuple(point))
        length = _longest((s, ds), (lam, dlam))
        after = gap((s, s, s + length * ds, lam + length * dlam))
        sigma = (after / _one_if_zero(mu)) ** 3
        change = direction(s * lam + ds * dlam - torch.clamp(sigma * mu, min=1e-2 * TARGET))
        length = torch.clamp(0.99 * _longest((s, change[2]), (lam, change[3])), max=1.0)
        new = [value + length * d for value, d in zip(point, change)]
        sound = torch.cat(new).isfinite().all()
        point = [torch.where(sound, a, b) for a, b in zip(new, point)]
        ended = _has_no_point(data, tuple(point), rounding, 1e-8)
        return (*point, ~sound | ended)

    def active(state: State) -> Tensor:
        *point, ended = state
        worst = torch.cat([*residuals(tuple(point)), gap(tuple(point))[None]]).abs().amax()
        size = 1 + torch.clamp(_largest(point[0]), max=1e3)
        return (worst > TARGET * size) & ~ended

    x, nu = linear(newton(torch.ones_like(h)), G.mT @ torch.clamp(h, -10, 10) - c, b)
    s = torch.clamp(h - G @ x, min=1.0)
    start = (x, nu, s, 1 / s, x.sum() != x.sum())
    check_every = 1 if c.device.type == "cpu" else 8
    state, _ = iterate(step, active, start, maxiter, check_every)
    return state[:4]


def _longest(*pairs: tuple[Tensor, Tensor]) -> Tensor:
    """Return the longest step in (0, 1 / 0.99] that keeps all values positive."""
    steps = [torch.where(d < 0, -value / d, torch.inf) for value, d in pairs]
    limit = steps[0].new_full((1,), 1 / 0.99)
    return torch.cat([*steps, limit]).amin()


# --- the active equations -------------------------------------------------------------------------


def null_projector(rows: Tensor, rounding: float) -> Tensor:
    """Return I - M M⁺, the projector onto the combinations of rows that are zero.

    Differentiable along changes of M that keep its rank. A zero row is such a combination.
    """
    k, n = rows.shape
    eye = torch.eye(k, dtype=rows.dtype, device=rows.device)
    if k == 0 or n == 0:
        return eye
    clean = finite_or_zero(rows)[0]
    if rows.element_size() < 4:  # LAPACK has no half precision
        clean = clean.float()
    independent: Tensor = clean @ torch.linalg.pinv(clean, rtol=rounding)
    projector = eye - independent.to(eye)
    # The trace is the number of dependent rows; if there are none, the projector is only rounding.
    return torch.where(projector.detach().trace() < 0.5, torch.zeros_like(eye), projector)


def active_system(symmetric: Tensor, rows: Tensor, projector: Tensor, weights: Tensor) -> Tensor:
    """Return the matrix K of K (x, y) = (-c, (I - P) r), the program with equations M x = r.

    With the projector P onto the combinations of rows that are zero, and weights W > 0,

        Q x + Mᵀ y = -c,   M x + P W y = (I - P) r .

    P W y = 0 selects the multipliers y of least norm yᵀ W y, so K is regular even if rows depend on
    one another.
    """
    top = torch.cat([symmetric, rows.mT], dim=1)
    return torch.cat([top, torch.cat([rows, projector * weights], dim=1)])


def _exact(
    data: Program, point: State, weights: Tensor, rounding: float, tol: float
) -> tuple[State, Tensor]:
    """Return (x, nu, lam) from the exact equations of the active rows, and its violation.

    The interior point method decides which rows are active. If the signs of the solution contradict
    that, rows are removed or added. The result of the interior point method is kept if it is
    better.
    """
    Q, c, A, b, G, h = data
    n, p = c.shape[0], b.shape[0]
    x, nu, s, lam = point
    # If the minimum is not unique, this selects the one close to x.
    flat = torch.cat([torch.full_like(c, PROXIMITY), torch.zeros_like(torch.cat([b, h]))])
    nearby = torch.diag(flat)

    def solve(active: Tensor) -> State:
        rows, right = torch.cat([A, active[:, None] * G]), torch.cat([b, active * h])
        P = null_projector(rows, rounding)
        matrix = finite_or_zero(active_system(Q, rows, P, weights))[0]
        right = torch.cat([-c, right - P @ right])
        factors = LU().factor(matrix + nearby)[0]
        both = torch.cat([x, nu, active * lam])
        for _ in range(2):
            rest = (right - matrix @ both)[:, None]
            both = both + LU().substitute(factors, rest, adjoint=False)[:, 0]
        multipliers = active * both[n + p :]
        # A multiplier that is only rounding is set to zero.
        negligible = multipliers.abs() <= rounding * (_largest(c, Q @ both[:n]) + LEAST_FORCE)
        return both[:n], both[n : n + p], torch.where(negligible, 0.0, multipliers)

    def step(state: State) -> State:
        *best, worst, active, _ = state
        found = solve(active)
        size = _violation(data, found)
        better = size < worst
        kept = [torch.where(better, new, old) for new, old in zip(found, best)]
        slack = h - G @ found[0]
        following = (active > 0) & (found[2] >= 0) | (slack < -rounding * (1 + h.abs()))
        changed = (following != (active > 0)).any()
        return (*kept, torch.where(better, size, worst), following.to(c.dtype), changed)

    inside = (x, nu, torch.where(lam > s, lam, 0.0))
    before = _violation(data, inside)
    unknown = torch.full_like(before, torch.inf)
    start = (*inside, unknown, (lam > s).to(c.dtype), unknown > 0)
    check_every = 1 if c.device.type == "cpu" else 4
    state, _ = iterate(step, lambda s: (s[3] > 1e-3 * tol) & s[5], start, 6, check_every)
    *exact, after, _, _ = state
    better = after <= torch.clamp(before.nan_to_num(torch.inf), min=1e-3 * tol)
    solution = tuple(torch.where(better, new, old) for new, old in zip(exact, inside))
    return solution, torch.where(better, after, before)


def _violation(data: Program, solution: State) -> Tensor:
    """Return the largest relative violation of the Karush-Kuhn-Tucker conditions.

    It is relative to the terms that cancel. |x| is not one of them, because it grows without limit
    if there is no solution and would hide that.
    """
    Q, c, A, b, G, h = data
    x, nu, lam = solution
    forces = (Q @ x, c, A.mT @ nu, G.mT @ lam)
    size = _largest(*forces) + LEAST_FORCE
    stationary = _largest(torch.stack(forces).sum(0)) / size
    Ax, Gx = A @ x, G @ x
    equal = (Ax - b).abs() / (1 + b.abs())
    # Both must be ≥ 0, and one of them must be 0.
    slack, sign = (h - Gx) / (1 + h.abs()), lam / size
    return torch.maximum(stationary, _largest(equal, torch.minimum(slack, sign)))


def _eye(n: int, like: Tensor) -> Tensor:
    return torch.eye(n, dtype=like.dtype, device=like.device)


# --- problems without a solution ------------------------------------------------------------------


def _is_convex(data: Program, rounding: float) -> Tensor:
    """Return whether Q is positive semi-definite on A x = 0, up to rounding."""
    free = not data.A.numel()
    inside = _eye(len(data.c), data.c) if free else null_projector(data.A.mT, rounding)
    if not data.c.numel():
        return (data.c == 0).all()
    values = torch.linalg.eigvalsh(inside @ data.Q @ inside)
    convex: Tensor = values[0] >= -rounding * _largest(data.Q)
    return convex


def _has_no_point(data: Program, point: State, rounding: float, least: float) -> Tensor:
    """Return whether the multipliers prove that the constraints contradict each other.

    They do if Aᵀν + Gᵀλ = 0 and bᵀν + hᵀλ < 0 for some λ ≥ 0 (Farkas' lemma).
    """
    _, c, A, b, G, h = data
    _, nu, _, lam = point
    terms = torch.cat([b * nu, h * lam, c.new_zeros(1)])
    gain = -terms.sum()
    proved = gain > rounding * terms.abs().sum()
    return proved & (_largest(A.mT @ nu + G.mT @ lam) <= least * gain)


def _has_no_bound(data: Program, x: Tensor, least: float) -> Tensor:
    """Return whether the direction of a large x proves that the objective is unbounded below.

    It does if Q x = 0, A x = 0, G x ≤ 0 and cᵀx < 0.
    """
    Q, c, A, _, G, _ = data
    far = _largest(x)
    level = _largest(Q @ x, A @ x, torch.clamp(G @ x, min=0)) <= least * far
    return level & (-(c * x).sum() > least * far)
