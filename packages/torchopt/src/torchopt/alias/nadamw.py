# SPDX-License-Identifier: Apache-2.0
"""NAdam with decoupled weight decay."""

from __future__ import annotations

from torchopt.alias.utils import (
    compose,
    flip_sign_and_add_weight_decay,
    scale_by_neg_lr,
)
from torchopt.base import GradientTransformation
from torchopt.transform import add_decayed_weights, scale_by_nadam
from torchopt.transform.validate import unpacked
from torchopt.typing import ScalarOrSchedule

__all__ = ["nadamw"]


def nadamw(
    lr: ScalarOrSchedule = 2e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    momentum_decay: float = 4e-3,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """Return NAdam with decoupled weight decay.

    The update is -lr * (u + weight_decay * p); see `nadam`.

    Args:
        lr: Step size: a number >= 0, a 0-dim tensor with respect to which steps are differentiable,
            or a schedule that maps the number of previous updates to either.
        betas: Decays of the moments, in [0, 1).
        eps: Added to the root, >= 0.
        weight_decay: Coefficient of the decoupled decay, >= 0: the update has -lr weight_decay p.
        momentum_decay: How fast the momentum grows to its limit, >= 0.
        maximize: Go up instead of down.

    Raises:
        ValueError: A hyper-parameter out of range.

    References:
        T. Dozat, Incorporating Nesterov Momentum into Adam, 2016,
        https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ
    """
    return compose(
        (flip_sign_and_add_weight_decay, (0.0, maximize)),
        (scale_by_nadam, (*unpacked(betas, 2, "betas"), eps, momentum_decay)),
        (add_decayed_weights, (weight_decay,)),
        (scale_by_neg_lr, (lr,)),
    )
