# SPDX-License-Identifier: Apache-2.0
"""LARS: momentum SGD with layer-wise trust ratios."""

from __future__ import annotations

from torchopt.base import GradientTransformation
from torchopt.documented import documented
from torchopt.optimizers.sgd import trace
from torchopt.optimizers.stages import optimizer
from torchopt.transform.scale_by_trust_ratio import scale_by_trust_ratio
from torchopt.typing import ScalarOrSchedule

__all__ = ["lars"]


@documented()
def lars(
    lr: ScalarOrSchedule = 1.0,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    trust_coefficient: float = 1e-3,
    eps: float = 0.0,
    *,
    nesterov: bool = False,
    maximize: bool = False,
) -> GradientTransformation:
    """Return LARS: momentum SGD with layer-wise trust ratios.

    The update is -lr times the decaying sum of trust_coefficient * |p| / |u| * u, with
    u = g + weight_decay * p. The paper has |g| + weight_decay |p| instead of |u|.

    Args:
        momentum: Decay of the sum, >= 0.
        trust_coefficient: Norm of a step relative to the norm of its parameter, >= 0.
        eps: Added to the norm of u, >= 0.
        nesterov: Use Nesterov's correction.

    References:
        Y. You, I. Gitman, B. Ginsburg, Large Batch Training of Convolutional Networks, 2017,
        https://arxiv.org/abs/1708.03888, Algorithm 1.
    """
    return optimizer(
        scale_by_trust_ratio.rule(trust_coefficient, eps),
        trace.rule(momentum, 0.0, nesterov),
        lr=lr,
        weight_decay=weight_decay,
        maximize=maximize,
        name="lars",
    )
