# SPDX-License-Identifier: Apache-2.0
"""AdaBelief."""

from __future__ import annotations

from torchopt.alias.utils import (
    compose,
    flip_sign_and_add_weight_decay,
    scale_by_neg_lr,
)
from torchopt.base import GradientTransformation
from torchopt.transform import add_decayed_weights, scale_by_belief
from torchopt.transform.validate import unpacked
from torchopt.typing import ScalarOrSchedule

__all__ = ["adabelief"]


def adabelief(
    lr: ScalarOrSchedule = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-16,
    weight_decay: float = 0.0,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """Return AdaBelief.

    The update is -lr * (u + weight_decay * p), with u the direction of
    `torchopt.transform.scale_by_belief`.

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
        J. Zhuang et al., AdaBelief Optimizer, 2020, https://arxiv.org/abs/2010.07468
    """
    return compose(
        (flip_sign_and_add_weight_decay, (0.0, maximize)),
        (scale_by_belief, (*unpacked(betas, 2, "betas"), eps)),
        (add_decayed_weights, (weight_decay,)),
        (scale_by_neg_lr, (lr,)),
    )
