# SPDX-License-Identifier: Apache-2.0
"""AdaMax's direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from torchopt.kernels.reference.moments import moving_average
from torchopt.transform.base import LeafRule, transformation
from torchopt.transform.counts import bias_corrections, increment, same_counts, zero_counts
from torchopt.transform.starts import zeros_like
from torchopt.transform.validate import check_at_least_zero, check_fraction

__all__ = ["ScaleByAdamaxState", "scale_by_adamax"]


class ScaleByAdamaxState(NamedTuple):
    """`mu`: first moment; `nu`: decaying maximum of |g|; `t`: number of the next update, from 1;
    `count`: steps of each leaf, 0-dim int64 tensors. A leaf without a gradient takes no step; None
    says that all leaves took t - 1, as in a state of the published package.
    """

    mu: Any
    nu: Any
    t: int
    count: Any = None


@dataclass(frozen=True)
class ScaleByAdamax(LeafRule):
    """u = mu' / nu' / (1 - b1^t)."""

    b1: float | Tensor
    b2: float | Tensor
    eps: float | Tensor
    moment_requires_grad: bool
    leaf_fields: ClassVar[tuple[str, ...]] = ("mu", "nu", "count")
    later_fields: ClassVar[tuple[str, ...]] = ("count",)
    overwritten_fields: ClassVar[tuple[str, ...]] = ("mu", "nu")

    def init_leaves(self, params: list[Tensor]) -> ScaleByAdamaxState:
        """Return moments and counts of zero and t = 1."""
        return ScaleByAdamaxState(
            mu=zeros_like(params, self.moment_requires_grad),
            nu=zeros_like(params, self.moment_requires_grad),
            t=1,
            count=zero_counts(params),
        )

    def complete(self, state: Any) -> Any:
        """Return the state with the counts that its `t` stands for."""
        return state._replace(count=same_counts(state.mu, state.t - 1))

    def update_leaves(
        self, grads: list[Tensor], state: Any, params: list[Tensor], *, inplace: bool
    ) -> tuple[list[Tensor], Any]:
        """Return the directions and the new moments."""
        counts = increment(state.count)
        corrections = bias_corrections(counts, grads, self.b1)
        mu = [moving_average(m, g, self.b1) for g, m in zip(grads, state.mu)]
        nu = [torch.maximum(n * self.b2, g.abs() + self.eps) for g, n in zip(grads, state.nu)]
        updates = [m / n / correction for m, n, (correction,) in zip(mu, nu, corrections)]
        return updates, ScaleByAdamaxState(mu=mu, nu=nu, t=state.t + 1, count=counts)


@transformation
def scale_by_adamax(
    b1: float | Tensor = 0.9,
    b2: float | Tensor = 0.999,
    eps: float | Tensor = 1e-6,
    moment_requires_grad: bool = False,
) -> LeafRule:
    r"""Return the transformation to AdaMax's direction.

    .. math::
        \mu' = b_1 \mu + (1 - b_1) g, \quad \nu' = \max(b_2 \nu, |g| + \epsilon), \quad
        u = \frac{\mu'}{\nu' (1 - b_1^t)}

    with t the number of steps of the leaf, this one included.

    Args:
        b1: Decay of the first moment, in [0, 1).
        b2: Decay of the maximum, in [0, 1).
        eps: Added to |g|, >= 0.
        moment_requires_grad: Make the initial moments leaves that require a gradient.

    References:
        D. P. Kingma, J. Ba, Adam: A Method for Stochastic Optimization, 2015,
        https://arxiv.org/abs/1412.6980, Algorithm 2.
    """
    check_at_least_zero(eps, "epsilon value")
    check_fraction(b1, "b1 parameter at index 0")
    check_fraction(b2, "b1 parameter at index 0")
    return ScaleByAdamax(b1, b2, eps, moment_requires_grad)
