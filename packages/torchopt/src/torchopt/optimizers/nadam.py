# SPDX-License-Identifier: Apache-2.0
"""NAdam: Adam with Nesterov's momentum; NAdamW decouples weight decay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from torchopt.base import GradientTransformation
from torchopt.documented import DECOUPLED, documented
from torchopt.kernels.reference.formulas import bias_correction, divide_by_root, moving_average
from torchopt.optimizers.stages import optimizer
from torchopt.transform.base import transformation
from torchopt.transform.rule import Hyper, Rule, at_least_zero, fraction
from torchopt.typing import ScalarOrSchedule

__all__ = ["ScaleByNadamState", "nadam", "nadamw", "scale_by_nadam"]


class ScaleByNadamState(NamedTuple):
    """`mu`, `nu`: moments; `mu_product`: product of the momenta; `count`: steps of each leaf."""

    mu: Any
    nu: Any
    mu_product: Any
    count: Any


@dataclass(frozen=True)
class NAdam(Rule):
    """u = (w_g g + w_mu mu') / (sqrt(nu_hat + eps_root) + eps); the weights depend on the step."""

    b1: Hyper = fraction("beta parameter at index 0", 0.9)
    b2: Hyper = fraction("beta parameter at index 1", 0.999)
    eps: Hyper = at_least_zero("epsilon value", 1e-8)
    eps_root: Hyper = at_least_zero("epsilon value", 0.0)
    momentum_decay: Hyper = at_least_zero("momentum_decay value", 4e-3)
    State = ScaleByNadamState
    shared: ClassVar[dict[str, float]] = {"mu_product": 1.0}
    kernel = "nadam"

    def _momentum(self, k: Tensor) -> Any:
        return self.b1 - 0.5 * self.b1 * 0.96 ** (k.to(torch.float64) * self.momentum_decay)

    def following(self, k: Tensor, *shared: Tensor) -> tuple[Tensor, ...]:
        """Return the product of the momenta up to this step."""
        return (shared[0] * self._momentum(k),)

    def coefficients(self, k: Any, *shared: Tensor) -> tuple[Any, ...]:
        (product,) = self.following(k, *shared)
        now, ahead = self._momentum(k), self._momentum(k + 1)
        weights = (1 - now) / (1 - product), ahead / (1 - product * ahead)
        return (*weights, bias_correction(self.b2, k))

    def apply(self, c: Any, g: Tensor, state: Any, p: Any) -> Any:
        g_weight, mu_weight, nu_correction = c
        mu = moving_average(state[0], g, self.b1)
        nu = moving_average(state[1], g * g, self.b2)
        radicand = nu / nu_correction + self.eps_root
        return divide_by_root(g_weight * g + mu_weight * mu, radicand, self.eps), (mu, nu)


@transformation
def scale_by_nadam(
    b1: float | Tensor = 0.9,
    b2: float | Tensor = 0.999,
    eps: float | Tensor = 1e-8,
    momentum_decay: float | Tensor = 4e-3,
) -> Rule:
    r"""Return the transformation that computes NAdam's direction.

    .. math::
        m_k = b_1 (1 - 0.96^{k \psi} / 2), \qquad
        u = \frac{(1 - m_k) g / (1 - \prod_{i \le k} m_i)
        + m_{k+1} \mu' / (1 - \prod_{i \le k+1} m_i)}
        {\sqrt{\nu' / (1 - b_2^k)} + \epsilon}

    with Adam's moments and psi = momentum_decay.

    Args:
        momentum_decay: psi, how fast the momentum grows to its limit, >= 0.

    References:
        T. Dozat, Incorporating Nesterov Momentum into Adam, 2016,
        https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ
    """
    return NAdam(b1, b2, eps, 0.0, momentum_decay)


@documented(scale_by_nadam)
def nadam(
    lr: ScalarOrSchedule = 2e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum_decay: float = 4e-3,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """Return NAdam: Adam with Nesterov's momentum."""
    direction = NAdam.from_betas(betas, eps, 0.0, momentum_decay)
    return optimizer(direction, lr=lr, weight_decay=weight_decay, maximize=maximize, name="nadam")


@documented(scale_by_nadam, weight_decay=DECOUPLED)
def nadamw(
    lr: ScalarOrSchedule = 2e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    momentum_decay: float = 4e-3,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """Return NAdam with decoupled weight decay."""
    direction = NAdam.from_betas(betas, eps, 0.0, momentum_decay)
    return optimizer(
        direction, lr=lr, decoupled_weight_decay=weight_decay, maximize=maximize, name="nadamw"
    )
