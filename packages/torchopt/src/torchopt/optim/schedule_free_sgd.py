# SPDX-License-Identifier: Apache-2.0
"""Schedule-free SGD with the interface of torch.optim; see `Optimizer`."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from torchopt.alias.schedule_free_sgd import schedule_free_sgd
from torchopt.optim.base import Optimizer

__all__ = ["ScheduleFreeSGD"]


class ScheduleFreeSGD(Optimizer):
    """Schedule-free SGD with the interface of torch.optim; see `Optimizer`.

    Args:
        params: Tensors, or a tree of them.

    The hyper-parameters are those of `torchopt.alias.schedule_free_sgd`.

    Raises:
        ValueError: A hyper-parameter out of range.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float | Tensor = 1.0,
        beta: float = 0.9,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        *,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            schedule_free_sgd(
                lr=lr,
                beta=beta,
                weight_decay=weight_decay,
                warmup_steps=warmup_steps,
                maximize=maximize,
            ),
        )
