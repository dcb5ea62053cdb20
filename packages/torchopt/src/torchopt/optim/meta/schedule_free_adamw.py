# SPDX-License-Identifier: Apache-2.0
"""Schedule-free AdamW as part of the graph; see `MetaOptimizer`."""

from __future__ import annotations

from torch import Tensor, nn

from torchopt.alias.schedule_free_adamw import schedule_free_adamw
from torchopt.optim.meta.base import MetaOptimizer

__all__ = ["MetaScheduleFreeAdamW"]


class MetaScheduleFreeAdamW(MetaOptimizer):
    """Schedule-free AdamW as part of the graph; see `MetaOptimizer`.

    Args:
        module: The module to step.

    The hyper-parameters are those of `torchopt.alias.schedule_free_adamw`.

    Raises:
        ValueError: A hyper-parameter out of range.
    """

    def __init__(
        self,
        module: nn.Module,
        lr: float | Tensor = 2.5e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        *,
        maximize: bool = False,
        first_order: bool = False,
        detach_every: int | None = None,
    ) -> None:
        super().__init__(
            module,
            schedule_free_adamw(
                lr=lr,
                betas=betas,
                eps=eps,
                weight_decay=weight_decay,
                warmup_steps=warmup_steps,
                maximize=maximize,
            ),
            first_order=first_order,
            detach_every=detach_every,
        )
