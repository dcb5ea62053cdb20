# SPDX-License-Identifier: Apache-2.0
"""AdaBelief: Adam with the variance around the first moment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from torchopt.base import GradientTransformation
from torchopt.documented import DECOUPLED, documented
from torchopt.kernels.reference.formulas import bias_correction, divide_by_root, moving_average
from torchopt.optimizers.stages import optimizer
from torchopt.transform.base import transformation_of
from torchopt.transform.rule import Hyper, Rule, at_least_zero, fraction
from torchopt.typing import ScalarOrSchedule

__all__ = ["ScaleByBeliefState", "adabelief", "scale_by_belief"]


class ScaleByBeliefState(NamedTuple):
    """`mu`: first moment; `nu`: variance around it; `count`: steps of each leaf."""

    mu: Any
    nu: Any
    count: Any


@dataclass(frozen=True)
class AdaBelief(Rule):
    """u = mu_hat / (sqrt(nu_hat) + eps), nu' = b2 nu + (1 - b2) (g - mu')^2 + eps."""

    b1: Hyper = fraction("beta parameter at index 0", 0.9)
    b2: Hyper = fraction("beta parameter at index 1", 0.999)
    eps: Hyper = at_least_zero("epsilon value", 1e-16)
    State = ScaleByBeliefState
    kernel = "adabelief"

    def coefficients(self, k: Any, *shared: Tensor) -> tuple[Any, ...]:
        return bias_correction(self.b1, k), bias_correction(self.b2, k)

    def apply(self, c: Any, g: Tensor, state: Any, p: Any) -> Any:
        mu = moving_average(state[0], g, self.b1)
        nu = moving_average(state[1], (g - mu) * (g - mu), self.b2) + self.eps
        return divide_by_root(mu / c[0], nu / c[1], self.eps), (mu, nu)


@transformation_of(AdaBelief)
def scale_by_belief() -> None:
    r"""Return the transformation that computes AdaBelief's direction.

    .. math::
        s' = b_2 s + (1 - b_2) (g - \mu')^2 + \epsilon, \qquad
        u = \frac{\mu' / (1 - b_1^k)}{\sqrt{s' / (1 - b_2^k)} + \epsilon}

    with Adam's first moment.

    References:
        J. Zhuang et al., AdaBelief Optimizer: Adapting Stepsizes by the Belief in Observed
        Gradients, 2020, https://arxiv.org/abs/2010.07468, Algorithm 2.
    """


@documented(scale_by_belief, weight_decay=DECOUPLED)
def adabelief(
    lr: ScalarOrSchedule = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-16,
    weight_decay: float = 0.0,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """Return AdaBelief."""
    direction = AdaBelief.from_betas(betas, eps)
    return optimizer(
        direction, lr=lr, decoupled_weight_decay=weight_decay, maximize=maximize, name="adabelief"
    )
