# SPDX-License-Identifier: Apache-2.0
"""Signum: the sign of the momentum."""

from __future__ import annotations

from torchopt.base import GradientTransformation
from torchopt.documented import DECOUPLED, documented
from torchopt.optimizers.lion import Lion
from torchopt.optimizers.stages import optimizer
from torchopt.transform.validate import check
from torchopt.typing import ScalarOrSchedule

__all__ = ["signum"]


@documented(weight_decay=DECOUPLED)
def signum(
    lr: ScalarOrSchedule = 1e-4,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    r"""Return Signum; with a momentum of 0, signSGD.

    .. math::
        \mu' = b \mu + (1 - b) g, \qquad u = \mathrm{sign}(\mu')

    The update is -lr * (u + weight_decay * p). This is Lion with two equal decays, whose kernel it
    uses. The derivative of the sign is zero wherever it exists.

    Args:
        momentum: b, in [0, 1).

    References:
        J. Bernstein, Y. Wang, K. Azizzadenesheli, A. Anandkumar, signSGD: Compressed Optimisation
        for Non-Convex Problems, 2018, https://arxiv.org/abs/1802.04434, Algorithm 2.
    """
    check(momentum, "0 <= number < 1", "momentum value")
    direction = Lion(momentum, momentum)
    return optimizer(
        direction, lr=lr, decoupled_weight_decay=weight_decay, maximize=maximize, name="signum"
    )
