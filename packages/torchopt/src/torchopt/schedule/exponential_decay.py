# SPDX-License-Identifier: Apache-2.0
"""Exponential decay."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

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
    end_value: float | None

    def __call__(self, count: Numeric) -> Numeric:
        """Return the value after `count` updates."""
        if self.transition_steps <= 0 or self.decay_rate == 0:
            return self.init_value
        elapsed = count - self.transition_begin
        if isinstance(elapsed, torch.Tensor):
            exponent = elapsed.to(torch.float64) / self.transition_steps
            exponent = exponent.floor() if self.staircase else exponent
            rate = torch.as_tensor(self.decay_rate, dtype=torch.float64, device=elapsed.device)
            value = self.init_value * rate**exponent
            start = torch.as_tensor(self.init_value, dtype=torch.float64, device=elapsed.device)
            value = torch.where(elapsed <= 0, start, value)
            return value if self.end_value is None else self._bounded(value)
        quotient = max(elapsed, 0) / self.transition_steps
        number = self.init_value * self.decay_rate ** (
            math.floor(quotient) if self.staircase else quotient
        )
        if self.end_value is None:
            return number
        return (max if self.decay_rate < 1.0 else min)(number, self.end_value)

    def _bounded(self, value: torch.Tensor) -> torch.Tensor:
        if self.decay_rate < 1.0:
            return value.clamp(min=self.end_value)
        return value.clamp(max=self.end_value)


def exponential_decay(
    init_value: Scalar,
    decay_rate: Scalar,
    transition_begin: int = 0,
    transition_steps: int = 1,
    staircase: bool = False,
    end_value: float | None = None,
) -> Schedule:
    """Return the schedule init_value * decay_rate ** ((count - transition_begin) /
    transition_steps).

    Args:
        init_value: The value up to `transition_begin`.
        decay_rate: The factor for each `transition_steps` updates; 0 gives a constant.
        transition_begin: Updates before the decay starts; a negative one counts as 0.
        transition_steps: Updates for each factor; <= 0 gives a constant.
        staircase: Decay at whole multiples of `transition_steps` only.
        end_value: A bound that the value does not pass, from the start on.

    Example:
        >>> schedule = exponential_decay(1.0, 0.5, 2, 2, staircase=True, end_value=0.2)
        >>> [schedule(count) for count in range(9)]
        [1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.25, 0.25, 0.2]
    """
    return ExponentialDecay(
        init_value, decay_rate, max(transition_begin, 0), transition_steps, staircase, end_value
    )
