# SPDX-License-Identifier: Apache-2.0
"""Averaged SGD's step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from torchopt.transform.base import LeafRule, transformation
from torchopt.transform.counts import for_each_distinct, increment, zero_counts
from torchopt.transform.starts import zeros_like
from torchopt.transform.validate import check_at_least_zero

__all__ = ["ScaleByAsgdState", "scale_by_asgd"]


class ScaleByAsgdState(NamedTuple):
    """`average`: mean of the iterates; `count`: steps of each leaf."""

    average: Any
    count: Any


@dataclass(frozen=True)
class ScaleByAsgd(LeafRule):
    """u = eta_k (g + lambd p), with eta_k the decaying step size."""

    eta: float | Tensor
    lambd: float | Tensor
    alpha: float | Tensor
    t0: float | Tensor
    leaf_fields: ClassVar[tuple[str, ...]] = ("average", "count")
    overwritten_fields: ClassVar[tuple[str, ...]] = ("average",)
    reads_params: ClassVar[bool] = True

    def init_leaves(self, params: list[Tensor]) -> ScaleByAsgdState:
        """Return averages and counts of zero."""
        return ScaleByAsgdState(average=zeros_like(params, False), count=zero_counts(params))

    def update_leaves(
        self, grads: list[Tensor], state: Any, params: list[Tensor], *, inplace: bool
    ) -> tuple[list[Tensor], Any]:
        """Return the steps, with a minus still to come, and the averages after them."""
        updates, averages = [], []
        scalars = for_each_distinct(self._scalars, state.count, [g.dtype for g in grads])
        for g, p, average, (eta, weight) in zip(grads, params, state.average, scalars):
            step = eta * (g + p * self.lambd)
            updates.append(step)
            averages.append(average + weight * (p - step - average))
        return updates, ScaleByAsgdState(average=averages, count=increment(state.count))

    def _scalars(self, count: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the step size and the weight of the next iterate in the average."""
        k = count.to(torch.float64)
        eta = self.eta / (1 + self.lambd * self.eta * k) ** self.alpha
        return eta.to(dtype), (1 / (k - self.t0).clamp(min=1)).to(dtype)


@transformation
def scale_by_asgd(
    lr: float | Tensor = 1e-2,
    lambd: float | Tensor = 1e-4,
    alpha: float | Tensor = 0.75,
    t0: float | Tensor = 1e6,
) -> LeafRule:
    r"""Return the transformation to the step of averaged SGD.

    .. math::
        \eta_k = \eta / (1 + \lambda \eta k)^{\alpha}, \qquad u = \eta_k (g + \lambda p), \qquad
        a' = a + (p - u - a) / \max(1, k - t_0)

    with k the number of previous steps. The step size is part of u. The iterates are averaged in
    the state from step t_0 on.

    Args:
        lr: eta, >= 0.
        lambd: lambda, >= 0.
        alpha: Exponent of the decay, >= 0.
        t0: Steps before the average starts.

    Raises:
        ValueError: A hyper-parameter out of range.
        AssertionError: From `update`, when it is called without `params`.

    References:
        B. T. Polyak, A. B. Juditsky, Acceleration of Stochastic Approximation by Averaging, 1992.
        The step size is that of torch.optim.ASGD.
    """
    check_at_least_zero(lr, "learning rate")
    check_at_least_zero(lambd, "lambd value")
    check_at_least_zero(alpha, "alpha value")
    return ScaleByAsgd(lr, lambd, alpha, t0)
