# SPDX-License-Identifier: Apache-2.0
"""LARS as part of the graph; see `MetaOptimizer`."""

from __future__ import annotations

from torch import nn

from torchopt.alias.lars import lars
from torchopt.optim.meta.base import MetaOptimizer
from torchopt.typing import ScalarOrSchedule

__all__ = ["MetaLARS"]


class MetaLARS(MetaOptimizer):
    """LARS as part of the graph; see `MetaOptimizer`.

    Args:
        module: The module to step.

    The hyper-parameters are those of `torchopt.alias.lars`.

    Raises:
        ValueError: A hyper-parameter out of range.
    """

    def __init__(
        self,
        module: nn.Module,
        lr: ScalarOrSchedule = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        eps: float = 0.0,
        *,
        nesterov: bool = False,
        maximize: bool = False,
        first_order: bool = False,
        detach_every: int | None = None,
    ) -> None:
        super().__init__(
            module,
            lars(
                lr=lr,
                momentum=momentum,
                weight_decay=weight_decay,
                trust_coefficient=trust_coefficient,
                eps=eps,
                nesterov=nesterov,
                maximize=maximize,
            ),
            first_order=first_order,
            detach_every=detach_every,
        )
