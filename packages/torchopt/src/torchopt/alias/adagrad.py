# SPDX-License-Identifier: Apache-2.0
"""AdaGrad."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from torchopt.alias.utils import (
    compose,
    flip_sign_and_add_weight_decay,
    scale_by_neg_lr,
)
from torchopt.base import GradientTransformation
from torchopt.transform import scale_by_rss, scale_by_schedule
from torchopt.transform.validate import check_at_least_zero
from torchopt.typing import Numeric, ScalarOrSchedule, Schedule

__all__ = ["adagrad"]


@dataclass(frozen=True)
class _AdagradSchedule:
    """1 / (1 + decay_rate * count), count from `transition_begin`."""

    decay_rate: float
    transition_begin: int

    def __call__(self, count: Numeric) -> Numeric:
        elapsed = count - self.transition_begin
        if isinstance(elapsed, torch.Tensor):
            elapsed = elapsed.to(torch.float64).clamp(min=0)
        else:
            elapsed = max(elapsed, 0)
        return 1 / (1 + self.decay_rate * elapsed)


def _adagrad_lr_schedule(decay_rate: float, transition_begin: int = 0) -> Schedule:
    """Return AdaGrad's factor on the step size."""
    return _AdagradSchedule(decay_rate, transition_begin)


def adagrad(
    lr: ScalarOrSchedule = 1e-2,
    lr_decay: float = 0.0,
    weight_decay: float = 0.0,
    initial_accumulator_value: float = 0.0,
    eps: float = 1e-10,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """Return AdaGrad.

    The update is -lr * u / (1 + lr_decay * count), with u the direction of
    `torchopt.transform.scale_by_rss` and count the number of previous updates.

    Args:
        lr: Step size: a number >= 0, a 0-dim tensor with respect to which steps are differentiable,
            or a schedule that maps the number of previous updates to either.
        lr_decay: Decay of the step size, >= 0.
        weight_decay: Coefficient of the penalty weight_decay / 2 * |p|^2 on the parameters, >= 0.
        initial_accumulator_value: What the sum of squares starts from, >= 0.
        eps: Added to the root, >= 0.
        maximize: Go up instead of down.

    Raises:
        ValueError: A hyper-parameter out of range.

    References:
        J. Duchi, E. Hazan, Y. Singer, Adaptive Subgradient Methods for Online Learning and
        Stochastic Optimization, JMLR 12, 2011, https://jmlr.org/papers/v12/duchi11a.html
    """
    check_at_least_zero(lr_decay, "lr_decay value")
    return compose(
        (flip_sign_and_add_weight_decay, (weight_decay, maximize)),
        (scale_by_rss, (initial_accumulator_value, eps)),
        (scale_by_schedule, (_adagrad_lr_schedule(lr_decay),)),
        (scale_by_neg_lr, (lr,)),
    )
