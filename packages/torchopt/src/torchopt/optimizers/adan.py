# SPDX-License-Identifier: Apache-2.0
"""Adan: Adam with an average of the change of the gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchopt.base import GradientTransformation
from torchopt.documented import DECOUPLED, documented
from torchopt.kernels.reference.formulas import bias_correction, divide_by_root, moving_average
from torchopt.optimizers.stages import optimizer
from torchopt.transform.base import transformation_of
from torchopt.transform.rule import Hyper, Rule, at_least_zero, fraction
from torchopt.typing import ScalarOrSchedule

__all__ = ["ScaleByAdanState", "adan", "scale_by_adan"]


class ScaleByAdanState(NamedTuple):
    """`mu`, `delta`, `nu`: moments of the gradient, its change, its square; `previous`; `count`."""

    mu: Any
    delta: Any
    nu: Any
    previous: Any
    count: Any


@dataclass(frozen=True)
class Adan(Rule):
    """u = (mu_hat + b2 delta_hat) / (sqrt(nu_hat) + eps)."""

    b1: Hyper = fraction("beta parameter at index 0", 0.98)
    b2: Hyper = fraction("beta parameter at index 1", 0.92)
    b3: Hyper = fraction("beta parameter at index 2", 0.99)
    eps: Hyper = at_least_zero("epsilon value", 1e-8)
    State = ScaleByAdanState
    kernel = "adan"

    def coefficients(self, k: Any, *shared: Tensor) -> tuple[Any, ...]:
        return (k > 1, *(bias_correction(b, k) for b in (self.b1, self.b2, self.b3)))

    def apply(self, c: Any, g: Tensor, state: Any, p: Any) -> Any:
        later, mu_correction, delta_correction, nu_correction = c
        mu, delta, nu, previous = state
        change = torch.where(later, g - previous, 0.0)
        mu = moving_average(mu, g, self.b1)
        delta = moving_average(delta, change, self.b2)
        ahead = g + self.b2 * change
        nu = moving_average(nu, ahead * ahead, self.b3)
        direction = mu / mu_correction + self.b2 * delta / delta_correction
        return divide_by_root(direction, nu / nu_correction, self.eps), (mu, delta, nu, g)


@transformation_of(Adan)
def scale_by_adan() -> None:
    r"""Return the transformation that computes Adan's direction.

    .. math::
        \mu' = b_1 \mu + (1 - b_1) g, \quad
        \delta' = b_2 \delta + (1 - b_2)(g - g_{k-1}), \quad
        \nu' = b_3 \nu + (1 - b_3)(g + b_2 (g - g_{k-1}))^2, \quad
        u = \frac{\hat\mu + b_2 \hat\delta}{\sqrt{\hat\nu} + \epsilon}

    where a hat divides by 1 - b^k. The paper writes 1 - b for each b; the change of the first
    gradient is zero.

    Args:
        b1: Decay of the average of the gradient, in [0, 1).
        b2: Decay of the average of the change, in [0, 1).
        b3: Decay of the second moment, in [0, 1).

    References:
        X. Xie, P. Zhou, H. Li, Z. Lin, S. Yan, Adan: Adaptive Nesterov Momentum Algorithm for
        Faster Optimizing Deep Models, 2022, https://arxiv.org/abs/2208.06677, Algorithm 1.
    """


@documented(scale_by_adan, weight_decay=DECOUPLED)
def adan(
    lr: ScalarOrSchedule = 1e-3,
    betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """Return Adan.

    Instead of the decay, the paper divides by 1 + lr weight_decay: the same to first order.
    """
    direction = Adan.from_betas(betas, eps)
    return optimizer(
        direction, lr=lr, decoupled_weight_decay=weight_decay, maximize=maximize, name="adan"
    )
