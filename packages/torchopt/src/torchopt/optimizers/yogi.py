# SPDX-License-Identifier: Apache-2.0
"""Yogi: Adam with an additive second moment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchopt.base import GradientTransformation
from torchopt.documented import documented
from torchopt.kernels.reference.formulas import divide_by_root, moving_average
from torchopt.optimizers.stages import optimizer
from torchopt.transform.base import transformation_of
from torchopt.transform.rule import Hyper, Rule, at_least_zero, fraction
from torchopt.typing import ScalarOrSchedule

__all__ = ["ScaleByYogiState", "scale_by_yogi", "yogi"]


class ScaleByYogiState(NamedTuple):
    """`mu`, `nu`: first and second moment."""

    mu: Any
    nu: Any


@dataclass(frozen=True)
class Yogi(Rule):
    """u = mu' / (sqrt(nu') + eps), nu' = nu - (1 - b2) sign(nu - g^2) g^2."""

    b1: Hyper = fraction("beta parameter at index 0", 0.9)
    b2: Hyper = fraction("beta parameter at index 1", 0.999)
    eps: Hyper = at_least_zero("epsilon value", 1e-3)
    initial_accumulator: Hyper = at_least_zero("initial_accumulator value", 1e-6, starts="nu")
    State = ScaleByYogiState

    def apply(self, c: Any, g: Tensor, state: Any, p: Any) -> Any:
        mu, nu = state
        mu = moving_average(mu, g, self.b1)
        # Clamped to finite numbers, because the difference of two infinities is NaN.
        square = (g * g).clamp(max=torch.finfo(g.dtype).max)
        nu = nu - (1 - self.b2) * torch.sign(nu - square) * square
        return divide_by_root(mu, nu, self.eps), (mu, nu)


@transformation_of(Yogi)
def scale_by_yogi() -> None:
    r"""Return the transformation that computes Yogi's direction.

    .. math::
        \nu' = \nu - (1 - b_2)\,\mathrm{sign}(\nu - g^2)\,g^2, \qquad
        u = \mu' / (\sqrt{\nu'} + \epsilon)

    with Adam's first moment and, as in the paper, no correction of the bias.

    Args:
        initial_accumulator: Initial value of the second moment, >= 0.

    References:
        M. Zaheer, S. Reddi, D. Sachan, S. Kale, S. Kumar, Adaptive Methods for Nonconvex
        Optimization, NeurIPS 2018, Algorithm 2.
    """


@documented(scale_by_yogi)
def yogi(
    lr: ScalarOrSchedule = 1e-2,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-3,
    weight_decay: float = 0.0,
    initial_accumulator: float = 1e-6,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """Return Yogi."""
    direction = Yogi.from_betas(betas, eps, initial_accumulator)
    return optimizer(direction, lr=lr, weight_decay=weight_decay, maximize=maximize, name="yogi")
