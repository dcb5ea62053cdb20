# SPDX-License-Identifier: Apache-2.0
"""AdaGrad: divided by the root of the sum of all squared gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchopt.base import GradientTransformation
from torchopt.documented import documented
from torchopt.kernels.reference.formulas import divide_by_root
from torchopt.optimizers.stages import optimizer
from torchopt.schedule.formula import part
from torchopt.transform.base import transformation_of
from torchopt.transform.rule import Hyper, Rule, at_least_zero
from torchopt.transform.scale_by_schedule import ScaleBySchedule
from torchopt.transform.validate import check
from torchopt.typing import Numeric, ScalarOrSchedule

__all__ = ["ScaleByRssState", "adagrad", "scale_by_rss"]


class ScaleByRssState(NamedTuple):
    """`sum_of_squares`: sum of all squared gradients so far."""

    sum_of_squares: Any


@dataclass(frozen=True)
class AdaGrad(Rule):
    """u = g / (sqrt(s') + eps), s' = s + g^2; where s' is zero, u is zero."""

    initial_accumulator_value: Hyper = at_least_zero(
        "initial_accumulator_value value", 0.0, starts="sum_of_squares"
    )
    eps: Hyper = at_least_zero("epsilon value", 1e-10)
    State = ScaleByRssState
    kernel = "adagrad"

    def apply(self, c: Any, g: Tensor, state: Any, p: Any) -> Any:
        total = state[0] + g * g
        return torch.where(total == 0, 0.0, divide_by_root(g, total, self.eps)), (total,)


@dataclass(frozen=True)
class AdagradSchedule:
    """AdaGrad's factor on the step size: 1 / (1 + decay_rate * count), from `transition_begin`."""

    decay_rate: float
    transition_begin: int = 0

    def __call__(self, count: Numeric) -> Numeric:
        elapsed: Numeric = part(count, self.transition_begin)
        return 1 / (1 + self.decay_rate * elapsed)


_adagrad_lr_schedule = AdagradSchedule  # the published name


@transformation_of(AdaGrad)
def scale_by_rss() -> None:
    r"""Return the transformation that computes AdaGrad's direction.

    .. math::
        s' = s + g^2, \qquad u = g / (\sqrt{s'} + \epsilon)

    Where s' is zero, u and its derivative are zero.

    Args:
        initial_accumulator_value: Initial value of the sum of squares, >= 0.

    References:
        J. Duchi, E. Hazan, Y. Singer, Adaptive Subgradient Methods for Online Learning and
        Stochastic Optimization, JMLR 12, 2011, https://jmlr.org/papers/v12/duchi11a.html
    """


@documented(scale_by_rss)
def adagrad(
    lr: ScalarOrSchedule = 1e-2,
    lr_decay: float = 0.0,
    weight_decay: float = 0.0,
    initial_accumulator_value: float = 0.0,
    eps: float = 1e-10,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """Return AdaGrad.

    The update is -lr * u / (1 + lr_decay * count), with u the direction of
    `torchopt.transform.scale_by_rss` and count the number of previous updates.

    Args:
        lr_decay: Decay of the step size, >= 0.
    """
    check(lr_decay, "a number >= 0", "lr_decay value")
    return optimizer(
        AdaGrad(initial_accumulator_value, eps),
        ScaleBySchedule(AdagradSchedule(lr_decay)),
        lr=lr,
        weight_decay=weight_decay,
        maximize=maximize,
        name="adagrad",
    )
