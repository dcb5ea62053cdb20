# SPDX-License-Identifier: Apache-2.0
"""Exponential decay."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from torchopt.schedule.formula import choose, floor, lifted, part, power
from torchopt.typing import Numeric, Scalar, Schedule

__all__ = ["exponential_decay"]


@dataclass(frozen=True)
class ExponentialDecay:
    """A schedule; see `exponential_decay`."""

    init_value: Scalar
    decay_rate: Scalar
    transition_begin: int
    transition_steps: int
    staircase: bool
    end_value: Scalar | None

    def __call__(self, count: Numeric) -> Numeric:
        """Return the value after `count` updates."""
        rate = self.decay_rate
        if self.transition_steps <= 0 or (not isinstance(rate, torch.Tensor) and rate == 0):
            return self.init_value
        quotient = part(count, self.transition_begin) / self.transition_steps
        exponent = floor(quotient) if self.staircase else quotient
        end = 0.0 if self.end_value is None else self.end_value
        init, rate, end, exponent = lifted(self.init_value, rate, end, exponent)
        # The branch that is not taken must be finite as well, or the derivative is NaN.
        constant = rate == 0
        rate = choose(constant, rate + 1, rate)
        value = init * power(rate, exponent)
        if self.end_value is not None:
            past = choose(rate < 1, value < end, value > end)
            value = choose(past, end, init * power(rate, choose(past, 0.0, exponent)))
        decayed: Numeric = choose(constant, init, value)
        return decayed


def exponential_decay(
    init_value: Scalar,
    decay_rate: Scalar,
    transition_begin: int = 0,
    transition_steps: int = 1,
    staircase: bool = False,
    end_value: Scalar | None = None,
) -> Schedule:
    """Return the schedule init_value * decay_rate ** ((count - transition_begin) /
    transition_steps).

    Args:
        init_value: The value up to `transition_begin`.
        decay_rate: The factor for each `transition_steps` updates; 0 gives a constant.
        transition_begin: Number of updates before the decay starts; negative numbers count as 0.
        transition_steps: Number of updates per factor; <= 0 gives the constant `init_value`.
        staircase: Round the exponent down, so that the value changes once in `transition_steps`
            updates.
        end_value: A bound: a lower one if `decay_rate` < 1, otherwise an upper one. It also holds
            for the first value. None: no bound.

    Example:
        >>> schedule = exponential_decay(1.0, 0.5, 2, 2, staircase=True, end_value=0.2)
        >>> [schedule(count) for count in range(9)]
        [1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.25, 0.25, 0.2]
    """
    return ExponentialDecay(
        init_value, decay_rate, max(transition_begin, 0), transition_steps, staircase, end_value
    )
