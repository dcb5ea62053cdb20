# SPDX-License-Identifier: Apache-2.0
"""The quadratic model of a least-squares problem at one point, and its damped minimum.

At x, with residuals r, their Jacobian J, a robust loss rho and a step p,

    f(x + p) ≈ q(p) = f + gᵀp + ½ ‖√W J p‖²,    g = Jᵀ (rho' r),    W = rho' + 2 rho'' r² .

W is Triggs' correction (Triggs et al., Bundle adjustment, a modern synthesis, 2000, equation 12).
It is kept above a hundredth of rho', so that the model is convex.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from torchopt.linear_solve.iterate import dot, wide
from torchopt.linear_solve.layout import Layout
from torchopt.linear_solve.operator import BoundOperator, Tag, transpose_linear
from torchopt.linear_solve.solver import Solver as LinearSolver
from torchopt.linear_solve.solver import solve_once
from torchopt.solvers.robust_loss import RobustLoss, slopes
from torchopt.tree_function import linearize

__all__ = ["Linearized", "Model", "dense_model", "linearized", "matrix_free_model"]

FlatMap = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Linearized:
    """A problem at one point.

    Attributes:
        value: F = ½ Σ C² rho(r² / C²).
        gradient: G = ∇f.
        scaled: The vector rho' r / √W, with g = Jᵀ √W scaled.
        push: The map p -> √W J p.
        pull: The map v -> Jᵀ √W v.
    """

    value: Tensor
    gradient: Tensor
    scaled: Tensor
    push: FlatMap
    pull: FlatMap


def linearized(residual: FlatMap, rho: RobustLoss, scale: Tensor, x: Tensor) -> Linearized:
    """Return the problem at x."""
    r, pull = linearize(residual, x)
    push = transpose_linear(lambda v: pull(v)[0], r)
    z = (r / scale) ** 2
    first, second = slopes(rho, z)
    root = torch.sqrt(torch.maximum(first + 2 * z * second, 0.01 * first))
    some = root > 0
    scaled = torch.where(some, first * r / torch.where(some, root, 1.0), 0.0)
    return Linearized(
        value=(rho(z) * scale**2).sum() / 2,
        gradient=pull(first * r)[0],
        scaled=scaled,
        push=lambda p: root * push(p),
        pull=lambda v: pull(root * v)[0],
    )


@dataclass(frozen=True)
class Model:
    """The quadratic model q.

    Attributes:
        here: The problem at x.
        curve: The map p -> √W J p.
        units: The diagonal of D > 0, a unit for each unknown, [n].
        pinned: Which unknowns are about to reach a bound, [n].
        damped: The map λ -> p with (Jᵀ W J + λ D²) p = -g for the unknowns that are not pinned;
            pinned ones take the step -g / ((1 + λ) D²).
    """

    here: Linearized
    curve: FlatMap
    units: Tensor
    pinned: Tensor
    damped: FlatMap

    def decrease(self, p: Tensor) -> Tensor:
        """Return q(0) - q(p)."""
        bent = self.curve(p)
        return -(dot(self.here.gradient, p) + dot(bent, bent) / 2)

    def steepest(self) -> Tensor:
        """Return the minimum of q along -D⁻² g, the Cauchy point."""
        d = -self.here.gradient / self.units**2
        bent = self.curve(d)
        square = dot(bent, bent)
        return d * torch.where(square > 0, -dot(self.here.gradient, d) / _or_one(square), 1.0)


def _or_one(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.ones_like(x))


def _root(x: Tensor) -> Tensor:
    return torch.where(x > 0, torch.sqrt(_or_one(x)), 0.0)


def dense_model(
    here: Linearized, order: Tensor, units: Tensor, pin: Callable[[Tensor], Tensor]
) -> Model:
    """Return the model from the matrix √W J, in blocks of unknowns and their residuals.

    The steps come from a QR factorisation of [√W J; √λ D], which does not square the condition
    number.

    Args:
        here: The problem at x.
        order: The unknowns of each block, [blocks, k]; [1, n] is one dense matrix.
        units: D so far, zeros at first; its entries never decrease.
        pin: Maps D to `Model.pinned`.
    """
    matrix = wide(_matrix(here, order))
    place = torch.argsort(order.flatten())
    lengths = _root((matrix**2).sum(1)).flatten()[place]
    units = _or_one(torch.maximum(lengths.to(units.dtype), units))
    pinned = pin(units)
    held = pinned[order][:, None, :]
    free = torch.where(held, 0.0, matrix)
    diagonal, slope = wide(units[order]), wide(here.gradient[order])
    right = wide(here.scaled).reshape(len(order), -1)

    def damped(damping: Tensor) -> Tensor:
        root = torch.sqrt(torch.where(held[:, 0], 1 + damping, damping).to(matrix.dtype)) * diagonal
        below = torch.where(held[:, 0], slope / root, 0.0)
        q, r = torch.linalg.qr(torch.cat([free, torch.diag_embed(root)], dim=1))
        b = q.mT @ torch.cat([right, below], dim=1)[..., None]
        p: Tensor = torch.linalg.solve_triangular(r, -b, upper=True)
        return p.flatten()[place].to(units.dtype)

    def curve(p: Tensor) -> Tensor:
        bent = matrix @ p[order].to(matrix.dtype)[..., None]
        return bent.flatten().to(p.dtype)

    return Model(here, curve, units, pinned, damped)


def _matrix(here: Linearized, order: Tensor) -> Tensor:
    """Return √W J, [blocks, m, k], for all blocks together from m or k products."""
    blocks, k = order.shape
    like, m = here.gradient, here.scaled.shape[0]
    if m == 0:
        return like.new_zeros(blocks, 0, k)
    if blocks == 1 and m < k:
        rows = torch.func.vmap(here.pull)(torch.eye(m, dtype=like.dtype, device=like.device))
        return rows[:, order[0]][None]
    ones = like.new_ones(k, blocks)
    seeds = torch.zeros(k, blocks * k, dtype=like.dtype, device=like.device)
    seeds = seeds.scatter(1, order.T, ones)
    columns = torch.func.vmap(here.push)(seeds)
    return columns.reshape(k, blocks, m // blocks).permute(1, 2, 0)


def matrix_free_model(
    here: Linearized,
    solver: LinearSolver,
    layout: Layout,
    units: Tensor,
    pin: Callable[[Tensor], Tensor],
) -> Model:
    """Return the model from products with √W J and its transpose; D is a multiple of I.

    Args:
        here: The problem at x.
        solver: Solves the symmetric positive definite systems of the steps.
        layout: The layout of the unknowns.
        units: D so far, zeros at first; its entries never decrease.
        pin: Maps D to `Model.pinned`.
    """
    g = here.gradient
    bent = here.push(g)
    units = _or_one(torch.maximum(_root(dot(bent, bent) / _or_one(dot(g, g))), units))
    pinned = pin(units)

    def damped(damping: Tensor) -> Tensor:
        weight = torch.where(pinned, 1 + damping, damping) * units**2

        def product(p: Tensor) -> Tensor:
            bent = here.pull(here.push(torch.where(pinned, 0.0, p)))
            return torch.where(pinned, 0.0, bent) + weight * p

        tags = frozenset({Tag.SYMMETRIC, Tag.POSITIVE_DEFINITE})
        operator = BoundOperator(product, product, layout.pairs, tags)
        return solve_once(solver, operator, -g)

    return Model(here, here.push, units, pinned, damped)
