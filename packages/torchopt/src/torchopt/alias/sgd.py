# SPDX-License-Identifier: Apache-2.0
"""Stochastic gradient descent."""

from __future__ import annotations

from torchopt.alias.utils import (
    compose,
    flip_sign_and_add_weight_decay,
    scale_by_neg_lr,
)
from torchopt.base import GradientTransformation
from torchopt.transform import trace
from torchopt.typing import ScalarOrSchedule

__all__ = ["sgd"]


def sgd(
    lr: ScalarOrSchedule,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    *,
    moment_requires_grad: bool = False,
    maximize: bool = False,
) -> GradientTransformation:
    """Return stochastic gradient descent, with momentum as in torch.optim.SGD.

    The update is -lr * u, with u the direction of `torchopt.transform.trace`.

    Args:
        lr: Step size: a number >= 0, a 0-dim tensor with respect to which steps are differentiable,
            or a schedule that maps the number of previous updates to either.
        momentum: Decay of the trace, >= 0; 0 keeps no trace.
        dampening: Part of each gradient but the first that does not enter the trace.
        weight_decay: Coefficient of the penalty weight_decay / 2 * |p|^2 on the parameters, >= 0.
        nesterov: Look ahead by one step; needs a momentum and no dampening.
        moment_requires_grad: Make the initial moments leaves that require a gradient.
        maximize: Go up instead of down.

    Raises:
        ValueError: A hyper-parameter out of range.

    Example:
        >>> import torch
        >>> optimizer = sgd(0.1)
        >>> params = (torch.tensor([1.0]),)
        >>> optimizer.update((torch.tensor([2.0]),), optimizer.init(params), inplace=False)[0]
        (tensor([-0.2000]),)
    """
    return compose(
        (flip_sign_and_add_weight_decay, (weight_decay, maximize)),
        (trace, (momentum, dampening, nesterov, moment_requires_grad)),
        (scale_by_neg_lr, (lr,)),
    )
