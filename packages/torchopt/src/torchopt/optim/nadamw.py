# SPDX-License-Identifier: Apache-2.0
"""NAdamW with the interface of torch.optim; see `Optimizer`."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from torchopt.alias.nadamw import nadamw
from torchopt.optim.base import Optimizer
from torchopt.typing import ScalarOrSchedule

__all__ = ["NAdamW"]


class NAdamW(Optimizer):
    """NAdamW with the interface of torch.optim; see `Optimizer`.

    Args:
        params: Tensors, or a tree of them.

    The hyper-parameters are those of `torchopt.alias.nadamw`.

    Raises:
        ValueError: A hyper-parameter out of range.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: ScalarOrSchedule = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        momentum_decay: float = 0.004,
        *,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            nadamw(
                lr=lr,
                betas=betas,
                eps=eps,
                weight_decay=weight_decay,
                momentum_decay=momentum_decay,
                maximize=maximize,
            ),
        )
