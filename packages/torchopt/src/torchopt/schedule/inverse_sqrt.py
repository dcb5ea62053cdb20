# SPDX-License-Identifier: Apache-2.0
"""Decay with the inverse square root of the step count."""

from __future__ import annotations

from dataclasses import dataclass

from torchopt.schedule.formula import choose, lifted, power
from torchopt.typing import Numeric, Scalar, Schedule

__all__ = ["inverse_sqrt"]


@dataclass(frozen=True)
class InverseSqrt:
    """A schedule; see `inverse_sqrt`."""

    peak_value: Scalar
    warmup_steps: int

    def __call__(self, count: Numeric) -> Numeric:
        """Return the value after `count` updates."""
        w = self.warmup_steps
        peak, k = lifted(self.peak_value, count + 1)
        value: Numeric = peak * choose(k <= w, k / w, power(w / k, 0.5))
        return value


def inverse_sqrt(peak_value: Scalar, warmup_steps: int) -> Schedule:
    r"""Return the schedule of the Transformer: a linear rise, then an inverse square root.

    .. math::
        \eta_k = \eta \min(k / w, \sqrt{w / k}), \qquad k = count + 1

    Args:
        peak_value: The largest value eta, reached after w updates.
        warmup_steps: w, >= 1.

    Raises:
        ValueError: `warmup_steps` is smaller than 1.

    References:
        A. Vaswani et al., Attention Is All You Need, 2017, https://arxiv.org/abs/1706.03762,
        equation 3.

    Example:
        >>> [inverse_sqrt(1.0, 4)(count) for count in (0, 3, 15)]
        [0.25, 1.0, 0.5]
    """
    if warmup_steps < 1:
        raise ValueError(f"inverse_sqrt: expected warmup_steps >= 1, got {warmup_steps}")
    return InverseSqrt(peak_value, warmup_steps)
