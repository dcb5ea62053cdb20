# SPDX-License-Identifier: Apache-2.0
"""Sophia as part of the graph; see `MetaOptimizer`."""

from __future__ import annotations

from torch import nn

from torchopt.alias.sophia import sophia
from torchopt.optim.meta.base import MetaOptimizer
from torchopt.typing import ScalarOrSchedule

__all__ = ["MetaSophia"]


class MetaSophia(MetaOptimizer):
    """Sophia as part of the graph; see `MetaOptimizer`.

    Args:
        module: The module to step.

    The hyper-parameters are those of `torchopt.alias.sophia`.

    Raises:
        ValueError: A hyper-parameter out of range.
    """

    def __init__(
        self,
        module: nn.Module,
        lr: ScalarOrSchedule = 1e-4,
        betas: tuple[float, float] = (0.965, 0.99),
        rho: float = 0.04,
        weight_decay: float = 0.1,
        eps: float = 1e-15,
        batch_size: float = 1.0,
        update_every: int | None = 10,
        *,
        maximize: bool = False,
        first_order: bool = False,
        detach_every: int | None = None,
    ) -> None:
        super().__init__(
            module,
            sophia(
                lr=lr,
                betas=betas,
                rho=rho,
                weight_decay=weight_decay,
                eps=eps,
                batch_size=batch_size,
                update_every=update_every,
                maximize=maximize,
            ),
            first_order=first_order,
            detach_every=detach_every,
        )
