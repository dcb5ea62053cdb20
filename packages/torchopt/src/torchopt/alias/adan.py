# SPDX-License-Identifier: Apache-2.0
"""Adan."""

from __future__ import annotations

from torchopt.alias.utils import (
    compose,
    flip_sign_and_add_weight_decay,
    scale_by_neg_lr,
)
from torchopt.base import GradientTransformation
from torchopt.transform import add_decayed_weights, scale_by_adan
from torchopt.transform.validate import unpacked
from torchopt.typing import ScalarOrSchedule

__all__ = ["adan"]


def adan(
    lr: ScalarOrSchedule = 1e-3,
    betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """Return Adan.

    The update is -lr * (u + weight_decay * p), with u the direction of
    `torchopt.transform.scale_by_adan`. The paper divides by 1 + lr weight_decay instead, which
    is the same to first order.

    Args:
        lr: Step size: a number >= 0, a 0-dim tensor with respect to which steps are differentiable,
            or a schedule that maps the number of previous updates to either.
        betas: Decays of the moments, in [0, 1).
        eps: Added to the root, >= 0.
        weight_decay: Coefficient of the decoupled decay, >= 0: the update has -lr weight_decay p.
        maximize: Go up instead of down.

    Raises:
        ValueError: A hyper-parameter out of range.

    References:
        X. Xie et al., Adan, 2022, https://arxiv.org/abs/2208.06677
    """
    return compose(
        (flip_sign_and_add_weight_decay, (0.0, maximize)),
        (scale_by_adan, (*unpacked(betas, 3, "betas"), eps)),
        (add_decayed_weights, (weight_decay,)),
        (scale_by_neg_lr, (lr,)),
    )
