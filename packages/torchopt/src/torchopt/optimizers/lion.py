# SPDX-License-Identifier: Apache-2.0
"""Lion: the sign of an interpolation between the gradient and its average."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from torchopt.base import GradientTransformation
from torchopt.documented import DECOUPLED, documented
from torchopt.kernels.reference.formulas import moving_average, sign
from torchopt.optimizers.stages import optimizer
from torchopt.transform.base import transformation_of
from torchopt.transform.rule import Hyper, Rule, fraction
from torchopt.typing import ScalarOrSchedule

__all__ = ["ScaleByLionState", "lion", "scale_by_lion"]


class ScaleByLionState(NamedTuple):
    """`mu`: moving average of the gradient."""

    mu: Any


@dataclass(frozen=True)
class Lion(Rule):
    """u = sign(b1 mu + (1 - b1) g), mu' = b2 mu + (1 - b2) g."""

    b1: Hyper = fraction("beta parameter at index 0", 0.9)
    b2: Hyper = fraction("beta parameter at index 1", 0.99)
    State = ScaleByLionState
    kernel = "lion"
    constant_derivative = True

    def apply(self, c: Any, g: Tensor, state: Any, p: Any) -> Any:
        (mu,) = state
        return sign(moving_average(mu, g, self.b1)), (moving_average(mu, g, self.b2),)


@transformation_of(Lion)
def scale_by_lion() -> None:
    r"""Return the transformation that computes Lion's direction.

    .. math::
        u = \mathrm{sign}(b_1 \mu + (1 - b_1) g), \qquad \mu' = b_2 \mu + (1 - b_2) g

    The derivative of the sign is zero wherever it exists. Where g is NaN, so is u.

    Args:
        b1: Weight of the average in the direction, in [0, 1).
        b2: Decay of the average, in [0, 1).

    References:
        X. Chen et al., Symbolic Discovery of Optimization Algorithms, 2023,
        https://arxiv.org/abs/2302.06675, Algorithm 2.
    """


@documented(scale_by_lion, weight_decay=DECOUPLED)
def lion(
    lr: ScalarOrSchedule = 1e-4,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """Return Lion."""
    direction = Lion.from_betas(betas)
    return optimizer(
        direction, lr=lr, decoupled_weight_decay=weight_decay, maximize=maximize, name="lion"
    )
