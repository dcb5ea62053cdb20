# SPDX-License-Identifier: Apache-2.0
"""Adan's direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from torchopt.kernels.reference.moments import moving_average
from torchopt.kernels.reference.root import divide_by_root
from torchopt.transform.base import LeafRule, transformation
from torchopt.transform.counts import bias_corrections, increment, zero_counts
from torchopt.transform.starts import zeros_like
from torchopt.transform.validate import check_at_least_zero, check_betas

__all__ = ["ScaleByAdanState", "scale_by_adan"]


class ScaleByAdanState(NamedTuple):
    """`mu`, `delta`, `nu`: moments of the gradient, its change, its square; `previous`; `count`."""

    mu: Any
    delta: Any
    nu: Any
    previous: Any
    count: Any


@dataclass(frozen=True)
class ScaleByAdan(LeafRule):
    """Adam with a moment of the change of the gradient."""

    b1: float | Tensor
    b2: float | Tensor
    b3: float | Tensor
    eps: float | Tensor
    leaf_fields: ClassVar[tuple[str, ...]] = (
        "mu",
        "delta",
        "nu",
        "previous",
        "count",
    )
    overwritten_fields: ClassVar[tuple[str, ...]] = (
        "mu",
        "delta",
        "nu",
        "previous",
    )

    def init_leaves(self, params: list[Tensor]) -> ScaleByAdanState:
        """Return moments, gradients and counts of zero."""
        return ScaleByAdanState(
            mu=zeros_like(params, False),
            delta=zeros_like(params, False),
            nu=zeros_like(params, False),
            previous=zeros_like(params, False),
            count=zero_counts(params),
        )

    def update_leaves(
        self, grads: list[Tensor], state: Any, params: list[Tensor], *, inplace: bool
    ) -> tuple[list[Tensor], Any]:
        """Return the directions and the new state."""
        counts = increment(state.count)
        differences = [
            torch.where(k > 1, g - old, 0.0) for g, old, k in zip(grads, state.previous, counts)
        ]
        mu = [moving_average(m, g, self.b1) for g, m in zip(grads, state.mu)]
        delta = [moving_average(v, d, self.b2) for d, v in zip(differences, state.delta)]
        ahead = [g + self.b2 * d for g, d in zip(grads, differences)]
        nu = [moving_average(n, a * a, self.b3) for a, n in zip(ahead, state.nu)]
        updates = [
            divide_by_root(m / c1 + self.b2 * v / c2, n / c3, self.eps)
            for m, v, n, (c1, c2, c3) in zip(
                mu, delta, nu, bias_corrections(counts, mu, self.b1, self.b2, self.b3)
            )
        ]
        previous = [g.clone() for g in grads]
        return updates, ScaleByAdanState(mu, delta, nu, previous, counts)


@transformation
def scale_by_adan(
    b1: float | Tensor = 0.98,
    b2: float | Tensor = 0.92,
    b3: float | Tensor = 0.99,
    eps: float | Tensor = 1e-8,
) -> LeafRule:
    r"""Return the transformation to Adan's direction.

    .. math::
        \mu' = b_1 \mu + (1 - b_1) g, \quad
        \delta' = b_2 \delta + (1 - b_2)(g - g_{k-1}), \quad
        \nu' = b_3 \nu + (1 - b_3)(g + b_2 (g - g_{k-1}))^2, \quad
        u = \frac{\hat\mu + b_2 \hat\delta}{\sqrt{\hat\nu} + \epsilon}

    where a hat divides by 1 - b^k. The paper writes 1 - b for each b; the change of the first
    gradient is zero.

    Args:
        b1: Decay of the gradient's moment, in [0, 1).
        b2: Decay of the change's moment, in [0, 1).
        b3: Decay of the second moment, in [0, 1).
        eps: Added to the root, >= 0.

    Raises:
        ValueError: A hyper-parameter out of range.

    References:
        X. Xie, P. Zhou, H. Li, Z. Lin, S. Yan, Adan: Adaptive Nesterov Momentum Algorithm for
        Faster Optimizing Deep Models, 2022, https://arxiv.org/abs/2208.06677, Algorithm 1.
    """
    check_at_least_zero(eps, "epsilon value")
    check_betas(b1, b2, b3)
    return ScaleByAdan(b1, b2, b3, eps)
