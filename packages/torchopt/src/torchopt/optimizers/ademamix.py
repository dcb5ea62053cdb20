# SPDX-License-Identifier: Apache-2.0
"""AdEMAMix: Adam with a second, much slower average of the gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchopt.base import GradientTransformation
from torchopt.documented import DECOUPLED, documented
from torchopt.kernels.reference.formulas import (
    bias_correction,
    divide_by_root,
    in_double,
    moving_average,
)
from torchopt.optimizers.stages import optimizer
from torchopt.transform.base import transformation_of
from torchopt.transform.rule import Hyper, Rule, at_least_zero, fraction
from torchopt.transform.validate import are_numbers
from torchopt.typing import ScalarOrSchedule

__all__ = ["ScaleByAdemamixState", "ademamix", "scale_by_ademamix"]


class ScaleByAdemamixState(NamedTuple):
    """`mu`, `slow`: fast and slow average of the gradient; `nu`: of its square; `count`."""

    mu: Any
    slow: Any
    nu: Any
    count: Any


@dataclass(frozen=True)
class Ademamix(Rule):
    """u = (mu_hat + alpha_k slow) / (sqrt(nu_hat) + eps)."""

    b1: Hyper = fraction("beta parameter at index 0", 0.9)
    b2: Hyper = fraction("beta parameter at index 1", 0.999)
    b3: Hyper = fraction("beta parameter at index 2", 0.9999)
    alpha: Hyper = at_least_zero("alpha value", 5.0)
    eps: Hyper = at_least_zero("epsilon value", 1e-8)
    warmup_steps: int = at_least_zero("warmup_steps value", 0)
    State = ScaleByAdemamixState
    kernel = "ademamix"

    def coefficients(self, k: Any, *shared: Tensor) -> tuple[Any, ...]:
        corrections = bias_correction(self.b1, k), bias_correction(self.b2, k)
        if are_numbers(self.warmup_steps) and self.warmup_steps == 0:
            return (*corrections, self.alpha, self.b3)
        done = (k.to(torch.float64) / self.warmup_steps).clamp(max=1.0)
        start, end = in_double(self.b1, k), in_double(self.b3, k)
        # The half-life of the average grows linearly.
        decay = torch.exp(1 / ((1 - done) / torch.log(start) + done / torch.log(end)))
        decay = torch.where(done < 1, torch.minimum(decay, end), end)
        return (*corrections, done * self.alpha, decay)

    def apply(self, c: Any, g: Tensor, state: Any, p: Any) -> Any:
        mu_correction, nu_correction, alpha, b3 = c
        mu, slow, nu = state
        mu = moving_average(mu, g, self.b1)
        slow = moving_average(slow, g, b3)
        nu = moving_average(nu, g * g, self.b2)
        direction = mu / mu_correction + alpha * slow
        return divide_by_root(direction, nu / nu_correction, self.eps), (mu, slow, nu)


@transformation_of(Ademamix)
def scale_by_ademamix() -> None:
    r"""Return the transformation that computes AdEMAMix's direction.

    .. math::
        \mu' = b_1 \mu + (1 - b_1) g, \quad s' = b_3^{(k)} s + (1 - b_3^{(k)}) g, \quad
        \nu' = b_2 \nu + (1 - b_2) g^2, \quad
        u = \frac{\mu' / (1 - b_1^k) + \alpha^{(k)} s'}{\sqrt{\nu' / (1 - b_2^k)} + \epsilon}

    With a warm-up of w steps, f = min(k / w, 1), alpha^(k) = f alpha, and the slow decay goes from
    b1 to b3 with 1 / ln b^(k) = (1 - f) / ln b1 + f / ln b3, which it does not exceed.

    Args:
        b1: Decay of the fast average, in [0, 1).
        b3: Decay of the slow average, in [0, 1).
        alpha: Weight of the slow average, >= 0.
        warmup_steps: w; 0 for none.

    References:
        M. Pagliardini, P. Ablin, D. Grangier, The AdEMAMix Optimizer: Better, Faster, Older, 2024,
        https://arxiv.org/abs/2409.03137, Algorithm 1.
    """


@documented(scale_by_ademamix, weight_decay=DECOUPLED)
def ademamix(
    lr: ScalarOrSchedule = 1e-3,
    betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
    alpha: float = 5.0,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    warmup_steps: int = 0,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """Return AdEMAMix.

    Args:
        betas: Decays of the fast average, of the second moment and of the slow average, in [0, 1).
        warmup_steps: Number of steps in which the slow average reaches its full weight; 0 for none.
            The paper uses the length of the training.
    """
    direction = Ademamix.from_betas(betas, alpha, eps, warmup_steps)
    return optimizer(
        direction, lr=lr, decoupled_weight_decay=weight_decay, maximize=maximize, name="ademamix"
    )
