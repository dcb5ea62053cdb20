# SPDX-License-Identifier: Apache-2.0
"""AdaDelta: step sizes from the squares of gradients and of steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from torchopt.base import GradientTransformation
from torchopt.documented import documented
from torchopt.kernels.reference.formulas import divide_by_root, moving_average, root
from torchopt.optimizers.stages import optimizer
from torchopt.transform.base import transformation_of
from torchopt.transform.rule import Hyper, Rule, at_least_zero, fraction
from torchopt.transform.validate import check
from torchopt.typing import ScalarOrSchedule

__all__ = ["ScaleByAdadeltaState", "adadelta", "scale_by_adadelta"]


class ScaleByAdadeltaState(NamedTuple):
    """`mu`, `nu`: moving averages of the squared gradient and of the squared direction."""

    mu: Any
    nu: Any


@dataclass(frozen=True)
class AdaDelta(Rule):
    """u = g sqrt(nu + eps) / sqrt(mu' + eps)."""

    rho: Hyper = fraction("rho parameter at index 0", 0.9, closed=True)
    eps: Hyper = at_least_zero("epsilon value", 1e-6)
    moment_requires_grad: bool = False
    State = ScaleByAdadeltaState
    kernel = "adadelta"

    def apply(self, c: Any, g: Tensor, state: Any, p: Any) -> Any:
        mu = moving_average(state[0], g * g, self.rho)
        u = divide_by_root(g * root(state[1] + self.eps), mu + self.eps, 0.0)
        return u, (mu, moving_average(state[1], u * u, self.rho))


@transformation_of(AdaDelta)
def scale_by_adadelta() -> None:
    r"""Return the transformation that computes AdaDelta's direction.

    .. math::
        \mu' = \rho \mu + (1 - \rho) g^2, \quad
        u = g \sqrt{\nu + \epsilon} / \sqrt{\mu' + \epsilon}, \quad
        \nu' = \rho \nu + (1 - \rho) u^2

    Args:
        rho: Decay of both averages, in [0, 1].
        eps: Added under both square roots, >= 0.
        moment_requires_grad: Make the initial averages leaves that require a gradient.

    References:
        M. D. Zeiler, ADADELTA: An Adaptive Learning Rate Method, 2012,
        https://arxiv.org/abs/1212.5701, Algorithm 1.
    """


@documented(scale_by_adadelta)
def adadelta(
    lr: ScalarOrSchedule = 1e-3,
    rho: float = 0.9,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    *,
    moment_requires_grad: bool = False,
) -> GradientTransformation:
    """Return AdaDelta."""
    check(rho, "0 <= number <= 1", "rho value")
    return optimizer(
        AdaDelta(rho, eps, moment_requires_grad), lr=lr, weight_decay=weight_decay, name="adadelta"
    )
