# SPDX-License-Identifier: Apache-2.0
"""AdaMax."""

from __future__ import annotations

from torchopt.alias.utils import (
    compose,
    flip_sign_and_add_weight_decay,
    scale_by_neg_lr,
)
from torchopt.base import GradientTransformation
from torchopt.transform import scale_by_adamax
from torchopt.transform.validate import unpacked
from torchopt.typing import ScalarOrSchedule

__all__ = ["adamax"]


def adamax(
    lr: ScalarOrSchedule = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    *,
    moment_requires_grad: bool = False,
) -> GradientTransformation:
    """Return AdaMax.

    The update is -lr * u, with u the direction of `torchopt.transform.scale_by_adamax`.

    Args:
        lr: Step size: a number >= 0, a 0-dim tensor with respect to which steps are differentiable,
            or a schedule that maps the number of previous updates to either.
        betas: Decays of the two moments, in [0, 1).
        eps: Added to the denominator, >= 0.
        weight_decay: Coefficient of the penalty weight_decay / 2 * |p|^2 on the parameters, >= 0.
        moment_requires_grad: Make the initial moments leaves that require a gradient.

    Raises:
        ValueError: A hyper-parameter out of range.

    References:
        D. P. Kingma, J. Ba, Adam: A Method for Stochastic Optimization, 2015,
        https://arxiv.org/abs/1412.6980
    """
    return compose(
        (flip_sign_and_add_weight_decay, (weight_decay, False)),
        (scale_by_adamax, (*unpacked(betas, 2, "betas"), eps, moment_requires_grad)),
        (scale_by_neg_lr, (lr,)),
    )
