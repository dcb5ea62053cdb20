# SPDX-License-Identifier: Apache-2.0
"""AdaDelta's direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from torchopt.kernels.reference.moments import moving_average
from torchopt.kernels.reference.root import divide_by_root, root
from torchopt.transform.base import LeafRule, transformation
from torchopt.transform.starts import zeros_like
from torchopt.transform.validate import check_at_least_zero, check_fraction

__all__ = ["ScaleByAdadeltaState", "scale_by_adadelta"]


class ScaleByAdadeltaState(NamedTuple):
    """`mu`, `nu`: moving averages of the squared gradient and of the squared direction."""

    mu: Any
    nu: Any


@dataclass(frozen=True)
class ScaleByAdadelta(LeafRule):
    """u = g sqrt(nu + eps) / sqrt(mu' + eps)."""

    rho: float | Tensor
    eps: float | Tensor
    moment_requires_grad: bool
    leaf_fields: ClassVar[tuple[str, ...]] = ("mu", "nu")
    overwritten_fields: ClassVar[tuple[str, ...]] = ("mu", "nu")

    def init_leaves(self, params: list[Tensor]) -> ScaleByAdadeltaState:
        """Return averages of zero."""
        return ScaleByAdadeltaState(
            mu=zeros_like(params, self.moment_requires_grad),
            nu=zeros_like(params, self.moment_requires_grad),
        )

    def update_leaves(
        self, grads: list[Tensor], state: Any, params: list[Tensor], *, inplace: bool
    ) -> tuple[list[Tensor], Any]:
        """Return the directions and the new averages."""
        mu = [moving_average(m, g * g, self.rho) for g, m in zip(grads, state.mu)]
        updates = [
            divide_by_root(g * root(n + self.eps), m + self.eps, 0.0)
            for g, m, n in zip(grads, mu, state.nu)
        ]
        nu = [moving_average(n, u * u, self.rho) for u, n in zip(updates, state.nu)]
        return updates, ScaleByAdadeltaState(mu=mu, nu=nu)


@transformation
def scale_by_adadelta(
    rho: float | Tensor = 0.9, eps: float | Tensor = 1e-6, moment_requires_grad: bool = False
) -> LeafRule:
    r"""Return the transformation to AdaDelta's direction.

    .. math::
        \mu' = \rho \mu + (1 - \rho) g^2, \quad
        u = g \sqrt{\nu + \epsilon} / \sqrt{\mu' + \epsilon}, \quad
        \nu' = \rho \nu + (1 - \rho) u^2

    Args:
        rho: Decay of both averages, in [0, 1].
        eps: Added under both roots, >= 0.
        moment_requires_grad: Make the initial averages leaves that require a gradient.

    References:
        M. D. Zeiler, ADADELTA: An Adaptive Learning Rate Method, 2012,
        https://arxiv.org/abs/1212.5701, Algorithm 1.
    """
    check_at_least_zero(eps, "epsilon value")
    check_fraction(rho, "rho parameter at index 0", closed=True)
    return ScaleByAdadelta(rho, eps, moment_requires_grad)
