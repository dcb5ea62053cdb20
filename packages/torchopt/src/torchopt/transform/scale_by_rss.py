# SPDX-License-Identifier: Apache-2.0
"""AdaGrad's direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from torchopt.kernels.reference.root import divide_by_root
from torchopt.transform.base import LeafRule, transformation
from torchopt.transform.starts import filled_like
from torchopt.transform.validate import check_at_least_zero

__all__ = ["ScaleByRssState", "scale_by_rss"]


class ScaleByRssState(NamedTuple):
    """`sum_of_squares`: sum of all squared gradients so far."""

    sum_of_squares: Any


@dataclass(frozen=True)
class ScaleByRss(LeafRule):
    """u = g / (sqrt(s') + eps)."""

    initial_accumulator_value: float | Tensor
    eps: float | Tensor
    leaf_fields: ClassVar[tuple[str, ...]] = ("sum_of_squares",)
    overwritten_fields: ClassVar[tuple[str, ...]] = ("sum_of_squares",)

    def init_leaves(self, params: list[Tensor]) -> ScaleByRssState:
        """Return sums of `initial_accumulator_value`."""
        start = self.initial_accumulator_value
        return ScaleByRssState(sum_of_squares=filled_like(params, start))

    def update_leaves(
        self, grads: list[Tensor], state: Any, params: list[Tensor], *, inplace: bool
    ) -> tuple[list[Tensor], Any]:
        """Return the directions and the new sums."""
        sums = [s + g * g for g, s in zip(grads, state.sum_of_squares)]
        updates = [
            torch.where(s == 0, 0.0, divide_by_root(g, s, self.eps)) for g, s in zip(grads, sums)
        ]
        return updates, ScaleByRssState(sum_of_squares=sums)


@transformation
def scale_by_rss(
    initial_accumulator_value: float | Tensor = 0.0, eps: float | Tensor = 1e-10
) -> LeafRule:
    r"""Return the transformation to AdaGrad's direction.

    .. math::
        s' = s + g^2, \qquad u = g / (\sqrt{s'} + \epsilon)

    Where s' is exactly zero, u and its derivative are zero.

    Args:
        initial_accumulator_value: What the sum starts from, >= 0.
        eps: Added to the root, >= 0.

    References:
        J. Duchi, E. Hazan, Y. Singer, Adaptive Subgradient Methods for Online Learning and
        Stochastic Optimization, JMLR 12, 2011, https://jmlr.org/papers/v12/duchi11a.html
    """
    check_at_least_zero(initial_accumulator_value, "initial_accumulator_value value")
    check_at_least_zero(eps, "epsilon value")
    return ScaleByRss(initial_accumulator_value, eps)
