# SPDX-License-Identifier: Apache-2.0
"""RAdam's direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from torchopt.kernels.reference.moments import moving_average
from torchopt.kernels.reference.root import divide_by_root
from torchopt.transform.base import LeafRule, transformation
from torchopt.transform.trace import zeros_like
from torchopt.transform.validate import check_at_least_zero, check_fraction

__all__ = ["ScaleByRAdamState", "scale_by_radam"]


class ScaleByRAdamState(NamedTuple):
    """`mu`, `nu`: first and second moment; `t`: number of the next step, from 1."""

    mu: Any
    nu: Any
    t: int


@dataclass(frozen=True)
class ScaleByRAdam(LeafRule):
    """Adam with a rectified variance."""

    b1: float
    b2: float
    eps: float
    moment_requires_grad: bool
    leaf_fields: ClassVar[tuple[str, ...]] = ("mu", "nu")
    overwritten_fields: ClassVar[tuple[str, ...]] = ("mu", "nu")

    def init_leaves(self, params: list[Tensor]) -> ScaleByRAdamState:
        """Return moments of zero and t = 1."""
        return ScaleByRAdamState(
            mu=zeros_like(params, self.moment_requires_grad),
            nu=zeros_like(params, self.moment_requires_grad),
            t=1,
        )

    def update_leaves(
        self, grads: list[Tensor], state: Any, params: list[Tensor], *, inplace: bool
    ) -> tuple[list[Tensor], Any]:
        """Return the directions and the new moments."""
        t = state.t
        mu = [moving_average(m, g, self.b1) for g, m in zip(grads, state.mu)]
        nu = [moving_average(n, g * g, self.b2) for g, n in zip(grads, state.nu)]
        mu_correction = 1 - self.b1**t
        nu_correction = 1 - self.b2**t
        rho_inf = 2 / (1 - self.b2) - 1
        rho = rho_inf - 2 * t * self.b2**t / nu_correction
        if rho > 5:
            rectification = (
                (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
            ) ** 0.5
            factor = rectification * nu_correction**0.5 / mu_correction
            updates = [divide_by_root(m * factor, n, self.eps) for m, n in zip(mu, nu)]
        else:
            updates = [m / mu_correction for m in mu]
        return updates, ScaleByRAdamState(mu=mu, nu=nu, t=t + 1)


@transformation
def scale_by_radam(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-6, moment_requires_grad: bool = False
) -> LeafRule:
    r"""Return the transformation to RAdam's direction.

    With the moments of Adam, rho_inf = 2 / (1 - b2) - 1 and rho = rho_inf - 2 t b2^t / (1 - b2^t):

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
