# SPDX-License-Identifier: Apache-2.0
"""AMSGrad: Adam with the largest second moment so far."""

from __future__ import annotations

from torchopt.alias.utils import (
    compose,
    flip_sign_and_add_weight_decay,
    scale_by_neg_lr,
)
from torchopt.base import GradientTransformation
from torchopt.transform import scale_by_amsgrad
from torchopt.transform.validate import unpacked
from torchopt.typing import ScalarOrSchedule

__all__ = ["amsgrad"]


def amsgrad(
    lr: ScalarOrSchedule = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """Return AMSGrad: Adam with the largest second moment so far.

    The update is -lr * u, with u the direction of `torchopt.transform.scale_by_amsgrad`.

    Args:
        lr: Step size: a number >= 0, a 0-dim tensor with respect to which steps are differentiable,
            or a schedule that maps the number of previous updates to either.
        betas: Decays of the moments, in [0, 1).
        eps: Added to the root, >= 0.
        weight_decay: Coefficient of the penalty weight_decay / 2 * |p|^2 on the parameters, >= 0.
        maximize: Go up instead of down.

    Raises:
        ValueError: A hyper-parameter out of range.

    References:
        S. J. Reddi, S. Kale, S. Kumar, On the Convergence of Adam and Beyond, 2018,
        https://arxiv.org/abs/1904.09237
    """
    return compose(
        (flip_sign_and_add_weight_decay, (weight_decay, maximize)),
        (scale_by_amsgrad, (*unpacked(betas, 2, "betas"), eps)),
        (scale_by_neg_lr, (lr,)),
    )
