# SPDX-License-Identifier: Apache-2.0
"""Lion's direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from torchopt.kernels.reference.moments import moving_average
from torchopt.kernels.reference.sign import sign
from torchopt.transform.base import LeafRule, transformation
from torchopt.transform.trace import zeros_like
from torchopt.transform.validate import check_betas

__all__ = ["ScaleByLionState", "scale_by_lion"]


class ScaleByLionState(NamedTuple):
    """`mu`: moving average of the gradient."""

    mu: Any


@dataclass(frozen=True)
class ScaleByLion(LeafRule):
    """The sign of an interpolation."""

    b1: float | Tensor
    b2: float | Tensor
    leaf_fields: ClassVar[tuple[str, ...]] = ("mu",)
    overwritten_fields: ClassVar[tuple[str, ...]] = ("mu",)

    def init_leaves(self, params: list[Tensor]) -> ScaleByLionState:
        """Return averages of zero."""
        return ScaleByLionState(
            mu=zeros_like(params, False),
        )

    def update_leaves(
        self, grads: list[Tensor], state: Any, params: list[Tensor], *, inplace: bool
    ) -> tuple[list[Tensor], Any]:
        """Return the directions and the new state."""
        updates = [sign(moving_average(m, g, self.b1)) for g, m in zip(grads, state.mu)]
        mu = [moving_average(m, g, self.b2) for g, m in zip(grads, state.mu)]
        return updates, ScaleByLionState(mu=mu)


@transformation
def scale_by_lion(
    b1: float | Tensor = 0.9,
    b2: float | Tensor = 0.99,
) -> LeafRule:
    r"""Return the transformation to Lion's direction.

    .. math::
        u = \mathrm{sign}(b_1 \mu + (1 - b_1) g), \qquad \mu' = b_2 \mu + (1 - b_2) g

    The derivative of the sign is zero wherever it exists. Where g is NaN, so is u.

    Args:
        b1: Weight of the average in the direction, in [0, 1).
        b2: Decay of the average, in [0, 1).

    Raises:
        ValueError: A hyper-parameter out of range.

    References:
        X. Chen et al., Symbolic Discovery of Optimization Algorithms, 2023,
        https://arxiv.org/abs/2302.06675, Algorithm 2.
    """
    check_betas(b1, b2)
    return ScaleByLion(b1, b2)
