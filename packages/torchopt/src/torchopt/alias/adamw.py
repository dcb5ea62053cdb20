# SPDX-License-Identifier: Apache-2.0
"""AdamW."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torchopt.alias.utils import (
    compose,
    flip_sign_and_add_weight_decay,
    scale_by_neg_lr,
)
from torchopt.base import GradientTransformation
from torchopt.transform import add_decayed_weights, scale_by_accelerated_adam, scale_by_adam
from torchopt.transform.validate import unpacked
from torchopt.typing import ScalarOrSchedule

__all__ = ["adamw"]


def adamw(
    lr: ScalarOrSchedule = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    *,
    eps_root: float = 0.0,
    mask: Any | Callable[[Any], Any] | None = None,
    moment_requires_grad: bool = False,
    maximize: bool = False,
    use_accelerated_op: bool = False,
) -> GradientTransformation:
    """Return AdamW: Adam with weight decay decoupled from the scaling.

    The update is -lr * (u + weight_decay * p), with u the direction of
    `torchopt.transform.scale_by_adam`.

    Args:
        lr: Step size: a number >= 0, a 0-dim tensor with respect to which steps are differentiable,
            or a schedule that maps the number of previous updates to either.
        betas: Decays of the two moments, in [0, 1).
        eps: Added to the root, >= 0.
        weight_decay: Coefficient of the decay, >= 0.
        eps_root: Added under the root, >= 0.
        mask: Where to decay: a tree of bools that is a prefix of the parameters, or a function from
            the parameters to one; None decays everywhere.
        moment_requires_grad: Make the initial moments leaves that require a gradient.
        maximize: Go up instead of down.
        use_accelerated_op: Compute the direction of all tensors in one native call; see
            `scale_by_accelerated_adam`.

    Raises:
        ValueError: A hyper-parameter out of range.
        AssertionError: From `update`, when it is called without `params`.

    References:
        I. Loshchilov, F. Hutter, Decoupled Weight Decay Regularization, 2019,
        https://arxiv.org/abs/1711.05101
    """
    scaler = scale_by_accelerated_adam if use_accelerated_op else scale_by_adam
    return compose(
        (flip_sign_and_add_weight_decay, (0.0, maximize)),
        (scaler, (*unpacked(betas, 2, "betas"), eps, eps_root, moment_requires_grad)),
        (add_decayed_weights, (weight_decay, mask)),
        (scale_by_neg_lr, (lr,)),
    )
