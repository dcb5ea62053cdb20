# SPDX-License-Identifier: Apache-2.0
"""AdaMax: Adam with a decaying maximum in place of the second moment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchopt.base import GradientTransformation
from torchopt.documented import documented
from torchopt.kernels.reference.formulas import bias_correction, moving_average
from torchopt.optimizers.stages import optimizer
from torchopt.transform.base import transformation_of
from torchopt.transform.rule import Hyper, Rule, at_least_zero, fraction
from torchopt.typing import ScalarOrSchedule

__all__ = ["ScaleByAdamaxState", "adamax", "scale_by_adamax"]


class ScaleByAdamaxState(NamedTuple):
    """`mu`: first moment; `nu`: decaying maximum of |g|; `t`: number of the next update, from 1;
    `count`: steps of each leaf, 0-dim int64 tensors.

    A leaf without a gradient takes no step. A `count` of None, as in states of the published
    package, means that each leaf took t - 1 steps.
    """

    mu: Any
    nu: Any
    t: Any
    count: Any = None


@dataclass(frozen=True)
class AdaMax(Rule):
    """u = mu' / nu' / (1 - b1^k), nu' = max(b2 nu, |g| + eps)."""

    b1: Hyper = fraction("b1 parameter at index 0", 0.9)
    b2: Hyper = fraction("b1 parameter at index 0", 0.999)
    eps: Hyper = at_least_zero("epsilon value", 1e-6)
    moment_requires_grad: bool = False
    State = ScaleByAdamaxState
    kernel = "adamax"

    def coefficients(self, k: Any, *shared: Tensor) -> tuple[Any, ...]:
        return (bias_correction(self.b1, k),)

    def apply(self, c: Any, g: Tensor, state: Any, p: Any) -> Any:
        mu = moving_average(state[0], g, self.b1)
        nu = torch.maximum(state[1] * self.b2, g.abs() + self.eps)
        return mu / nu / c[0], (mu, nu)


@transformation_of(AdaMax)
def scale_by_adamax() -> None:
    r"""Return the transformation that computes AdaMax's direction.

    .. math::
        \mu' = b_1 \mu + (1 - b_1) g, \quad \nu' = \max(b_2 \nu, |g| + \epsilon), \quad
        u = \frac{\mu'}{\nu' (1 - b_1^t)}

    with t the number of steps of the leaf, this one included.

    Args:
        b2: Decay of the maximum, in [0, 1).
        eps: Added to |g|, >= 0.

    References:
        D. P. Kingma, J. Ba, Adam: A Method for Stochastic Optimization, 2015,
        https://arxiv.org/abs/1412.6980, Algorithm 2.
    """


@documented(scale_by_adamax)
def adamax(
    lr: ScalarOrSchedule = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    *,
    moment_requires_grad: bool = False,
) -> GradientTransformation:
    """Return AdaMax."""
    direction = AdaMax.from_betas(betas, eps, moment_requires_grad)
    return optimizer(direction, lr=lr, weight_decay=weight_decay, name="adamax")
