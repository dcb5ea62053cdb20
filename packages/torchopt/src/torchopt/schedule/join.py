# SPDX-License-Identifier: Apache-2.0
"""Schedules made of pieces: constants, joined schedules, warm-up, one cycle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from torchopt.schedule.polynomial import linear_schedule
from torchopt.typing import Numeric, Scalar, Schedule

__all__ = [
    "constant_schedule",
    "join_schedules",
    "one_cycle",
    "piecewise_constant",
    "warmup",
]


@dataclass(frozen=True)
class Constant:
    """A schedule; see `constant_schedule`."""

    value: Scalar

    def __call__(self, count: Numeric) -> Numeric:
        """Return the value."""
        return self.value


def constant_schedule(value: Scalar) -> Schedule:
    """Return the schedule that is always `value`."""
    return Constant(value)


@dataclass(frozen=True)
class PiecewiseConstant:
    """A schedule; see `piecewise_constant`."""

    init_value: Scalar
    factors: tuple[tuple[int, float], ...]

    def __call__(self, count: Numeric) -> Numeric:
        """Return the value after `count` updates."""
        if isinstance(count, torch.Tensor):
            value = torch.full_like(count, 1, dtype=torch.float64) * self.init_value
            for boundary, factor in self.factors:
                value = torch.where(count >= boundary, value * factor, value)
            return value
        value_of_number: Numeric = self.init_value
        for boundary, factor in self.factors:
            if count >= boundary:
                value_of_number = value_of_number * factor
        return value_of_number


def piecewise_constant(init_value: Scalar, factors: Mapping[int, float]) -> Schedule:
    """Return the schedule that is multiplied by `factors[boundary]` from each boundary on.

    Args:
        init_value: The first value.
        factors: Factors by the number of updates from which they count.

    Example:
        >>> [piecewise_constant(1.0, {2: 0.5, 3: 0.5})(count) for count in range(4)]
        [1.0, 1.0, 0.5, 0.25]
    """
    return PiecewiseConstant(init_value, tuple(sorted(factors.items())))


@dataclass(frozen=True)
class JoinedSchedules:
    """A schedule; see `join_schedules`."""

    schedules: tuple[Schedule, ...]
    boundaries: tuple[int, ...]

    def __call__(self, count: Numeric) -> Numeric:
        """Return the value after `count` updates."""
        value = self.schedules[0](count)
        for boundary, schedule in zip(self.boundaries, self.schedules[1:]):
            if isinstance(count, torch.Tensor):
                following = schedule((count - boundary).clamp(min=0))
                value = torch.where(
                    count >= boundary,
                    torch.as_tensor(following, dtype=torch.float64, device=count.device),
                    torch.as_tensor(value, dtype=torch.float64, device=count.device),
                )
            elif count >= boundary:
                value = schedule(count - boundary)
        return value


def join_schedules(schedules: Sequence[Schedule], boundaries: Sequence[int]) -> Schedule:
    """Return schedules one after the other, each with a count that starts from 0.

    Args:
        schedules: The schedules.
        boundaries: The number of updates at which each of them but the first starts, increasing.

    Raises:
        ValueError: There is not one boundary for each schedule but the first, or they do not
            increase.

    Example:
        >>> joined = join_schedules([constant_schedule(1.0), linear_schedule(1.0, 0.0, 2)], [2])
        >>> [joined(count) for count in range(5)]
        [1.0, 1.0, 1.0, 0.5, 0.0]
    """
    if len(boundaries) != len(schedules) - 1:
        raise ValueError(
            f"join_schedules: expected {len(schedules) - 1} boundaries for {len(schedules)} "
            f"schedules, got {len(boundaries)}"
        )
    if any(a >= b for a, b in zip(boundaries, boundaries[1:])):
        raise ValueError(f"join_schedules: expected increasing boundaries, got {list(boundaries)}")
    return JoinedSchedules(tuple(schedules), tuple(boundaries))


def warmup(
    schedule: Schedule,
    warmup_steps: int,
    init_value: Scalar = 0.0,
    peak_value: Scalar | None = None,
) -> Schedule:
    """Return a straight line from `init_value` to the start of `schedule`, and then that.

    Args:
        schedule: What follows; its count starts after the warm-up.
        warmup_steps: Updates of the warm-up, >= 1.
        init_value: The first value.
        peak_value: Where the warm-up leads; None for the first value of `schedule`.

    Raises:
        ValueError: `warmup_steps` is smaller than 1.

    Example:
        >>> from torchopt.schedule import cosine_decay
        >>> warm = warmup(cosine_decay(1.0, 10), 4)
        >>> [warm(count) for count in range(5)]
        [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    if warmup_steps < 1:
        raise ValueError(f"warmup: expected warmup_steps >= 1, got {warmup_steps}")
    first = schedule(0) if peak_value is None else peak_value
    line = linear_schedule(init_value, float(first), warmup_steps)
    return join_schedules([line, schedule], [warmup_steps])


def one_cycle(
    max_value: float,
    total_steps: int,
    rise: float = 0.3,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
) -> Schedule:
    """Return one rise to `max_value` and one fall far below the start, both along a cosine.

    The same values as `torch.optim.lr_scheduler.OneCycleLR`.

    Args:
        max_value: The largest value.
        total_steps: Updates of the cycle; the value stays after it.
        rise: Part of the updates that the rise takes, in (0, 1).
        div_factor: The first value is `max_value / div_factor`.
        final_div_factor: The last value is the first one divided by `final_div_factor`.

    Raises:
        ValueError: A cycle without at least one update in the rise and in the fall.

    References:
        L. N. Smith, N. Topin, Super-Convergence, 2018, https://arxiv.org/abs/1708.07120
    """
    init_value = max_value / div_factor
    final_value = init_value / final_div_factor
    peak = rise * total_steps - 1
    if not 0 < peak < total_steps - 1:
        raise ValueError(
            "one_cycle: expected a rise and a fall of at least one update each, got "
            f"total_steps={total_steps} and rise={rise}"
        )
    return OneCycle(init_value, max_value, final_value, peak, total_steps - 1)


@dataclass(frozen=True)
class OneCycle:
    """A schedule; see `one_cycle`."""

    init_value: float
    max_value: float
    final_value: float
    peak: float
    last: int

    def __call__(self, count: Numeric) -> Numeric:
        """Return the value after `count` updates."""
        if isinstance(count, torch.Tensor):
            steps = count.to(torch.float64).clamp(0, self.last)
            up = (1 + torch.cos(torch.pi * steps / self.peak)) / 2
            down = (1 + torch.cos(torch.pi * (steps - self.peak) / (self.last - self.peak))) / 2
            rising = self.max_value + (self.init_value - self.max_value) * up
            falling = self.final_value + (self.max_value - self.final_value) * down
            return torch.where(steps <= self.peak, rising, falling)
        return float(self(torch.tensor(count, dtype=torch.float64)))
