# SPDX-License-Identifier: Apache-2.0
"""Adafactor as part of the graph; see `MetaOptimizer`."""

from __future__ import annotations

from torch import Tensor, nn

from torchopt.alias.adafactor import adafactor
from torchopt.optim.meta.base import MetaOptimizer

__all__ = ["MetaAdafactor"]


class MetaAdafactor(MetaOptimizer):
    """Adafactor as part of the graph; see `MetaOptimizer`.

    Args:
        module: The module to step.

    The hyper-parameters are those of `torchopt.alias.adafactor`.

    Raises:
        ValueError: A hyper-parameter out of range.
    """

    def __init__(
        self,
        module: nn.Module,
        lr: float | Tensor = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 0.001),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        first_order: bool = False,
        detach_every: int | None = None,
    ) -> None:
        super().__init__(
            module,
            adafactor(
                lr=lr,
                beta2_decay=beta2_decay,
                eps=eps,
                d=d,
                weight_decay=weight_decay,
                maximize=maximize,
            ),
            first_order=first_order,
            detach_every=detach_every,
        )
