# SPDX-License-Identifier: Apache-2.0
"""Lion."""

from __future__ import annotations

from torchopt.alias.utils import (
    compose,
    flip_sign_and_add_weight_decay,
    scale_by_neg_lr,
)
from torchopt.base import GradientTransformation
from torchopt.transform import add_decayed_weights, scale_by_lion
from torchopt.transform.validate import unpacked
from torchopt.typing import ScalarOrSchedule

__all__ = ["lion"]


def lion(
    lr: ScalarOrSchedule = 1e-4,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """Return Lion.

    The update is -lr * (u + weight_decay * p), with u the direction of
    `torchopt.transform.scale_by_lion`.

    Args:
        lr: Step size: a number >= 0, a 0-dim tensor with respect to which steps are differentiable,
            or a schedule that maps the number of previous updates to either.
        betas: Decays of the moments, in [0, 1).
        weight_decay: Coefficient of the decoupled decay, >= 0: the update has -lr weight_decay p.
        maximize: Go up instead of down.

    Raises:
        ValueError: A hyper-parameter out of range.

    References:
        X. Chen et al., Symbolic Discovery of Optimization Algorithms, 2023,
        https://arxiv.org/abs/2302.06675
    """
    return compose(
        (flip_sign_and_add_weight_decay, (0.0, maximize)),
        (scale_by_lion, unpacked(betas, 2, "betas")),
        (add_decayed_weights, (weight_decay,)),
        (scale_by_neg_lr, (lr,)),
    )
