# SPDX-License-Identifier: Apache-2.0
"""Rprop as part of the graph; see `MetaOptimizer`."""

from __future__ import annotations

from torch import Tensor, nn

from torchopt.alias.rprop import rprop
from torchopt.optim.meta.base import MetaOptimizer

__all__ = ["MetaRprop"]


class MetaRprop(MetaOptimizer):
    """Rprop as part of the graph; see `MetaOptimizer`.

    Args:
        module: The module to step.

    The hyper-parameters are those of `torchopt.alias.rprop`.

    Raises:
        ValueError: A hyper-parameter out of range.
    """

    def __init__(
        self,
        module: nn.Module,
        lr: float | Tensor = 1e-2,
        etas: tuple[float, float] = (0.5, 1.2),
        step_sizes: tuple[float, float] = (1e-6, 50.0),
        *,
        maximize: bool = False,
        first_order: bool = False,
        detach_every: int | None = None,
    ) -> None:
        super().__init__(
            module,
            rprop(
                lr=lr,
                etas=etas,
                step_sizes=step_sizes,
                maximize=maximize,
            ),
            first_order=first_order,
            detach_every=detach_every,
        )
