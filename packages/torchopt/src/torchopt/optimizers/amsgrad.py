# SPDX-License-Identifier: Apache-2.0
"""AMSGrad: Adam with the largest second moment so far; AMSGradW decouples weight decay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from torchopt.base import GradientTransformation
from torchopt.documented import DECOUPLED, documented
from torchopt.kernels.reference.formulas import divide_by_root, moving_average
from torchopt.optimizers.adam import Adam
from torchopt.optimizers.stages import optimizer
from torchopt.transform.base import transformation
from torchopt.transform.rule import Rule
from torchopt.typing import ScalarOrSchedule

__all__ = ["ScaleByAmsgradState", "amsgrad", "amsgradw", "scale_by_amsgrad"]


class ScaleByAmsgradState(NamedTuple):
    """`mu`, `nu`: moments; `nu_max`: largest second moment so far; `count`: steps of each leaf."""

    mu: Any
    nu: Any
    nu_max: Any
    count: Any


@dataclass(frozen=True)
class AMSGrad(Adam):
    """u = mu_hat / (sqrt(m' / (1 - b2^k) + eps_root) + eps), m' = max(m, nu')."""

    State: ClassVar[Any] = ScaleByAmsgradState
    kernel = "amsgrad"

    def apply(self, c: Any, g: Tensor, state: Any, p: Any) -> Any:
        mu = moving_average(state[0], g, self.b1)
        nu = moving_average(state[1], g * g, self.b2)
        nu_max = torch.maximum(state[2], nu)
        radicand = nu_max / c[1] + self.eps_root
        return divide_by_root(mu / c[0], radicand, self.eps), (mu, nu, nu_max)


@transformation
def scale_by_amsgrad(
    b1: float | Tensor = 0.9,
    b2: float | Tensor = 0.999,
    eps: float | Tensor = 1e-8,
) -> Rule:
    r"""Return the transformation that computes AMSGrad's direction.

    .. math::
        \hat\nu' = \max(\hat\nu, \nu'), \qquad
        u = \frac{\mu' / (1 - b_1^k)}{\sqrt{\hat\nu' / (1 - b_2^k)} + \epsilon}

    with Adam's moments. The corrections are those of torch.optim.Adam.

    References:
        S. J. Reddi, S. Kale, S. Kumar, On the Convergence of Adam and Beyond, 2018,
        https://arxiv.org/abs/1904.09237, Algorithm 2.
    """
    return AMSGrad(b1, b2, eps, 0.0)


@documented(scale_by_amsgrad)
def amsgrad(
    lr: ScalarOrSchedule = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """Return AMSGrad: Adam with the largest second moment so far."""
    direction = AMSGrad.from_betas(betas, eps)
    return optimizer(direction, lr=lr, weight_decay=weight_decay, maximize=maximize, name="amsgrad")


@documented(scale_by_amsgrad, weight_decay=DECOUPLED)
def amsgradw(
    lr: ScalarOrSchedule = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """Return AMSGrad with decoupled weight decay."""
    direction = AMSGrad.from_betas(betas, eps)
    return optimizer(
        direction, lr=lr, decoupled_weight_decay=weight_decay, maximize=maximize, name="amsgradw"
    )
