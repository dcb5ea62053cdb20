# SPDX-License-Identifier: Apache-2.0
"""MARS: AdamW on gradients whose variance is reduced by means of the previous gradient."""

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
from torchopt.transform.norm import scaled
from torchopt.transform.rule import Hyper, Rule, at_least_zero, fraction
from torchopt.typing import ScalarOrSchedule

__all__ = ["ScaleByMarsState", "mars", "scale_by_mars"]


class ScaleByMarsState(NamedTuple):
    """`mu`, `nu`: moments of the corrected gradient; `previous`: the last gradient; `count`."""

    mu: Any
    nu: Any
    previous: Any
    count: Any


@dataclass(frozen=True)
class Mars(Rule):
    """Adam's direction for c = g + gamma b1 / (1 - b1) (g - previous), no longer than 1."""

    b1: Hyper = fraction("beta parameter at index 0", 0.95)
    b2: Hyper = fraction("beta parameter at index 1", 0.99)
    gamma: Hyper = at_least_zero("gamma value", 0.025)
    eps: Hyper = at_least_zero("epsilon value", 1e-8)
    State = ScaleByMarsState

    def coefficients(self, k: Any, *shared: Tensor) -> tuple[Any, ...]:
        return k > 1, bias_correction(self.b1, k), bias_correction(self.b2, k)

    def apply(self, c: Any, g: Tensor, state: Any, p: Any) -> Any:
        later, mu_correction, nu_correction = c
        mu, nu, previous = state
        change = torch.where(later, g - previous, 0.0)
        size, unit, norm = scaled(g + self.gamma * self.b1 / (1 - self.b1) * change)
        # c / max(1, |c|), written so that no intermediate value leaves the range of the dtype.
        corrected = unit / torch.maximum(norm, 1 / size)
        mu = moving_average(mu, corrected, self.b1)
        nu = moving_average(nu, corrected * corrected, self.b2)
        direction = divide_by_root(mu / mu_correction, nu / nu_correction, self.eps)
        return direction, (mu, nu, g)


@transformation_of(Mars)
def scale_by_mars() -> None:
    r"""Return the transformation that computes the direction of MARS-AdamW.

    .. math::
        c = g + \gamma \frac{b_1}{1 - b_1} (g - g_{k-1}), \quad
        \tilde c = c / \max(1, |c|), \quad
        \mu' = b_1 \mu + (1 - b_1) \tilde c, \quad \nu' = b_2 \nu + (1 - b_2) \tilde c^2, \quad
        u = \frac{\mu' / (1 - b_1^k)}{\sqrt{\nu' / (1 - b_2^k)} + \epsilon}

    The norm is that of each tensor, as in the authors' code. This is the approximate form, in which
    the previous gradient is that of the previous batch. The change of the first gradient is zero.
    At the kink |c| = 1 the derivative is the mean of both sides.

    Args:
        gamma: Weight of the correction, >= 0.

    References:
        H. Yuan, Y. Liu, S. Wu, X. Zhou, Q. Gu, MARS: Unleashing the Power of Variance Reduction for
        Training Large Models, 2024, https://arxiv.org/abs/2411.10438, Algorithm 2.
    """


@documented(scale_by_mars, weight_decay=DECOUPLED)
def mars(
    lr: ScalarOrSchedule = 3e-3,
    betas: tuple[float, float] = (0.95, 0.99),
    gamma: float = 0.025,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """Return MARS, in the form of AdamW.

    Args:
        gamma: Weight of the correction by the previous gradient, >= 0.
    """
    direction = Mars.from_betas(betas, gamma, eps)
    return optimizer(
        direction, lr=lr, decoupled_weight_decay=weight_decay, maximize=maximize, name="mars"
    )
