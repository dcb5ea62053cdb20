# SPDX-License-Identifier: Apache-2.0
"""Schedule-free RAdam: averaging, and a step size that grows as RAdam's variance is rectified."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchopt.base import GradientTransformation
from torchopt.documented import documented
from torchopt.kernels.reference.formulas import divide_by_root, moving_average
from torchopt.optimizers.radam import rectification
from torchopt.optimizers.schedule_free import ScheduleFree
from torchopt.optimizers.stages import compose, flip_sign_and_add_weight_decay
from torchopt.transform.rule import Hyper, Rule, at_least_zero, fraction
from torchopt.transform.validate import unpacked

__all__ = ["ScheduleFreeRadamState", "schedule_free_radam"]


class ScheduleFreeRadamState(NamedTuple):
    """`nu`: second moment; `count`: steps of each leaf."""

    nu: Any
    count: Any


@dataclass(frozen=True)
class ScaleByRectified(Rule):
    """u = g / (sqrt(nu_hat) + eps) where the variance is rectified, else u = g."""

    b2: Hyper = fraction("beta parameter at index 1")
    eps: Hyper = at_least_zero("epsilon value")
    State = ScheduleFreeRadamState

    def coefficients(self, k: Any, *shared: Tensor) -> tuple[Any, ...]:
        rectified, _, correction = rectification(self.b2, k, 4)
        return rectified, correction

    def apply(self, c: Any, g: Tensor, state: Any, p: Any) -> Any:
        rectified, correction = c
        nu = moving_average(state[0], g * g, self.b2)
        return torch.where(rectified, divide_by_root(g, nu / correction, self.eps), g), (nu,)


@dataclass(frozen=True)
class ScheduleFreeRectified(ScheduleFree):
    """The last stage, with the step size times RAdam's factor."""

    b2: Hyper = fraction("beta parameter at index 1", 0.999)
    sgd_phase: bool = False

    def _step_size(self, k: Tensor) -> Any:
        rectified, r, _ = rectification(self.b2, k, 4)
        return super()._step_size(k) * torch.where(rectified, r, float(self.sgd_phase))


@documented()
def schedule_free_radam(
    lr: float | Tensor = 2.5e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    sgd_phase: bool = False,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    r"""Return schedule-free RAdam, which needs no warm-up.

    See `torchopt.transform.schedule_free`; `torchopt.transform.averaged_params` returns the model.
    The step size is

    .. math::
        \gamma_k = \gamma
        \sqrt{\frac{(\rho - 4)(\rho - 2)\rho_\infty}{(\rho_\infty - 4)(\rho_\infty - 2)\rho}}, \quad
        \rho_\infty = \frac{2}{1 - b_2} - 1, \quad
        \rho = \rho_\infty - \frac{2 k b_2^k}{1 - b_2^k}

    if rho > 4. In the steps before that (four with the usual b2), nothing moves unless `sgd_phase`.

    Args:
        lr: gamma, >= 0.
        betas: Weight of the average in the point at which gradients are taken, and decay of the
            second moment, both in [0, 1).
        weight_decay: Coefficient of the decay, >= 0.
        sgd_phase: Take steps of SGD, of size gamma, before the variance can be rectified.

    References:
        A. Defazio et al., The Road Less Scheduled, 2024, https://arxiv.org/abs/2405.15682

        L. Liu et al., On the Variance of the Adaptive Learning Rate and Beyond, 2020,
        https://arxiv.org/abs/1908.03265, Algorithm 2.
    """
    b1, b2 = unpacked(betas, "betas", (0.9, 0.999))
    return compose(
        flip_sign_and_add_weight_decay.rule(0.0, maximize),
        ScaleByRectified(b2, eps),
        ScheduleFreeRectified(lr, b1, weight_decay, 0, b2, sgd_phase),
        name="schedule_free_radam",
    )
