# SPDX-License-Identifier: Apache-2.0
"""Cosine decay, with and without restarts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from torchopt.schedule.formula import cosine, lifted, part
from torchopt.typing import Numeric, Scalar, Schedule

__all__ = ["cosine_decay", "cosine_restarts", "fall"]


def fall(first: Scalar, last: Scalar, passed: Numeric) -> Numeric:
    """Return last + (first - last) (1 + cos(pi passed)) / 2."""
    first, last, passed = lifted(first, last, passed)
    value: Numeric = last + (first - last) * ((1 + cosine(math.pi * passed)) / 2)
    return value


@dataclass(frozen=True)
class CosineDecay:
    """A schedule; see `cosine_decay`."""

    init_value: Scalar
    end_value: Scalar
    decay_steps: int

    def __call__(self, count: Numeric) -> Numeric:
        """Return the value after `count` updates."""
        return fall(self.init_value, self.end_value, part(count, 0, self.decay_steps))


def cosine_decay(init_value: Scalar, decay_steps: int, end_value: Scalar = 0.0) -> Schedule:
    """Return the schedule end + (init - end) (1 + cos(pi count / decay_steps)) / 2.

    It stays at `end_value` from `decay_steps` updates on.

    Args:
        init_value: The first value.
        decay_steps: Number of updates of the decay, >= 1.
        end_value: The last value.

    Raises:
        ValueError: `decay_steps` is smaller than 1.

    References:
        I. Loshchilov, F. Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts, 2017,
        https://arxiv.org/abs/1608.03983, equation 5.

    Example:
        >>> [round(cosine_decay(1.0, 4)(count), 4) for count in (0, 2, 4, 9)]
        [1.0, 0.5, 0.0, 0.0]
    """
    if decay_steps < 1:
        raise ValueError(f"cosine_decay: expected decay_steps >= 1, got {decay_steps}")
    return CosineDecay(init_value, end_value, decay_steps)


@dataclass(frozen=True)
class CosineRestarts:
    """A schedule; see `cosine_restarts`."""

    init_value: Scalar
    end_value: Scalar
    period: int
    factor: int

    def __call__(self, count: Numeric) -> Numeric:
        """Return the value after `count` updates."""
        return fall(self.init_value, self.end_value, self._part(count))

    def _part(self, count: Numeric) -> Numeric:
        """Return which fraction of the current period has passed."""
        if self.factor == 1:
            return part(count % self.period, 0, self.period)  # type: ignore[no-any-return]
        if isinstance(count, torch.Tensor):
            return self._part_of_tensor(count)
        start, length = 0, self.period
        while count >= start + length:
            start, length = start + length, length * self.factor
        return (count - start) / length

    def _part_of_tensor(self, count: torch.Tensor) -> torch.Tensor:
        steps = count.to(torch.float64)
        # Period n starts at T (f^n - 1) / (f - 1). The logarithm gives n up to one.
        f = float(self.factor)
        n = torch.floor(torch.log(steps * (f - 1) / self.period + 1) / math.log(f))
        n = n + (steps >= self._start(n + 1)).to(torch.float64)
        n = n - (steps < self._start(n)).to(torch.float64)
        return (steps - self._start(n)) / (self.period * f**n)

    def _start(self, n: torch.Tensor) -> torch.Tensor:
        f = float(self.factor)
        return torch.round(self.period * (f**n - 1) / (f - 1))


def cosine_restarts(
    init_value: Scalar, period: int, factor: int = 1, end_value: Scalar = 0.0
) -> Schedule:
    """Return cosine decays one after the other, each `factor` times as long as the one before.

    In a period that starts at count s and has T updates, the value is end + (init - end)
    (1 + cos(pi (count - s) / T)) / 2.

    Args:
        init_value: The value at each restart.
        period: Number of updates of the first decay, >= 1.
        factor: Ratio of the lengths of two successive decays, an integer >= 1.
        end_value: The value each decay approaches.

    Raises:
        ValueError: `period` or `factor` is smaller than 1.

    References:
        I. Loshchilov, F. Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts, 2017,
        https://arxiv.org/abs/1608.03983, equation 5.

    Example:
        >>> [round(cosine_restarts(1.0, 2)(count), 4) for count in range(4)]
        [1.0, 0.5, 1.0, 0.5]
    """
    if period < 1 or factor < 1:
        raise ValueError(
            f"cosine_restarts: expected period >= 1 and factor >= 1, got {period} and {factor}"
        )
    return CosineRestarts(init_value, end_value, period, factor)
