# SPDX-License-Identifier: Apache-2.0
"""Sophia."""

from __future__ import annotations

from torchopt.alias.utils import (
    compose,
    flip_sign_and_add_weight_decay,
    scale_by_neg_lr,
)
from torchopt.base import GradientTransformation
from torchopt.transform import add_decayed_weights, scale_by_sophia
from torchopt.transform.validate import unpacked
from torchopt.typing import ScalarOrSchedule

__all__ = ["sophia"]


def sophia(
    lr: ScalarOrSchedule = 1e-4,
    betas: tuple[float, float] = (0.965, 0.99),
    rho: float = 0.04,
    weight_decay: float = 0.1,
    eps: float = 1e-15,
    batch_size: float = 1.0,
    update_every: int | None = 10,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """Return Sophia.

    The update is -lr * (u + weight_decay * p), with u the clipped direction of
    `torchopt.transform.scale_by_sophia`.

    Args:
        lr: Step size: a number >= 0, a 0-dim tensor with respect to which steps are differentiable,
            or a schedule that maps the number of previous updates to either.
        betas: Decays of the averages of gradient and curvature, in [0, 1).
        rho: Curvature is scaled by it, >= 0; the larger, the fewer entries are clipped.
        weight_decay: Coefficient of the decoupled decay, >= 0: the update has -lr weight_decay p.
        eps: Smallest curvature, > 0.
        batch_size: The number of examples that the gradient is a mean over.
        update_every: Steps from one estimate of the curvature from squared gradients to the next;
            None: only `torchopt.transform.observe_curvature` adds any.
        maximize: Go up instead of down.

    Raises:
        ValueError: A hyper-parameter out of range.

    References:
        H. Liu et al., Sophia, 2023, https://arxiv.org/abs/2305.14342
    """
    return compose(
        (flip_sign_and_add_weight_decay, (0.0, maximize)),
        (scale_by_sophia, (*unpacked(betas, 2, "betas"), rho, eps, batch_size, update_every)),
        (add_decayed_weights, (weight_decay,)),
        (scale_by_neg_lr, (lr,)),
    )
