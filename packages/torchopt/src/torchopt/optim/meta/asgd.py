# SPDX-License-Identifier: Apache-2.0
"""ASGD as part of the graph; see `MetaOptimizer`."""

from __future__ import annotations

from torch import Tensor, nn

from torchopt.alias.asgd import asgd
from torchopt.optim.meta.base import MetaOptimizer

__all__ = ["MetaASGD"]


class MetaASGD(MetaOptimizer):
    """ASGD as part of the graph; see `MetaOptimizer`.

    Args:
        module: The module to step.

    The hyper-parameters are those of `torchopt.alias.asgd`.

    Raises:
        ValueError: A hyper-parameter out of range.
    """

    def __init__(
        self,
        module: nn.Module,
        lr: float | Tensor = 1e-2,
        lambd: float = 0.0001,
        alpha: float = 0.75,
        t0: float = 1000000.0,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        first_order: bool = False,
        detach_every: int | None = None,
    ) -> None:
        super().__init__(
            module,
            asgd(
                lr=lr,
                lambd=lambd,
                alpha=alpha,
                t0=t0,
                weight_decay=weight_decay,
                maximize=maximize,
            ),
            first_order=first_order,
            detach_every=detach_every,
        )
