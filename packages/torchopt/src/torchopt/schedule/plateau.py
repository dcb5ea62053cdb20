# SPDX-License-Identifier: Apache-2.0
"""Lower the step size when a metric stops improving."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from torchopt.schedule.formula import choose, lifted
from torchopt.typing import Numeric, Scalar

__all__ = ["ReduceOnPlateau"]


@dataclass
class ReduceOnPlateau:
    """A schedule that is multiplied by `factor` when a metric has stopped improving.

    Its value depends on the metrics passed to `observe`, not on the count. The values are those of
    `torch.optim.lr_scheduler.ReduceLROnPlateau`: NaN and the worst infinity are no improvements.

    Args:
        value: The first value; a number, or a 0-dim tensor, which is read in each step and
            differentiated.
        factor: The factor of a reduction, in (0, 1).
        patience: How many observations without improvement are accepted.
        threshold: The smallest change that is an improvement.
        cooldown: How many observations after a reduction are ignored.
        min_value: The smallest value.
        maximize: Whether a larger metric is better.
        threshold_mode: "rel" for a threshold relative to the best metric, "abs" for an absolute
            one.
        eps: Reductions that are not larger than this are not made.

    Raises:
        ValueError: `factor` is not in (0, 1), or `threshold_mode` is unknown.

    Example:
        >>> schedule = ReduceOnPlateau(1.0, factor=0.5, patience=1)
        >>> for metric in (3.0, 3.0, 3.0):
        ...     schedule.observe(metric)
        >>> schedule(0)
        0.5
    """

    changes_in_use: ClassVar[bool] = True  # it may change between a run and its derivative

    value: Scalar
    factor: float = 0.1
    patience: int = 10
    threshold: float = 1e-4
    cooldown: int = 0
    min_value: Scalar = 0.0
    maximize: bool = False
    threshold_mode: str = "rel"
    eps: float = 1e-8
    best: float = field(default=math.inf, init=False)
    bad: int = field(default=0, init=False)
    cooling: int = field(default=0, init=False)
    reductions: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if not 0.0 < self.factor < 1.0:
            raise ValueError(f"ReduceOnPlateau: expected factor in (0, 1), got {self.factor}")
        if self.threshold_mode not in ("rel", "abs"):
            raise ValueError(
                "ReduceOnPlateau: expected threshold_mode 'rel' or 'abs', got "
                f"{self.threshold_mode!r}"
            )
        if self.maximize:
            self.best = -math.inf

    def __call__(self, count: Numeric) -> Numeric:
        """Return the current value; it does not depend on the count."""
        value: Any = self.value
        for _ in range(self.reductions):
            value = self._lowered(value)
        return value  # type: ignore[no-any-return]

    def observe(self, metric: float | torch.Tensor) -> None:
        """Record a metric; lower the value when it has not improved for too long."""
        metric = float(metric.detach() if isinstance(metric, torch.Tensor) else metric)
        if self._improves(metric):
            self.best = metric
            self.bad = 0
        else:
            self.bad += 1
        if self.cooling > 0:
            self.cooling -= 1
            self.bad = 0
        if self.bad > self.patience:
            with torch.no_grad():
                present: Any = self(0)
                if float(present) - float(self._lowered(present)) > self.eps:
                    self.reductions += 1
            self.cooling = self.cooldown
            self.bad = 0

    def _lowered(self, value: Any) -> Any:
        lowered, smallest = lifted(value * self.factor, self.min_value)
        return choose(smallest > lowered, smallest, lowered)

    def _improves(self, metric: float) -> bool:
        sign = 1.0 if self.maximize else -1.0
        if self.threshold_mode == "abs":
            bound = self.best + sign * self.threshold
        else:
            bound = self.best * (1.0 + sign * self.threshold)
        return metric > bound if self.maximize else metric < bound
