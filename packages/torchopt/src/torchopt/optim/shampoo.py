# SPDX-License-Identifier: Apache-2.0
"""Shampoo with the interface of torch.optim; see `Optimizer`."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from torchopt.alias.shampoo import shampoo
from torchopt.optim.base import Optimizer
from torchopt.typing import ScalarOrSchedule

__all__ = ["Shampoo"]


class Shampoo(Optimizer):
    """Shampoo with the interface of torch.optim; see `Optimizer`.

    Args:
        params: Tensors, or a tree of them.

    The hyper-parameters are those of `torchopt.alias.shampoo`.

    Raises:
        ValueError: A hyper-parameter out of range.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: ScalarOrSchedule = 1e-1,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        eps: float = 0.0001,
        decay: float = 1.0,
        update_every: int = 1,
        max_size: int = 1024,
        *,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
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
        )
