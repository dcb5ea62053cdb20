# SPDX-License-Identifier: Apache-2.0
"""Shampoo as part of the graph; see `MetaOptimizer`."""

from __future__ import annotations

from torch import nn

from torchopt.alias.shampoo import shampoo
from torchopt.optim.meta.base import MetaOptimizer
from torchopt.typing import ScalarOrSchedule

__all__ = ["MetaShampoo"]


class MetaShampoo(MetaOptimizer):
    """Shampoo as part of the graph; see `MetaOptimizer`.

    Args:
        module: The module to step.

    The hyper-parameters are those of `torchopt.alias.shampoo`.

    Raises:
        ValueError: A hyper-parameter out of range.
    """

    def __init__(
        self,
        module: nn.Module,
        lr: ScalarOrSchedule = 1e-1,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        eps: float = 0.0001,
        decay: float = 1.0,
        update_every: int = 1,
        max_size: int = 1024,
        *,
        maximize: bool = False,
        first_order: bool = False,
        detach_every: int | None = None,
    ) -> None:
        super().__init__(
            module,
            shampoo(
                lr=lr,
                momentum=momentum,
                weight_decay=weight_decay,
                eps=eps,
                decay=decay,
                update_every=update_every,
                max_size=max_size,
                maximize=maximize,
            ),
            first_order=first_order,
            detach_every=detach_every,
        )
