# SPDX-License-Identifier: Apache-2.0
"""RMSProp's direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from torchopt.kernels.reference.moments import moving_average
from torchopt.kernels.reference.root import divide_by_root
from torchopt.transform.base import LeafRule, transformation
from torchopt.transform.starts import filled_like
from torchopt.transform.validate import check_at_least_zero

__all__ = ["ScaleByRmsState", "scale_by_rms"]


class ScaleByRmsState(NamedTuple):
    """`nu`: moving average of the squared gradient."""

    nu: Any


@dataclass(frozen=True)
class ScaleByRms(LeafRule):
    """u = g / (sqrt(nu') + eps)."""

    alpha: float | Tensor
    eps: float | Tensor
    initial_scale: float | Tensor
    leaf_fields: ClassVar[tuple[str, ...]] = ("nu",)
    overwritten_fields: ClassVar[tuple[str, ...]] = ("nu",)

    def init_leaves(self, params: list[Tensor]) -> ScaleByRmsState:
        """Return averages of `initial_scale`."""
        return ScaleByRmsState(nu=filled_like(params, self.initial_scale))

    def update_leaves(
        self, grads: list[Tensor], state: Any, params: list[Tensor], *, inplace: bool
    ) -> tuple[list[Tensor], Any]:
        """Return the directions and the new averages."""
        nu = [moving_average(n, g * g, self.alpha) for g, n in zip(grads, state.nu)]
        updates = [divide_by_root(g, n, self.eps) for g, n in zip(grads, nu)]
        return updates, ScaleByRmsState(nu=nu)


@transformation
def scale_by_rms(
    alpha: float | Tensor = 0.9, eps: float | Tensor = 1e-8, initial_scale: float | Tensor = 0.0
) -> LeafRule:
    r"""Return the transformation to RMSProp's direction.

    .. math::
        \nu' = \alpha \nu + (1 - \alpha) g^2, \qquad u = g / (\sqrt{\nu'} + \epsilon)

    Where nu' is exactly zero, the derivative of u is defined to be zero.

    Args:
        alpha: Decay of the average, in [0, 1).
        eps: Added to the root, >= 0.
        initial_scale: What the average starts from.

    References:
        T. Tieleman, G. Hinton, Lecture 6.5: RMSProp, 2012,
        https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf
    """
    check_at_least_zero(alpha, "alpha value")
    check_at_least_zero(eps, "epsilon value")
    return ScaleByRms(alpha, eps, initial_scale)
