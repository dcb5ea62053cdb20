# SPDX-License-Identifier: Apache-2.0
"""Centered RMSProp's direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from torchopt.kernels.reference.moments import moving_average
from torchopt.kernels.reference.root import divide_by_root
from torchopt.transform.base import LeafRule, transformation
from torchopt.transform.starts import filled_like, zeros_like
from torchopt.transform.validate import check_at_least_zero

__all__ = ["ScaleByRStdDevState", "scale_by_stddev"]


class ScaleByRStdDevState(NamedTuple):
    """`mu`, `nu`: moving averages of the gradient and of its square."""

    mu: Any
    nu: Any


@dataclass(frozen=True)
class ScaleByStdDev(LeafRule):
    """u = g / (sqrt(nu' - mu'^2) + eps)."""

    alpha: float | Tensor
    eps: float | Tensor
    initial_scale: float | Tensor
    leaf_fields: ClassVar[tuple[str, ...]] = ("mu", "nu")
    overwritten_fields: ClassVar[tuple[str, ...]] = ("mu", "nu")

    def init_leaves(self, params: list[Tensor]) -> ScaleByRStdDevState:
        """Return averages of zero and of `initial_scale`."""
        return ScaleByRStdDevState(
            mu=zeros_like(params, False),
            nu=filled_like(params, self.initial_scale),
        )

    def update_leaves(
        self, grads: list[Tensor], state: Any, params: list[Tensor], *, inplace: bool
    ) -> tuple[list[Tensor], Any]:
        """Return the directions and the new averages."""
        mu = [moving_average(m, g, self.alpha) for g, m in zip(grads, state.mu)]
        nu = [moving_average(n, g * g, self.alpha) for g, n in zip(grads, state.nu)]
        updates = [divide_by_root(g, n - m * m, self.eps) for g, m, n in zip(grads, mu, nu)]
        return updates, ScaleByRStdDevState(mu=mu, nu=nu)


@transformation
def scale_by_stddev(
    alpha: float | Tensor = 0.9, eps: float | Tensor = 1e-8, initial_scale: float | Tensor = 0.0
) -> LeafRule:
    r"""Return the transformation to the direction of centered RMSProp.

    .. math::
        \mu' = \alpha \mu + (1 - \alpha) g, \quad \nu' = \alpha \nu + (1 - \alpha) g^2, \quad
        u = g / (\sqrt{\nu' - \mu'^2} + \epsilon)

    Where the variance is exactly zero, the derivative of u is defined to be zero.

    Args:
        alpha: Decay of the averages, in [0, 1).
        eps: Added to the root, >= 0.
        initial_scale: What nu starts from.

    References:
        A. Graves, Generating Sequences With Recurrent Neural Networks, 2013, https://arxiv.org/abs/1308.0850
    """
    check_at_least_zero(alpha, "alpha value")
    check_at_least_zero(eps, "epsilon value")
    return ScaleByStdDev(alpha, eps, initial_scale)
