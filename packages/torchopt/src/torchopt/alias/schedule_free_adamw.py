# SPDX-License-Identifier: Apache-2.0
"""schedule-free AdamW."""

from __future__ import annotations

from torch import Tensor

from torchopt.alias.utils import (
    compose,
    flip_sign_and_add_weight_decay,
)
from torchopt.base import GradientTransformation
from torchopt.transform import scale_by_adam, schedule_free
from torchopt.transform.validate import unpacked

__all__ = ["schedule_free_adamw"]


def schedule_free_adamw(
    lr: float | Tensor = 2.5e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    warmup_steps: int = 0,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """Return schedule-free AdamW.

    See `torchopt.transform.schedule_free`; `torchopt.transform.averaged_params` gives the model.

    Args:
        lr: Step size, >= 0.
        betas: Weight of the average in the point where gradients are taken, and decay of the
            second moment, both in [0, 1).
        eps: Added to the root, >= 0.
        weight_decay: Coefficient of the decay, >= 0.
        warmup_steps: Steps over which the step size grows; 0 for none.
        maximize: Go up instead of down.

    Raises:
        ValueError: A hyper-parameter out of range.

    References:
        A. Defazio et al., The Road Less Scheduled, 2024, https://arxiv.org/abs/2405.15682
    """
    b1, b2 = unpacked(betas, 2, "betas")
    return compose(
        (flip_sign_and_add_weight_decay, (0.0, maximize)),
        # Without a first moment: u = g / (sqrt(nu / (1 - b2^k)) + eps).
        (scale_by_adam, (0.0, b2, eps)),
        (schedule_free, (lr, b1, weight_decay, warmup_steps)),
    )
