# SPDX-License-Identifier: Apache-2.0
"""Adam."""

from __future__ import annotations

from torchopt.alias.utils import (
    compose,
    flip_sign_and_add_weight_decay,
    scale_by_neg_lr,
)
from torchopt.base import GradientTransformation
from torchopt.transform import scale_by_accelerated_adam, scale_by_adam
from torchopt.transform.validate import unpacked
from torchopt.typing import ScalarOrSchedule

__all__ = ["adam"]


def adam(
    lr: ScalarOrSchedule = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    *,
    eps_root: float = 0.0,
    moment_requires_grad: bool = False,
    maximize: bool = False,
    use_accelerated_op: bool = False,
) -> GradientTransformation:
    """Return Adam.

    The update is -lr * u, with u the direction of `torchopt.transform.scale_by_adam`.

    Args:
        lr: Step size: a number >= 0, a 0-dim tensor with respect to which steps are differentiable,
            or a schedule that maps the number of previous updates to either.
        betas: Decays of the two moments, in [0, 1).
        eps: Added to the root, >= 0.
        weight_decay: Coefficient of the penalty weight_decay / 2 * |p|^2 on the parameters, >= 0.
        eps_root: Added under the root, >= 0; a positive one makes the derivative of a step finite
            everywhere.
        moment_requires_grad: Make the initial moments leaves that require a gradient.
        maximize: Go up instead of down.
        use_accelerated_op: Compute the direction of all tensors in one native call; see
            `scale_by_accelerated_adam`.

    Raises:
        ValueError: A hyper-parameter out of range.

    References:
        D. P. Kingma, J. Ba, Adam: A Method for Stochastic Optimization, 2015,
        https://arxiv.org/abs/1412.6980

    Example:
        >>> import torch
        >>> optimizer = adam(0.1, eps=0.0)
        >>> params = (torch.tensor([1.0]),)
        >>> optimizer.update((torch.tensor([2.0]),), optimizer.init(params), inplace=False)[0]
        (tensor([-0.1000]),)
    """
    scaler = scale_by_accelerated_adam if use_accelerated_op else scale_by_adam
    return compose(
        (flip_sign_and_add_weight_decay, (weight_decay, maximize)),
        (scaler, (*unpacked(betas, 2, "betas"), eps, eps_root, moment_requires_grad)),
        (scale_by_neg_lr, (lr,)),
    )
