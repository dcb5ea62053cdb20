# SPDX-License-Identifier: Apache-2.0
"""ADOPT: momentum of gradients that are scaled by the second moment of earlier ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchopt.base import GradientTransformation
from torchopt.documented import documented
from torchopt.kernels.reference.formulas import in_double, moving_average, root
from torchopt.optimizers.stages import optimizer
from torchopt.transform.base import transformation_of
from torchopt.transform.rule import Hyper, Rule, at_least_zero, fraction
from torchopt.typing import ScalarOrSchedule

__all__ = ["ScaleByAdoptState", "adopt", "scale_by_adopt"]


class ScaleByAdoptState(NamedTuple):
    """`mu`, `nu`: first and second moment; `count`: steps of each leaf."""

    mu: Any
    nu: Any
    count: Any


@dataclass(frozen=True)
class ADOPT(Rule):
    """u = mu' = b1 mu + (1 - b1) clip(g / max(sqrt(nu), eps)); the first gradient only sets nu."""

    b1: Hyper = fraction("beta parameter at index 0", 0.9)
    b2: Hyper = fraction("beta parameter at index 1", 0.9999)
    eps: Hyper = at_least_zero("epsilon value", 1e-6)
    State = ScaleByAdoptState

    def coefficients(self, k: Any, *shared: Tensor) -> tuple[Any, ...]:
        """Return whether this is the first step, the bound of a scaled gradient, and eps.

        The first step uses no quotient. There eps is 1, so that none is infinite.
        """
        first, eps = k == 1, in_double(self.eps, k)
        return first, torch.pow((k - 1).to(torch.float64), 0.25), torch.where(first, 1.0, eps)

    def apply(self, c: Any, g: Tensor, state: Any, p: Any) -> Any:
        first, limit, eps = c
        mu, nu = state
        scaled = g / root(nu).clamp(min=eps)
        clipped = torch.minimum(torch.maximum(scaled, -limit), limit)
        mu = torch.where(first, mu, moving_average(mu, clipped, self.b1))
        return mu, (mu, torch.where(first, g * g, moving_average(nu, g * g, self.b2)))


@transformation_of(ADOPT)
def scale_by_adopt() -> None:
    r"""Return the transformation that computes ADOPT's direction.

    .. math::
        \mu' = b_1 \mu + (1 - b_1)\,\mathrm{clip}(g / \max(\sqrt{\nu}, \epsilon), \pm k^{1/4}),
        \quad u = \mu', \quad \nu' = b_2 \nu + (1 - b_2) g^2

    The first gradient only sets nu = g^2; k counts the steps after it, from 1.

    Args:
        eps: Lower bound of the divisor, >= 0.

    References:
        S. Taniguchi et al., ADOPT: Modified Adam Can Converge with Any beta2 with the Optimal
        Rate, 2024, https://arxiv.org/abs/2411.02853, Algorithm 2.
    """


@documented(scale_by_adopt)
def adopt(
    lr: ScalarOrSchedule = 1e-3,
    betas: tuple[float, float] = (0.9, 0.9999),
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """Return ADOPT."""
    direction = ADOPT.from_betas(betas, eps)
    return optimizer(direction, lr=lr, weight_decay=weight_decay, maximize=maximize, name="adopt")
