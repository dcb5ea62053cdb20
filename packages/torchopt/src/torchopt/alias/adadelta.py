# SPDX-License-Identifier: Apache-2.0
"""AdaDelta."""

from __future__ import annotations

from torchopt.alias.utils import (
    compose,
    flip_sign_and_add_weight_decay,
    scale_by_neg_lr,
)
from torchopt.base import GradientTransformation
from torchopt.transform import scale_by_adadelta
from torchopt.transform.validate import check_fraction
from torchopt.typing import ScalarOrSchedule

__all__ = ["adadelta"]


def adadelta(
    lr: ScalarOrSchedule = 1e-3,
    rho: float = 0.9,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    *,
    moment_requires_grad: bool = False,
) -> GradientTransformation:
    """Return AdaDelta.

    The update is -lr * u, with u the direction of `torchopt.transform.scale_by_adadelta`.

    Args:
        lr: Step size: a number >= 0, a 0-dim tensor with respect to which steps are differentiable,
            or a schedule that maps the number of previous updates to either.
        rho: Decay of both averages, in [0, 1].
        eps: Added under both roots, >= 0.
        weight_decay: Coefficient of the penalty weight_decay / 2 * |p|^2 on the parameters, >= 0.
        moment_requires_grad: Make the initial moments leaves that require a gradient.

    Raises:
        ValueError: A hyper-parameter out of range.

    References:
        M. D. Zeiler, ADADELTA: An Adaptive Learning Rate Method, 2012,
        https://arxiv.org/abs/1212.5701
    """
    check_fraction(rho, "rho value", closed=True)
    return compose(
        (flip_sign_and_add_weight_decay, (weight_decay, False)),
        (scale_by_adadelta, (rho, eps, moment_requires_grad)),
        (scale_by_neg_lr, (lr,)),
    )
