# SPDX-License-Identifier: Apache-2.0
"""LAMB: Adam with layer-wise trust ratios."""

from __future__ import annotations

from torchopt.base import GradientTransformation
from torchopt.documented import DECOUPLED, documented
from torchopt.optimizers.adam import Adam
from torchopt.optimizers.stages import optimizer
from torchopt.transform.add_decayed_weights import add_decayed_weights
from torchopt.transform.scale_by_trust_ratio import scale_by_trust_ratio
from torchopt.typing import ScalarOrSchedule

__all__ = ["lamb"]


@documented(weight_decay=DECOUPLED)
def lamb(
    lr: ScalarOrSchedule = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """Return LAMB: Adam with layer-wise trust ratios.

    The update is -lr * |p| / |u| * u, with u Adam's direction plus weight_decay * p.

    References:
        Y. You et al., Large Batch Optimization for Deep Learning, 2020,
        https://arxiv.org/abs/1904.00962, Algorithm 2.
    """
    return optimizer(
        Adam.from_betas(betas, eps),
        add_decayed_weights.rule(weight_decay),
        scale_by_trust_ratio.rule(),
        lr=lr,
        maximize=maximize,
        name="lamb",
    )
