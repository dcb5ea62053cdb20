# SPDX-License-Identifier: Apache-2.0
"""Adan as part of the graph; see `MetaOptimizer`."""

from __future__ import annotations

from torch import nn

from torchopt.alias.adan import adan
from torchopt.optim.meta.base import MetaOptimizer
from torchopt.typing import ScalarOrSchedule

__all__ = ["MetaAdan"]


class MetaAdan(MetaOptimizer):
    """Adan as part of the graph; see `MetaOptimizer`.

    Args:
        module: The module to step.

    The hyper-parameters are those of `torchopt.alias.adan`.

    Raises:
        ValueError: A hyper-parameter out of range.
    """

    def __init__(
        self,
        module: nn.Module,
        lr: ScalarOrSchedule = 1e-3,
        betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        first_order: bool = False,
        detach_every: int | None = None,
    ) -> None:
        super().__init__(
            module,
            adan(
                lr=lr,
                betas=betas,
                eps=eps,
                weight_decay=weight_decay,
                maximize=maximize,
            ),
            first_order=first_order,
            detach_every=detach_every,
        )
