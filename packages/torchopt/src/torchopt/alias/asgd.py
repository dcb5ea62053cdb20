# SPDX-License-Identifier: Apache-2.0
"""averaged SGD."""

from __future__ import annotations

from torch import Tensor

from torchopt.alias.utils import (
    compose,
    flip_sign_and_add_weight_decay,
)
from torchopt.base import GradientTransformation
from torchopt.transform import scale, scale_by_asgd

__all__ = ["asgd"]


def asgd(
    lr: float | Tensor = 1e-2,
    lambd: float = 1e-4,
    alpha: float = 0.75,
    t0: float = 1e6,
    weight_decay: float = 0.0,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """Return averaged SGD.

    The update is minus the step of `torchopt.transform.scale_by_asgd`, whose state has the
    averaged iterates.

    Args:
        lr: The first step size, >= 0.
        lambd: Decay term, >= 0.
        alpha: Exponent of the decay of the step size, >= 0.
        t0: Steps before the average starts.
        weight_decay: Coefficient of the penalty weight_decay / 2 * |p|^2 on the parameters, >= 0.
        maximize: Go up instead of down.

    Raises:
        ValueError: A hyper-parameter out of range.

    References:
        B. T. Polyak, A. B. Juditsky, Acceleration of Stochastic Approximation by Averaging, 1992
    """
    return compose(
        (flip_sign_and_add_weight_decay, (weight_decay, maximize)),
        (scale_by_asgd, (lr, lambd, alpha, t0)),
        (scale, (-1.0,)),
    )
