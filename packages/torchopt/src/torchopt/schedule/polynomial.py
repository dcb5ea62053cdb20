# SPDX-License-Identifier: Apache-2.0
"""Polynomial and linear transitions."""

from __future__ import annotations

from dataclasses import dataclass

from torchopt.schedule.formula import lifted, part, power
from torchopt.typing import Numeric, Scalar, Schedule

__all__ = ["linear_schedule", "polynomial_schedule"]


@dataclass(frozen=True)
class PolynomialSchedule:
    """A schedule; see `polynomial_schedule`."""

    init_value: Scalar
    end_value: Scalar
    power: Scalar
    transition_steps: int
    transition_begin: int

    def __call__(self, count: Numeric) -> Numeric:
        """Return the value after `count` updates."""
        if self.transition_steps <= 0:
            return self.init_value
        passed = part(count, self.transition_begin, self.transition_steps)
        init, end, exponent, passed = lifted(self.init_value, self.end_value, self.power, passed)
        value: Numeric = (init - end) * power(1 - passed, exponent) + end
        return value


def polynomial_schedule(
    init_value: Scalar,
    end_value: Scalar,
    power: Scalar,
    transition_steps: int,
    transition_begin: int = 0,
) -> Schedule:
    """Return the schedule (init_value - end_value) * (1 - c / transition_steps) ** power +
    end_value.

    Here c is count - transition_begin, clamped to [0, transition_steps].

    Args:
        init_value: The value up to `transition_begin`.
        end_value: The value after the transition.
        power: Exponent; 1 is linear.
        transition_steps: Number of updates of the transition; <= 0 gives the constant `init_value`.
        transition_begin: Number of updates before the transition; negative numbers count as 0.

    Example:
        >>> schedule = polynomial_schedule(1.0, 0.1, 2, 4, 1)
        >>> [round(schedule(count), 5) for count in range(7)]
        [1.0, 1.0, 0.60625, 0.325, 0.15625, 0.1, 0.1]
    """
    return PolynomialSchedule(
        init_value, end_value, power, transition_steps, max(transition_begin, 0)
    )


def linear_schedule(
    init_value: Scalar, end_value: Scalar, transition_steps: int, transition_begin: int = 0
) -> Schedule:
    """Return the straight line from `init_value` to `end_value` over `transition_steps` updates.

    Args:
        init_value: The value up to `transition_begin`.
        end_value: The value after the transition.
        transition_steps: Number of updates of the transition; <= 0 gives the constant `init_value`.
        transition_begin: Number of updates before the transition; negative numbers count as 0.

    Example:
        >>> linear_schedule(1.0, 0.0, 4)(1)
        0.75
    """
    return polynomial_schedule(init_value, end_value, 1, transition_steps, transition_begin)
