# SPDX-License-Identifier: Apache-2.0
"""Exponential moving average of the updates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from torchopt.kernels.reference.formulas import bias_correction, moving_average
from torchopt.transform.base import LeafRule, transformation_of
from torchopt.transform.counts import increment, zero_counts
from torchopt.transform.starts import zeros_like
from torchopt.transform.validate import Hyper, fraction

__all__ = ["EmaState", "ema"]


class EmaState(NamedTuple):
    """`ema`: the average; `count`: updates of each leaf."""

    ema: Any
    count: Any


@dataclass(frozen=True)
class Ema(LeafRule):
    """u = ema' / (1 - decay^k)."""

    decay: Hyper = fraction("decay value")
    debias: bool = True
    leaf_fields: ClassVar[tuple[str, ...]] = ("ema", "count")
    overwritten_fields: ClassVar[tuple[str, ...]] = ("ema",)

    def init_leaves(self, params: list[Tensor]) -> EmaState:
        """Return averages and counts of zero."""
        return EmaState(ema=zeros_like(params, False), count=zero_counts(params))

    def update_leaves(
        self, grads: list[Tensor], state: Any, params: list[Tensor], *, inplace: bool
    ) -> tuple[list[Tensor], Any]:
        """Return the averages."""
        counts = increment(state.count)
        averages = [moving_average(e, g, self.decay) for g, e in zip(grads, state.ema)]
        updates = [
            e / bias_correction(self.decay, k, e.dtype) if self.debias else e.clone()
            for e, k in zip(averages, counts)
        ]
        return updates, EmaState(ema=averages, count=counts)


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
