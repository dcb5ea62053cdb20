# SPDX-License-Identifier: Apache-2.0
"""RMSProp, centred or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from torchopt.base import GradientTransformation
from torchopt.documented import documented
from torchopt.kernels.reference.formulas import divide_by_root, moving_average
from torchopt.optimizers.sgd import trace
from torchopt.optimizers.stages import optimizer
from torchopt.transform.base import transformation_of
from torchopt.transform.rule import Hyper, Rule, at_least_zero, number
from torchopt.typing import ScalarOrSchedule

__all__ = ["ScaleByRStdDevState", "ScaleByRmsState", "rmsprop", "scale_by_rms", "scale_by_stddev"]


class ScaleByRmsState(NamedTuple):
    """`nu`: moving average of the squared gradient."""

    nu: Any


class ScaleByRStdDevState(NamedTuple):
    """`mu`, `nu`: moving averages of the gradient and of its square."""

    mu: Any
    nu: Any


@dataclass(frozen=True)
class RMSProp(Rule):
    """u = g / (sqrt(nu') + eps)."""

    alpha: Hyper = at_least_zero("alpha value", 0.9)
    eps: Hyper = at_least_zero("epsilon value", 1e-8)
    initial_scale: Hyper = number(0.0, starts="nu")
    State: ClassVar[Any] = ScaleByRmsState
    kernel = "rmsprop"

    def apply(self, c: Any, g: Tensor, state: Any, p: Any) -> Any:
        nu = moving_average(state[0], g * g, self.alpha)
        return divide_by_root(g, nu, self.eps), (nu,)


@dataclass(frozen=True)
class CenteredRMSProp(RMSProp):
    """u = g / (sqrt(nu' - mu'^2) + eps)."""

    State = ScaleByRStdDevState
    kernel = "rmsprop_centered"

    def apply(self, c: Any, g: Tensor, state: Any, p: Any) -> Any:
        mu = moving_average(state[0], g, self.alpha)
        nu = moving_average(state[1], g * g, self.alpha)
        return divide_by_root(g, nu - mu * mu, self.eps), (mu, nu)


@transformation_of(RMSProp)
def scale_by_rms() -> None:
    r"""Return the transformation that computes RMSProp's direction.

    .. math::
        \nu' = \alpha \nu + (1 - \alpha) g^2, \qquad u = g / (\sqrt{\nu'} + \epsilon)

    Where nu' is zero, the derivative of u is defined to be zero.

    Args:
        alpha: Decay of the average, in [0, 1).
        initial_scale: Initial value of the average of squares.

    References:
        T. Tieleman, G. Hinton, Lecture 6.5: RMSProp, 2012,
        https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf
    """


@transformation_of(CenteredRMSProp)
def scale_by_stddev() -> None:
    r"""Return the transformation that computes the direction of centered RMSProp.

    .. math::
        \mu' = \alpha \mu + (1 - \alpha) g, \quad \nu' = \alpha \nu + (1 - \alpha) g^2, \quad
        u = g / (\sqrt{\nu' - \mu'^2} + \epsilon)

    Where the variance is zero, the derivative of u is defined to be zero.

    Args:
        alpha: Decay of the averages, in [0, 1).
        initial_scale: Initial value of nu.

    References:
        A. Graves, Generating Sequences With Recurrent Neural Networks, 2013,
        https://arxiv.org/abs/1308.0850, equations 38 to 45.
    """


@documented(scale_by_rms)
def rmsprop(
    lr: ScalarOrSchedule = 1e-2,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    centered: bool = False,
    *,
    initial_scale: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> GradientTransformation:
    """Return RMSProp.

    The update is -lr * u, with u the direction of `torchopt.transform.scale_by_rms`
    (`scale_by_stddev` if `centered`), followed by `trace` if there is a momentum.

    Args:
        momentum: Decay of the trace of directions, >= 0.
        centered: Divide by the standard deviation of the gradient instead of its root mean square.
        nesterov: Look ahead by one step; needs a momentum.
    """
    rule = CenteredRMSProp if centered else RMSProp
    return optimizer(
        rule(alpha, eps, initial_scale),
        trace.rule(momentum, 0.0, nesterov),
        lr=lr,
        weight_decay=weight_decay,
        maximize=maximize,
        name="rmsprop",
    )
