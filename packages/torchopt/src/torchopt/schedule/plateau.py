# SPDX-License-Identifier: Apache-2.0
"""Lower the step size when a metric stops improving."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torchopt.typing import Numeric

__all__ = ["ReduceOnPlateau"]


@dataclass
class ReduceOnPlateau:
    """A schedule that is multiplied by `factor` when a metric has stopped to improve.

    It depends on what it is told by `observe` and not on the count. The same values as
    `torch.optim.lr_scheduler.ReduceLROnPlateau` with a relative threshold.

    Args:
        value: The first value.
        factor: What the value is multiplied by, in (0, 1).
        patience: Observations without improvement that are accepted.
        threshold: Relative change that counts as an improvement.
        cooldown: Observations after a reduction in which none is counted.
        min_value: The smallest value.
        maximize: The metric is to grow.

    Raises:
        ValueError: `factor` is not in (0, 1).

    Example:
        >>> schedule = ReduceOnPlateau(1.0, factor=0.5, patience=1)
        >>> for metric in (3.0, 3.0, 3.0):
        ...     schedule.observe(metric)
        >>> schedule(0)
        0.5
    """

    value: float
    factor: float = 0.1
    patience: int = 10
    threshold: float = 1e-4
    cooldown: int = 0
    min_value: float = 0.0
    maximize: bool = False
    best: float = field(default=math.nan, init=False)
    bad: int = field(default=0, init=False)
    cooling: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if not 0.0 < self.factor < 1.0:
            raise ValueError(f"ReduceOnPlateau: expected factor in (0, 1), got {self.factor}")

    def __call__(self, count: Numeric) -> float:
        """Return the present value, whatever the count."""
        return self.value

    def observe(self, metric: float) -> None:
        """Take note of a metric; lower the value when it has not improved for too long."""
        metric = float(metric)
        if math.isnan(self.best) or self._improves(metric):
            self.best = metric
            self.bad = 0
        else:
            self.bad += 1
        if self.cooling > 0:
            self.cooling -= 1
            self.bad = 0
        if self.bad > self.patience:
            self.value = max(self.value * self.factor, self.min_value)
            self.cooling = self.cooldown
            self.bad = 0

    def _improves(self, metric: float) -> bool:
        if self.maximize:
            return metric > self.best * (1 + self.threshold)
        return metric < self.best * (1 - self.threshold)
