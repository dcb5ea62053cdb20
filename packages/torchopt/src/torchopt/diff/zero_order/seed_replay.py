# SPDX-License-Identifier: Apache-2.0
"""Gradients of large models as seeds and numbers: perturb in place, replay the noise to update.

A `SeedGradient` holds a seed and one coefficient for each direction; the gradient
g = 1/N sum_i c_i z_i exists only while it is added to the parameters, leaf by leaf.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from torchopt.diff.zero_order.directions import Gaussian, Rademacher, draw_seed
from torchopt.diff.zero_order.estimators import Estimator, Evaluations, as_estimator

__all__ = ["SeedGradient", "estimate", "perturbed"]


@dataclass(frozen=True, eq=False)
class SeedGradient:
    """A zero-order gradient of N numbers, whatever the size of the model.

    Attributes:
        seed: Names the directions.
        coefficients: `[N]`, c.
        directions: Their source.
        estimator: Its `dual` is applied to the directions.
    """

    seed: int
    coefficients: Tensor
    directions: Gaussian | Rademacher
    estimator: Estimator

    @torch.no_grad()
    def add_to_(self, params: Sequence[Tensor], scale: float) -> None:
        """Add `scale * gradient` to `params` in place: a step of SGD is `scale = -lr`.

        Holds one leaf of one direction at a time.
        """
        n = len(self.coefficients)
        for i, c in enumerate(self.coefficients.tolist()):
            for p, z in zip(params, self.directions.leaves(params, self.seed, i)):
                p.add_(self.estimator.dual(z), alpha=scale * c / n)

    def materialize(self, params: Sequence[Tensor]) -> list[Tensor]:
        """Return the gradient as tensors like `params`."""
        totals = [torch.zeros_like(p, requires_grad=False) for p in params]
        self.add_to_(totals, 1.0)
        return totals


@contextmanager
def perturbed(
    params: Sequence[Tensor],
    seed: int,
    member: int,
    scale: float,
    directions: Gaussian | Rademacher | None = None,
    backup: Sequence[Tensor] | None = None,
) -> Iterator[None]:
    """Hold `params` at `params + scale * z` inside the context; on exit, also by an exception,
    they have every bit they had before.

    Adding and subtracting the same noise does not give back a floating-point number, so the values
    are kept in `backup`: one copy of the parameters, whatever the number of directions.

    Args:
        params: Changed in place, in the order that says which noise each gets.
        seed: Names the directions.
        member: Which direction.
        scale: s sigma.
        directions: Default: Gaussian.
        backup: Tensors like `params`, overwritten with the backup; None: made here.
    """
    source = Gaussian() if directions is None else directions
    if backup is None:
        backup = [torch.empty_like(p, requires_grad=False) for p in params]
    with torch.no_grad():
        for p, b in zip(params, backup, strict=True):
            b.copy_(p)
    try:
        with torch.no_grad():
            for p, z in zip(params, source.leaves(params, seed, member)):
                p.add_(z, alpha=scale)
        yield
    finally:
        with torch.no_grad():
            for p, b in zip(params, backup):
                p.copy_(b)


@torch.no_grad()
def estimate(
    closure: Callable[[], Tensor],
    params: Sequence[Tensor],
    *,
    method: str | Estimator = "antithetic",
    num_samples: int = 1,
    sigma: float = 1e-3,
    seed: int | None = None,
    directions: Gaussian | Rademacher | None = None,
) -> SeedGradient:
    """Return the estimated gradient of `closure()` with respect to `params`.

    The parameters are perturbed in place and restored bit for bit. The directions are those of
    `ZeroOrder(directions, ...)` on the same leaves and seed. Memory beyond the model: one copy of
    the parameters and one leaf of noise.

    Args:
        closure: Evaluates the loss, 0-dim, with the parameters as they are.
        params: Different tensors, such as `list(model.parameters())`.
        method: As in `torchopt.diff.zero_order.zero_order`.
        num_samples: N >= 1.
        sigma: > 0.
        seed: Names the directions; None: drawn from torch's generator.
        directions: Independent ones; default: Gaussian.

    References:
        S. Malladi, T. Gao, E. Nichani, A. Damian, J. Lee, D. Chen, S. Arora, Fine-Tuning Language
        Models with Just Forward Passes, NeurIPS 2023, https://arxiv.org/abs/2305.17333, which
        subtracts the noise again instead of keeping a copy, and so drifts by rounding.

    Example:
        >>> w = torch.tensor([1.0, -2.0], dtype=torch.float64)
        >>> g = estimate(lambda: (w * w).sum(), [w], num_samples=4000, seed=0)
        >>> g.add_to_([w], -0.5)  # w - 0.5 * 2 w = 0, up to the noise of the estimate
        >>> bool(w.norm() < 0.2)
        True
    """
    if len({id(p) for p in params}) != len(params):
        raise ValueError("`params`: expected different tensors, got one of them twice.")
    estimator = as_estimator(method)
    source = Gaussian() if directions is None else directions
    seed = draw_seed() if seed is None else seed
    backup = [torch.empty_like(p, requires_grad=False) for p in params]
    center = closure().detach().clone() if estimator.uses_center else None
    rows, norms = [], []
    for i in range(num_samples):
        row = []
        for s in estimator.offsets:
            with perturbed(params, seed, i, s * sigma, source, backup):
                row.append(closure().detach().clone())
        rows.append(torch.stack(row))
        norm = torch.zeros_like(rows[-1][0])
        for z in source.leaves(params, seed, i):
            norm += z.square().sum().to(norm)
        norms.append(norm)
    evaluations = Evaluations(torch.stack(rows), center, torch.stack(norms), sigma)
    return SeedGradient(seed, estimator.coefficients(evaluations), source, estimator)
