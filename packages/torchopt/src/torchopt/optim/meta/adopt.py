# SPDX-License-Identifier: Apache-2.0
"""ADOPT as part of the graph; see `MetaOptimizer`."""

from __future__ import annotations

from torch import nn

from torchopt.alias.adopt import adopt
from torchopt.optim.meta.base import MetaOptimizer
from torchopt.typing import ScalarOrSchedule

__all__ = ["MetaADOPT"]


class MetaADOPT(MetaOptimizer):
    """ADOPT as part of the graph; see `MetaOptimizer`.

    Args:
        module: The module to step.

    The hyper-parameters are those of `torchopt.alias.adopt`.

    Raises:
        ValueError: A hyper-parameter out of range.
    """

    def __init__(
        self,
        module: nn.Module,
        lr: ScalarOrSchedule = 1e-3,
        betas: tuple[float, float] = (0.9, 0.9999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        first_order: bool = False,
        detach_every: int | None = None,
    ) -> None:
        super().__init__(
            module,
            adopt(
                lr=lr,
                betas=betas,
                eps=eps,
                weight_decay=weight_decay,
                maximize=maximize,
            ),
            first_order=first_order,
            detach_every=detach_every,
        )
