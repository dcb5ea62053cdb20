# SPDX-License-Identifier: Apache-2.0
"""Yogi."""

from __future__ import annotations

from torchopt.alias.utils import (
    compose,
    flip_sign_and_add_weight_decay,
    scale_by_neg_lr,
)
from torchopt.base import GradientTransformation
from torchopt.transform import scale_by_yogi
from torchopt.transform.validate import unpacked
from torchopt.typing import ScalarOrSchedule

__all__ = ["yogi"]


def yogi(
    lr: ScalarOrSchedule = 1e-2,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-3,
    weight_decay: float = 0.0,
    initial_accumulator: float = 1e-6,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """Return Yogi.

    The update is -lr * u, with u the direction of `torchopt.transform.scale_by_yogi`.

    Args:
        lr: Step size: a number >= 0, a 0-dim tensor with respect to which steps are differentiable,
            or a schedule that maps the number of previous updates to either.
        betas: Decays of the moments, in [0, 1).
        eps: Added to the root, >= 0.
        weight_decay: Coefficient of the penalty weight_decay / 2 * |p|^2 on the parameters, >= 0.
        initial_accumulator: What the second moment starts from, >= 0.
        maximize: Go up instead of down.

    Raises:
        ValueError: A hyper-parameter out of range.

    References:
        M. Zaheer et al., Adaptive Methods for Nonconvex Optimization, NeurIPS 2018
    """
    return compose(
        (flip_sign_and_add_weight_decay, (weight_decay, maximize)),
        (scale_by_yogi, (*unpacked(betas, 2, "betas"), eps, initial_accumulator)),
        (scale_by_neg_lr, (lr,)),
    )
