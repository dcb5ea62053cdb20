# SPDX-License-Identifier: Apache-2.0
"""Adafactor."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from torchopt.alias.utils import (
    compose,
    flip_sign_and_add_weight_decay,
)
from torchopt.base import GradientTransformation
from torchopt.transform import scale, scale_by_factored_rms
from torchopt.transform.add_decayed_weights import AddDecayedWeights
from torchopt.transform.base import LeafRule, transformation
from torchopt.transform.scale_by_factored_rms import ScaleByFactoredRms
from torchopt.transform.validate import check_at_least_zero, unpacked

__all__ = ["adafactor"]


@transformation
def _decay_by_lr(lr: float | Tensor, weight_decay: float | Tensor) -> LeafRule | None:
    """Return the transformation u = g + lr * weight_decay * p."""
    check_at_least_zero(weight_decay, "weight_decay value")
    if any(not isinstance(x, Tensor) and x == 0.0 for x in (lr, weight_decay)):
        return None
    return AddDecayedWeights(weight_decay, lr)


@transformation
def _minus_step(*hypers: Any) -> LeafRule:
    """Return the transformation to minus the step of `scale_by_factored_rms(*hypers)`."""
    rule = scale_by_factored_rms.rule(*hypers)
    assert isinstance(rule, ScaleByFactoredRms)
    return dataclasses.replace(rule, sign=-1)


def adafactor(
    lr: float | Tensor = 1e-2,
    beta2_decay: float = -0.8,
    eps: tuple[float | None, float] = (None, 1e-3),
    d: float = 1.0,
    weight_decay: float = 0.0,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """Return Adafactor.

    The update is minus the step of `torchopt.transform.scale_by_factored_rms`, minus
    lr weight_decay p.

    Args:
        lr: The largest relative step size, >= 0.
        beta2_decay: Exponent of the weight of a new square, <= 0.
        eps: Smallest root of the second moment (None for the spacing of the dtype at one, of
            float32 for half types), and smallest root mean square that a parameter counts for.
        d: Largest root mean square of a direction, > 0.
        weight_decay: Coefficient of the decoupled decay, >= 0.
        maximize: Go up instead of down.

    Raises:
        ValueError: A hyper-parameter out of range.

    References:
        N. Shazeer, M. Stern, Adafactor, 2018, https://arxiv.org/abs/1804.04235
    """
    hypers = (lr, beta2_decay, *unpacked(eps, 2, "eps"), d)
    flip = (flip_sign_and_add_weight_decay, (0.0, maximize))
    if not isinstance(weight_decay, Tensor) and weight_decay == 0.0:
        return compose(flip, (_minus_step, hypers))  # one pass less
    return compose(
        flip,
        (scale_by_factored_rms, hypers),
        (_decay_by_lr, (lr, weight_decay)),
        (scale, (-1.0,)),
    )
