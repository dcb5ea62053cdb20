# SPDX-License-Identifier: Apache-2.0
"""Exponential moving average of the updates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from torchopt.kernels.reference.formulas import bias_correction, moving_average
from torchopt.transform.base import transformation_of
from torchopt.transform.rule import Hyper, Rule, fraction

__all__ = ["EmaState", "ema"]


class EmaState(NamedTuple):
    """`ema`: the average; `count`: updates of each leaf."""

    ema: Any
    count: Any


@dataclass(frozen=True)
class Ema(Rule):
    """u = ema' / (1 - decay^k)."""

    decay: Hyper = fraction("decay value")
    debias: bool = True
    State = EmaState

    def coefficients(self, k: Any, *shared: Tensor) -> tuple[Any, ...]:
        return (bias_correction(self.decay, k),)

    def apply(self, c: Any, g: Tensor, state: Any, p: Any) -> Any:
        average = moving_average(state[0], g, self.decay)
        return average / c[0] if self.debias else average, (average,)


@transformation_of(Ema)
def ema() -> None:
    r"""Return the transformation that computes the exponential moving average of the updates.

    .. math::
        e' = d e + (1 - d) g, \qquad u = e' / (1 - d^k)

    with k the number of updates of a leaf, this one included.

    Args:
        decay: d, in [0, 1).
        debias: Divide by 1 - d^k; otherwise u = e'.

    References:
        D. P. Kingma, J. Ba, Adam: A Method for Stochastic Optimization, 2015,
        https://arxiv.org/abs/1412.6980, section 3 (the correction of the bias).

    Example:
        >>> import torch
        >>> average = ema(0.5)
        >>> g = torch.tensor([1.0])
        >>> u, state = average.update(g, average.init(g))
        >>> u, average.update(4 * g, state)[0]
        (tensor([1.]), tensor([3.]))
    """
