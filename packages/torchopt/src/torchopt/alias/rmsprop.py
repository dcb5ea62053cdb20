# SPDX-License-Identifier: Apache-2.0
"""RMSProp."""

from __future__ import annotations

from torchopt.alias.utils import (
    compose,
    flip_sign_and_add_weight_decay,
    scale_by_neg_lr,
)
from torchopt.base import GradientTransformation
from torchopt.transform import scale_by_rms, scale_by_stddev, trace
from torchopt.typing import ScalarOrSchedule

__all__ = ["rmsprop"]


def rmsprop(
    lr: ScalarOrSchedule = 1e-2,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    centered: bool = False,
    *,
    initial_scale: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> GradientTransformation:
    """Return RMSProp.

    The update is -lr * u, with u the direction of `torchopt.transform.scale_by_rms`
    (`scale_by_stddev` when centered), followed by `trace` when there is a momentum.

    Args:
        lr: Step size: a number >= 0, a 0-dim tensor with respect to which steps are differentiable,
            or a schedule that maps the number of previous updates to either.
        alpha: Decay of the averages, in [0, 1).
        eps: Added to the root, >= 0.
        weight_decay: Coefficient of the penalty weight_decay / 2 * |p|^2 on the parameters, >= 0.
        momentum: Decay of the trace of directions, >= 0.
        centered: Divide by the standard deviation of the gradient instead of its root mean square.
        initial_scale: What the average of squares starts from.
        nesterov: Look ahead by one step; needs a momentum.
        maximize: Go up instead of down.

    Raises:
        ValueError: A hyper-parameter out of range.

    References:
        T. Tieleman, G. Hinton, Lecture 6.5: RMSProp, 2012,
        https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf
    """
    return compose(
        (flip_sign_and_add_weight_decay, (weight_decay, maximize)),
        (scale_by_stddev if centered else scale_by_rms, (alpha, eps, initial_scale)),
        (trace, (momentum, 0.0, nesterov)),
        (scale_by_neg_lr, (lr,)),
    )
