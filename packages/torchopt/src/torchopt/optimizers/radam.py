# SPDX-License-Identifier: Apache-2.0
"""RAdam: Adam with a rectified variance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchopt.base import GradientTransformation
from torchopt.documented import documented
from torchopt.kernels.reference.formulas import (
    bias_correction,
    divide_by_root,
    in_double,
    moving_average,
)
from torchopt.optimizers.stages import optimizer
from torchopt.transform.base import transformation_of
from torchopt.transform.rule import Hyper, Rule, at_least_zero, fraction
from torchopt.typing import ScalarOrSchedule

__all__ = ["ScaleByRAdamState", "radam", "scale_by_radam"]


class ScaleByRAdamState(NamedTuple):
    """`mu`, `nu`: first and second moment; `t`: number of the next update, from 1; `count`: steps
    of each leaf, 0-dim int64 tensors.

    A leaf without a gradient takes no step. A `count` of None, as in states of the published
    package, means that each leaf took t - 1 steps.
    """

    mu: Any
    nu: Any
    t: Any
    count: Any = None


def rectification(b2: Hyper, k: Tensor, least: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return whether the variance is rectified in step k, where rho > `least`, the factor r there,
    and 1 - b2^k.
    """
    b2 = in_double(b2, k)
    correction = bias_correction(b2, k)
    rho_inf = 2 / (1 - b2) - 1
    rho = rho_inf - 2 * k.to(torch.float64) * torch.pow(b2, k) / correction
    rectified = rho > least
    # Elsewhere the values are not used; 6 keeps derivatives from being 0 times infinity.
    rho, rho_inf = (torch.where(rectified, x, 6.0) for x in (rho, rho_inf))
    r2 = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
    return rectified, torch.sqrt(r2), correction


@dataclass(frozen=True)
class RAdam(Rule):
    """u = mu_hat r sqrt(1 - b2^k) / (sqrt(nu') + eps) where rho > 5, else u = mu_hat."""

    b1: Hyper = fraction("b1 parameter at index 0", 0.9)
    b2: Hyper = fraction("b1 parameter at index 0", 0.999)
    eps: Hyper = at_least_zero("epsilon value", 1e-6)
    moment_requires_grad: bool = False
    State = ScaleByRAdamState
    kernel = "radam"

    def coefficients(self, k: Any, *shared: Tensor) -> tuple[Any, ...]:
        rectified, r, nu_correction = rectification(self.b2, k, 5)
        return rectified, r * torch.sqrt(nu_correction), bias_correction(self.b1, k)

    def apply(self, c: Any, g: Tensor, state: Any, p: Any) -> Any:
        rectified, factor, mu_correction = c
        mu = moving_average(state[0], g, self.b1)
        nu = moving_average(state[1], g * g, self.b2)
        scaled = mu / mu_correction
        u = torch.where(rectified, divide_by_root(scaled * factor, nu, self.eps), scaled)
        return u, (mu, nu)


@transformation_of(RAdam)
def scale_by_radam() -> None:
    r"""Return the transformation that computes RAdam's direction.

    With the moments of Adam, t the number of steps of the leaf, this one included,
    rho_inf = 2 / (1 - b2) - 1 and rho = rho_inf - 2 t b2^t / (1 - b2^t):

    .. math::
        u = \frac{\mu'}{1 - b_1^t}\, r\, \frac{\sqrt{1 - b_2^t}}{\sqrt{\nu'} + \epsilon}, \quad
        r = \sqrt{\frac{(\rho - 4)(\rho - 2)\rho_\infty}{(\rho_\infty - 4)(\rho_\infty - 2)\rho}}
        \quad (\rho > 5), \qquad u = \frac{\mu'}{1 - b_1^t} \quad\text{otherwise}

    Where nu' is zero, the derivative of u is defined to be zero.

    References:
        L. Liu et al., On the Variance of the Adaptive Learning Rate and Beyond, 2020,
        https://arxiv.org/abs/1908.03265, Algorithm 2 (the threshold 5 is that of
        torch.optim.RAdam).
    """


@documented(scale_by_radam)
def radam(
    lr: ScalarOrSchedule = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    *,
    moment_requires_grad: bool = False,
) -> GradientTransformation:
    """Return RAdam."""
    direction = RAdam.from_betas(betas, eps, moment_requires_grad)
    return optimizer(direction, lr=lr, weight_decay=weight_decay, name="radam")
