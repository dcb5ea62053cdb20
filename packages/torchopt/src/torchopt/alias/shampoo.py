# SPDX-License-Identifier: Apache-2.0
"""Shampoo."""

from __future__ import annotations

from torchopt.alias.utils import (
    compose,
    flip_sign_and_add_weight_decay,
    scale_by_neg_lr,
)
from torchopt.base import GradientTransformation
from torchopt.transform import scale_by_shampoo, trace
from torchopt.typing import ScalarOrSchedule

__all__ = ["shampoo"]


def shampoo(
    lr: ScalarOrSchedule = 1e-1,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    eps: float = 1e-4,
    decay: float = 1.0,
    update_every: int = 1,
    max_size: int = 1024,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """Return Shampoo.

    The update is -lr times the momentum of the direction of `torchopt.transform.scale_by_shampoo`.

    Args:
        lr: Step size: a number >= 0, a 0-dim tensor with respect to which steps are differentiable,
            or a schedule that maps the number of previous updates to either.
        momentum: Decay of the momentum of the directions, >= 0.
        weight_decay: Coefficient of the penalty weight_decay / 2 * |p|^2 on the parameters, >= 0.
        eps: Start of the diagonals of the preconditioners, > 0.
        decay: 1 for preconditioners that are sums, as in the paper; below one for averages.
        update_every: Steps from one computation of the roots to the next.
        max_size: Dimensions longer than this have a diagonal preconditioner.
        maximize: Go up instead of down.

    Raises:
        ValueError: A hyper-parameter out of range.

    References:
        V. Gupta, T. Koren, Y. Singer, Shampoo: Preconditioned Stochastic Tensor Optimization, 2018,
        https://arxiv.org/abs/1802.09568
    """
    return compose(
        (flip_sign_and_add_weight_decay, (weight_decay, maximize)),
        (scale_by_shampoo, (eps, decay, update_every, max_size)),
        (trace, (momentum,)),
        (scale_by_neg_lr, (lr,)),
    )
