# SPDX-License-Identifier: Apache-2.0
"""AdaBelief's direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from torchopt.kernels.reference.moments import moving_average
from torchopt.kernels.reference.root import divide_by_root
from torchopt.transform.base import LeafRule, transformation
from torchopt.transform.counts import bias_corrections, increment, zero_counts
from torchopt.transform.starts import zeros_like
from torchopt.transform.validate import check_at_least_zero, check_betas

__all__ = ["ScaleByBeliefState", "scale_by_belief"]


class ScaleByBeliefState(NamedTuple):
    """`mu`: first moment; `nu`: variance around it; `count`: steps of each leaf."""

    mu: Any
    nu: Any
    count: Any


@dataclass(frozen=True)
class ScaleByBelief(LeafRule):
    """Adam with the variance around the first moment."""

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

    def init_leaves(self, params: list[Tensor]) -> ScaleByBeliefState:
        """Return moments and counts of zero."""
        return ScaleByBeliefState(
            mu=zeros_like(params, False),
            nu=zeros_like(params, False),
            count=zero_counts(params),
        )

    def update_leaves(
        self, grads: list[Tensor], state: Any, params: list[Tensor], *, inplace: bool
    ) -> tuple[list[Tensor], Any]:
        """Return the directions and the new state."""
        counts = increment(state.count)
        mu = [moving_average(m, g, self.b1) for g, m in zip(grads, state.mu)]
        nu = [
            moving_average(n, (g - m) * (g - m), self.b2) + self.eps
            for g, m, n in zip(grads, mu, state.nu)
        ]
        updates = [
            divide_by_root(m / c1, n / c2, self.eps)
            for m, n, (c1, c2) in zip(mu, nu, bias_corrections(counts, mu, self.b1, self.b2))
        ]
        return updates, ScaleByBeliefState(mu=mu, nu=nu, count=counts)


@transformation
def scale_by_belief(
    b1: float | Tensor = 0.9,
    b2: float | Tensor = 0.999,
    eps: float | Tensor = 1e-16,
) -> LeafRule:
    r"""Return the transformation to AdaBelief's direction.

    .. math::
        s' = b_2 s + (1 - b_2) (g - \mu')^2 + \epsilon, \qquad
        u = \frac{\mu' / (1 - b_1^k)}{\sqrt{s' / (1 - b_2^k)} + \epsilon}

    with Adam's first moment.

    Args:
        b1: Decay of the first moment, in [0, 1).
        b2: Decay of the second moment, in [0, 1).
        eps: Added to the root, >= 0.

    Raises:
        ValueError: A hyper-parameter out of range.

    References:
        J. Zhuang et al., AdaBelief Optimizer: Adapting Stepsizes by the Belief in Observed
        Gradients, 2020, https://arxiv.org/abs/2010.07468, Algorithm 2.
    """
    check_at_least_zero(eps, "epsilon value")
    check_betas(b1, b2)
    return ScaleByBelief(b1, b2, eps)
