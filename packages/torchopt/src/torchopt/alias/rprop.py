# SPDX-License-Identifier: Apache-2.0
"""Rprop."""

from __future__ import annotations

from torch import Tensor

from torchopt.alias.utils import (
    compose,
    flip_sign_and_add_weight_decay,
)
from torchopt.base import GradientTransformation
from torchopt.transform import scale, scale_by_rprop
from torchopt.transform.validate import unpacked

__all__ = ["rprop"]


def rprop(
    lr: float | Tensor = 1e-2,
    etas: tuple[float, float] = (0.5, 1.2),
    step_sizes: tuple[float, float] = (1e-6, 50.0),
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """Return Rprop.

    The update is minus the step of `torchopt.transform.scale_by_rprop`.

    Args:
        lr: The first step size, >= 0.
        etas: Factors on the step size where the sign changes and where it stays.
        step_sizes: The smallest and the largest step size.
        maximize: Go up instead of down.

    Raises:
        ValueError: A hyper-parameter out of range.

    References:
        M. Riedmiller, H. Braun, A Direct Adaptive Method for Faster Backpropagation Learning:
        The RPROP Algorithm, 1993
    """
    return compose(
        (flip_sign_and_add_weight_decay, (0.0, maximize)),
        (scale_by_rprop, (lr, *unpacked(etas, 2, "etas"), *unpacked(step_sizes, 2, "step_sizes"))),
        (scale, (-1.0,)),
    )
