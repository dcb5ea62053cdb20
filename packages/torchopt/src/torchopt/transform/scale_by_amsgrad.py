# SPDX-License-Identifier: Apache-2.0
"""AMSGrad's direction."""

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

__all__ = ["ScaleByAmsgradState", "scale_by_amsgrad"]


class ScaleByAmsgradState(NamedTuple):
    """`mu`, `nu`: moments; `nu_max`: largest second moment so far; `count`: steps of each leaf."""

    mu: Any
    nu: Any
    nu_max: Any
    count: Any


@dataclass(frozen=True)
class ScaleByAmsgrad(LeafRule):
    """Adam with the largest second moment so far."""

    b1: float | Tensor
    b2: float | Tensor
    eps: float | Tensor
    leaf_fields: ClassVar[tuple[str, ...]] = (
        "mu",
        "nu",
        "nu_max",
        "count",
    )
    overwritten_fields: ClassVar[tuple[str, ...]] = (
        "mu",
        "nu",
        "nu_max",
    )

    def init_leaves(self, params: list[Tensor]) -> ScaleByAmsgradState:
        """Return moments and counts of zero."""
        return ScaleByAmsgradState(
            mu=zeros_like(params, False),
            nu=zeros_like(params, False),
            nu_max=zeros_like(params, False),
            count=zero_counts(params),
        )

    def update_leaves(
        self, grads: list[Tensor], state: Any, params: list[Tensor], *, inplace: bool
    ) -> tuple[list[Tensor], Any]:
        """Return the directions and the new state."""
        counts = increment(state.count)
        mu = [moving_average(m, g, self.b1) for g, m in zip(grads, state.mu)]
        nu = [moving_average(n, g * g, self.b2) for g, n in zip(grads, state.nu)]
        nu_max = [torch.maximum(old, n) for old, n in zip(state.nu_max, nu)]
        updates = [
            divide_by_root(m / c1, n / c2, self.eps)
            for m, n, (c1, c2) in zip(mu, nu_max, bias_corrections(counts, mu, self.b1, self.b2))
        ]
        return updates, ScaleByAmsgradState(mu=mu, nu=nu, nu_max=nu_max, count=counts)


@transformation
def scale_by_amsgrad(
    b1: float | Tensor = 0.9,
    b2: float | Tensor = 0.999,
    eps: float | Tensor = 1e-8,
) -> LeafRule:
    r"""Return the transformation to AMSGrad's direction.

    .. math::
        \hat\nu' = \max(\hat\nu, \nu'), \qquad
        u = \frac{\mu' / (1 - b_1^k)}{\sqrt{\hat\nu' / (1 - b_2^k)} + \epsilon}

    with Adam's moments. The corrections are those of torch.optim.Adam.

    Args:
        b1: Decay of the first moment, in [0, 1).
        b2: Decay of the second moment, in [0, 1).
        eps: Added to the root, >= 0.

    Raises:
        ValueError: A hyper-parameter out of range.

    References:
        S. J. Reddi, S. Kale, S. Kumar, On the Convergence of Adam and Beyond, 2018,
        https://arxiv.org/abs/1904.09237, Algorithm 2.
    """
    check_at_least_zero(eps, "epsilon value")
    check_betas(b1, b2)
    return ScaleByAmsgrad(b1, b2, eps)
