# SPDX-License-Identifier: Apache-2.0
"""RAdam's direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from torchopt.kernels.reference.directions import radam_scalars, rectify
from torchopt.kernels.reference.moments import moving_average
from torchopt.transform.base import LeafRule, transformation
from torchopt.transform.counts import for_each_distinct, increment, same_counts, zero_counts
from torchopt.transform.starts import zeros_like
from torchopt.transform.validate import check_at_least_zero, check_fraction

__all__ = ["ScaleByRAdamState", "scale_by_radam"]


class ScaleByRAdamState(NamedTuple):
    """`mu`, `nu`: first and second moment; `t`: number of the next update, from 1; `count`: steps
    of each leaf, 0-dim int64 tensors. A leaf without a gradient takes no step; None says that all
    leaves took t - 1, as in a state of the published package.
    """

    mu: Any
    nu: Any
    t: int
    count: Any = None


@dataclass(frozen=True)
class ScaleByRAdam(LeafRule):
    """Adam with a rectified variance."""

    b1: float | Tensor
    b2: float | Tensor
    eps: float | Tensor
    moment_requires_grad: bool
    leaf_fields: ClassVar[tuple[str, ...]] = ("mu", "nu", "count")
    later_fields: ClassVar[tuple[str, ...]] = ("count",)
    overwritten_fields: ClassVar[tuple[str, ...]] = ("mu", "nu")

    def init_leaves(self, params: list[Tensor]) -> ScaleByRAdamState:
        """Return moments and counts of zero and t = 1."""
        return ScaleByRAdamState(
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
        mu = [moving_average(m, g, self.b1) for g, m in zip(grads, state.mu)]
        nu = [moving_average(n, g * g, self.b2) for g, n in zip(grads, state.nu)]
        scalars = for_each_distinct(
            lambda count, dtype: radam_scalars(self.b1, self.b2, count, dtype),
            counts,
            [g.dtype for g in grads],
        )
        updates = [rectify(m, n, self.eps, *row) for m, n, row in zip(mu, nu, scalars)]
        return updates, ScaleByRAdamState(mu=mu, nu=nu, t=state.t + 1, count=counts)


@transformation
def scale_by_radam(
    b1: float | Tensor = 0.9,
    b2: float | Tensor = 0.999,
    eps: float | Tensor = 1e-6,
    moment_requires_grad: bool = False,
) -> LeafRule:
    r"""Return the transformation to RAdam's direction.

    With the moments of Adam, t the number of steps of the leaf, this one included,
    rho_inf = 2 / (1 - b2) - 1 and rho = rho_inf - 2 t b2^t / (1 - b2^t):

    .. math::
        u = \frac{\mu'}{1 - b_1^t}\, r\, \frac{\sqrt{1 - b_2^t}}{\sqrt{\nu'} + \epsilon}, \quad
        r = \sqrt{\frac{(\rho - 4)(\rho - 2)\rho_\infty}{(\rho_\infty - 4)(\rho_\infty - 2)\rho}}
        \quad (\rho > 5), \qquad u = \frac{\mu'}{1 - b_1^t} \quad\text{otherwise}

    Where nu' is exactly zero, the derivative of u is defined to be zero.

    Args:
        b1: Decay of the first moment, in [0, 1).
        b2: Decay of the second moment, in [0, 1).
        eps: Added to the root, >= 0.
        moment_requires_grad: Make the initial moments leaves that require a gradient.

    References:
        L. Liu et al., On the Variance of the Adaptive Learning Rate and Beyond, 2020,
        https://arxiv.org/abs/1908.03265, Algorithm 2 (the threshold 5 is that of
        torch.optim.RAdam).
    """
    check_at_least_zero(eps, "epsilon value")
    check_fraction(b1, "b1 parameter at index 0")
    check_fraction(b2, "b1 parameter at index 0")
    return ScaleByRAdam(b1, b2, eps, moment_requires_grad)
