# SPDX-License-Identifier: Apache-2.0
"""ADOPT's direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from torchopt.kernels.reference.moments import moving_average
from torchopt.kernels.reference.root import root
from torchopt.transform.base import LeafRule, transformation
from torchopt.transform.counts import increment, zero_counts
from torchopt.transform.starts import zeros_like
from torchopt.transform.validate import check_at_least_zero, check_betas

__all__ = ["ScaleByAdoptState", "scale_by_adopt"]


class ScaleByAdoptState(NamedTuple):
    """`mu`, `nu`: first and second moment; `count`: steps of each leaf."""

    mu: Any
    nu: Any
    count: Any


@dataclass(frozen=True)
class ScaleByAdopt(LeafRule):
    """Momentum over gradients scaled by the second moment before them."""

    b1: float | Tensor
    b2: float | Tensor
    eps: float | Tensor
    leaf_fields: ClassVar[tuple[str, ...]] = (
        "mu",
        "nu",
        "count",
    )
    overwritten_fields: ClassVar[tuple[str, ...]] = (
        "mu",
        "nu",
    )

    def init_leaves(self, params: list[Tensor]) -> ScaleByAdoptState:
        """Return moments and counts of zero."""
        return ScaleByAdoptState(
            mu=zeros_like(params, False),
            nu=zeros_like(params, False),
            count=zero_counts(params),
        )

    def update_leaves(
        self, grads: list[Tensor], state: Any, params: list[Tensor], *, inplace: bool
    ) -> tuple[list[Tensor], Any]:
        """Return the directions and the new state."""
        mu = []
        nu = []
        for g, m, n, k in zip(grads, state.mu, state.nu, state.count):
            first = k == 0
            limit = torch.pow(k.to(torch.float64), 0.25).to(g.dtype)
            scaled = g / root(n).clamp(min=self.eps)
            clipped = torch.minimum(torch.maximum(scaled, -limit), limit)
            mu.append(torch.where(first, m, moving_average(m, clipped, self.b1)))
            nu.append(torch.where(first, g * g, moving_average(n, g * g, self.b2)))
        return [m.clone() for m in mu], ScaleByAdoptState(mu, nu, increment(state.count))


@transformation
def scale_by_adopt(
    b1: float | Tensor = 0.9,
    b2: float | Tensor = 0.9999,
    eps: float | Tensor = 1e-6,
) -> LeafRule:
    r"""Return the transformation to ADOPT's direction.

    .. math::
        \mu' = b_1 \mu + (1 - b_1)\,\mathrm{clip}(g / \max(\sqrt{\nu}, \epsilon), \pm k^{1/4}),
        \quad u = \mu', \quad \nu' = b_2 \nu + (1 - b_2) g^2

    The first gradient only sets nu = g^2; k counts the steps after it, from 1.

    Args:
        b1: Decay of the first moment, in [0, 1).
        b2: Decay of the second moment, in [0, 1).
        eps: Smallest divisor, >= 0.

    Raises:
        ValueError: A hyper-parameter out of range.

    References:
        S. Taniguchi et al., ADOPT: Modified Adam Can Converge with Any beta2 with the Optimal
        Rate, 2024, https://arxiv.org/abs/2411.02853, Algorithm 2.
    """
    check_at_least_zero(eps, "epsilon value")
    check_betas(b1, b2)
    return ScaleByAdopt(b1, b2, eps)
