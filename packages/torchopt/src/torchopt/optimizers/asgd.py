# SPDX-License-Identifier: Apache-2.0
"""Averaged SGD."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchopt.base import GradientTransformation
from torchopt.documented import documented
from torchopt.optimizers.stages import optimizer
from torchopt.transform.base import transformation
from torchopt.transform.rule import Hyper, Rule, at_least_zero, number

__all__ = ["ScaleByAsgdState", "asgd", "scale_by_asgd"]


class ScaleByAsgdState(NamedTuple):
    """`average`: mean of the iterates; `count`: steps of each leaf."""

    average: Any
    count: Any

    @staticmethod
    def exact_fields() -> tuple[str, ...]:
        """Return the fields that `in_8_bits` leaves as they are, and `compensated` in float32."""
        return ("average",)


@dataclass(frozen=True)
class ASGD(Rule):
    """u = eta_k (g + lambd p), with eta_k the decaying step size."""

    eta: Hyper = at_least_zero("learning rate")
    lambd: Hyper = at_least_zero("lambd value")
    alpha: Hyper = at_least_zero("alpha value")
    t0: Hyper = number()
    State = ScaleByAsgdState
    kernel = "asgd"

    def hyper_parameters(self) -> dict[str, Any]:
        """Return the fields, and `eta` as the step size."""
        found = super().hyper_parameters()
        return {"lr": found.pop("eta"), **found}

    reads_params = True
    constant_derivative = True

    def coefficients(self, k: Any, *shared: Tensor) -> tuple[Any, ...]:
        """Return the step size, and the weight of the next iterate in the average."""
        before = (k - 1).to(torch.float64)
        eta = self.eta / (1 + self.lambd * self.eta * before) ** self.alpha
        return eta, 1 / (before - self.t0).clamp(min=1)

    def apply(self, c: Any, g: Tensor, state: Any, p: Any) -> Any:
        """Return the step without its minus sign, and the average after the step."""
        eta, weight = c
        (average,) = state
        step = eta * (g + p * self.lambd)
        return step, (average + weight * (p - step - average),)


@transformation
def scale_by_asgd(
    lr: float | Tensor = 1e-2,
    lambd: float | Tensor = 1e-4,
    alpha: float | Tensor = 0.75,
    t0: float | Tensor = 1e6,
) -> Rule:
    r"""Return the transformation that computes the step of averaged SGD.

    .. math::
        \eta_k = \eta / (1 + \lambda \eta k)^{\alpha}, \qquad u = \eta_k (g + \lambda p), \qquad
        a' = a + (p - u - a) / \max(1, k - t_0)

    with k the number of previous steps. The step size is part of u; the minus sign is not. The
    state holds the average of the iterates from step t_0 on.

    Args:
        lr: eta, the first step size, >= 0.
        lambd: lambda, the decay term, >= 0.
        alpha: Exponent of the decay of the step size, >= 0.
        t0: Number of steps before the average starts.

    Raises:
        ValueError: A hyper-parameter is out of range.
        AssertionError: From `update`, when it is called without `params`.

    References:
        B. T. Polyak, A. B. Juditsky, Acceleration of Stochastic Approximation by Averaging, 1992.
        The step size is that of torch.optim.ASGD.

    Example:
        >>> import torch
        >>> step = scale_by_asgd(lr=0.5, lambd=0.0)
        >>> p, g = torch.tensor([1.0]), torch.tensor([2.0])
        >>> step.update(g, step.init(p), params=p)[0]
        tensor([1.])
    """
    return ASGD(lr, lambd, alpha, t0)


@documented(scale_by_asgd)
def asgd(
    lr: float | Tensor = 1e-2,
    lambd: float = 1e-4,
    alpha: float = 0.75,
    t0: float = 1e6,
    weight_decay: float = 0.0,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """Return averaged SGD.

    The update is minus the step of `torchopt.transform.scale_by_asgd`. Its state has the averaged
    iterates.
    """
    direction = ASGD(lr, lambd, alpha, t0)
    return optimizer(direction, lr=1.0, weight_decay=weight_decay, maximize=maximize, name="asgd")
