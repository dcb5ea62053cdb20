# SPDX-License-Identifier: Apache-2.0
"""Yogi as part of the graph; see `MetaOptimizer`."""

from __future__ import annotations

from torch import nn

from torchopt.alias.yogi import yogi
from torchopt.optim.meta.base import MetaOptimizer
from torchopt.typing import ScalarOrSchedule

__all__ = ["MetaYogi"]


class MetaYogi(MetaOptimizer):
    """Yogi as part of the graph; see `MetaOptimizer`.

    Args:
        module: The module to step.

    The hyper-parameters are those of `torchopt.alias.yogi`.

    Raises:
        ValueError: A hyper-parameter out of range.
    """

    def __init__(
        self,
        module: nn.Module,
        lr: ScalarOrSchedule = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 0.001,
        weight_decay: float = 0.0,
        initial_accumulator: float = 1e-6,
        *,
        maximize: bool = False,
        first_order: bool = False,
        detach_every: int | None = None,
    ) -> None:
        super().__init__(
            module,
            yogi(
                lr=lr,
                betas=betas,
                eps=eps,
                weight_decay=weight_decay,
                initial_accumulator=initial_accumulator,
                maximize=maximize,
            ),
            first_order=first_order,
            detach_every=detach_every,
        )
