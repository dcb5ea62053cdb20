# SPDX-License-Identifier: Apache-2.0
"""Schedules made of pieces: constants, joined schedules, warm-up, and one cycle."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from torchopt.schedule.cosine import fall
from torchopt.schedule.formula import choose, lifted, part
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
    """Return the schedule with the constant value `value`.

    Args:
        value: A number, or a 0-dim tensor, which is differentiated.

    Example:
        >>> constant_schedule(0.1)(7)
        0.1
    """
    return Constant(value)


@dataclass(frozen=True)
class PiecewiseConstant:
    """A schedule; see `piecewise_constant`."""

    init_value: Scalar
    factors: tuple[tuple[int, Scalar], ...]

    def __call__(self, count: Numeric) -> Numeric:
        """Return the value after `count` updates."""
        steps, value, *factors = lifted(count, self.init_value, *(f for _, f in self.factors))
        if isinstance(count, torch.Tensor):
            value = torch.ones_like(steps) * value
        for (boundary, _), factor in zip(self.factors, factors):
            value = choose(steps >= boundary, value * factor, value)
        return value  # type: ignore[no-any-return]


def piecewise_constant(init_value: Scalar, factors: Mapping[int, Scalar]) -> Schedule:
    """Return the schedule that is multiplied by `factors[boundary]` from each boundary on.

    Args:
        init_value: The first value.
        factors: Factors by boundary, the number of updates from which a factor applies.

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
        starts = (0, *self.boundaries)
        if not isinstance(count, torch.Tensor):
            active = bisect.bisect_right(self.boundaries, count)
            return self.schedules[active](count - starts[active])
        # Each schedule gets only counts of its own piece. Elsewhere it may overflow, and then the
        # derivative is NaN although the value is not used.
        value: Any = self.schedules[0](
            count.clamp(max=self.boundaries[0]) if self.boundaries else count
        )
        ends = (*self.boundaries[1:], None)
        for start, end, schedule in zip(self.boundaries, ends, self.schedules[1:]):
            length = None if end is None else end - start
            following = schedule((count - start).clamp(0, length))
            steps, following, value = lifted(count, following, value)
            value = torch.where(steps >= start, following, value)
        return value  # type: ignore[no-any-return]


def _require_schedule(value: Any, what: str) -> None:
    if not callable(value) or isinstance(value, torch.Tensor):
        raise TypeError(
            f"{what}: expected a schedule, a function of the count, got {type(value).__name__}; "
            "constant_schedule makes one of a number"
        )


def join_schedules(schedules: Sequence[Schedule], boundaries: Sequence[int]) -> Schedule:
    """Return schedules one after the other, each with a count that starts at 0.

    Args:
        schedules: The schedules.
        boundaries: The number of updates at which each schedule but the first starts, increasing.

    Raises:
        TypeError: One of `schedules` is not a function.
        ValueError: The number of boundaries is not that of the schedules minus 1, or they do not
            increase.

    Example:
        >>> joined = join_schedules([constant_schedule(1.0), linear_schedule(1.0, 0.0, 2)], [2])
        >>> [joined(count) for count in range(5)]
        [1.0, 1.0, 1.0, 0.5, 0.0]
    """
    for schedule in schedules:
        _require_schedule(schedule, "join_schedules")
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
    """Return a linear warm-up from `init_value` to the start of `schedule`, followed by it.

    Args:
        schedule: The schedule that follows; its count starts after the warm-up.
        warmup_steps: Number of updates of the warm-up, >= 1.
        init_value: The first value.
        peak_value: The value at the end of the warm-up; None for the first value of `schedule`.

    Raises:
        TypeError: `schedule` is not a function.
        ValueError: `warmup_steps` is smaller than 1.

    Example:
        >>> from torchopt.schedule import cosine_decay
        >>> warm = warmup(cosine_decay(1.0, 10), 4)
        >>> [warm(count) for count in range(5)]
        [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    _require_schedule(schedule, "warmup")
    if warmup_steps < 1:
        raise ValueError(f"warmup: expected warmup_steps >= 1, got {warmup_steps}")
    return Warmup(schedule, warmup_steps, init_value, peak_value)


@dataclass(frozen=True)
class Warmup:
    """A schedule; see `warmup`."""

    schedule: Schedule
    warmup_steps: int
    init_value: Scalar
    peak_value: Scalar | None

    def __call__(self, count: Numeric) -> Numeric:
        """Return the value after `count` updates."""
        # A schedule may accept only numbers or only tensors: keep the type of the count.
        peak: Any = self.schedule(0 * count) if self.peak_value is None else self.peak_value
        line = linear_schedule(self.init_value, peak, self.warmup_steps)
        return join_schedules([line, self.schedule], [self.warmup_steps])(count)


def one_cycle(
    max_value: Scalar,
    total_steps: int,
    rise: float = 0.3,
    div_factor: Scalar = 25.0,
    final_div_factor: Scalar = 1e4,
) -> Schedule:
    """Return one rise to `max_value` and one fall far below the start, both along a cosine.

    The values are those of `torch.optim.lr_scheduler.OneCycleLR`.

    Args:
        max_value: The largest value.
        total_steps: Number of updates of the cycle; afterwards the value is constant.
        rise: Fraction of the updates in the rise, in (0, 1).
        div_factor: The first value is `max_value / div_factor`.
        final_div_factor: The last value is the first one divided by `final_div_factor`.

    Raises:
        ValueError: The rise or the fall has less than one update.

    References:
        L. N. Smith, N. Topin, Super-Convergence, 2018, https://arxiv.org/abs/1708.07120

    Example:
        >>> [round(one_cycle(1.0, 10)(count), 6) for count in (0, 2, 9)]
        [0.04, 1.0, 4e-06]
    """
    peak = rise * total_steps - 1
    if not 0 < peak < total_steps - 1:
        raise ValueError(
            "one_cycle: expected a rise and a fall of at least one update each, got "
            f"total_steps={total_steps} and rise={rise}"
        )
    return OneCycle(max_value, div_factor, final_div_factor, peak, total_steps - 1)


@dataclass(frozen=True)
class OneCycle:
    """A schedule; see `one_cycle`."""

    max_value: Scalar
    div_factor: Scalar
    final_div_factor: Scalar
    peak: float
    last: int

    def __call__(self, count: Numeric) -> Numeric:
        """Return the value after `count` updates."""
        steps = self.last * part(count, 0, self.last)
        init = self.max_value / self.div_factor
        rising = fall(init, self.max_value, steps / self.peak)
        passed = (steps - self.peak) / (self.last - self.peak)
        falling = fall(self.max_value, init / self.final_div_factor, passed)
        steps, rising, falling = lifted(steps, rising, falling)
        return choose(steps <= self.peak, rising, falling)  # type: ignore[no-any-return]
