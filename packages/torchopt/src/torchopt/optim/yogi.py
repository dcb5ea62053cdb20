# SPDX-License-Identifier: Apache-2.0
"""Yogi with the interface of torch.optim; see `Optimizer`."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from torchopt.alias.yogi import yogi
from torchopt.optim.base import Optimizer
from torchopt.typing import ScalarOrSchedule

__all__ = ["Yogi"]


class Yogi(Optimizer):
    """Yogi with the interface of torch.optim; see `Optimizer`.

    Args:
        params: Tensors, or a tree of them.

    The hyper-parameters are those of `torchopt.alias.yogi`.

    Raises:
        ValueError: A hyper-parameter out of range.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: ScalarOrSchedule = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 0.001,
        weight_decay: float = 0.0,
        initial_accumulator: float = 1e-6,
        *,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            yogi(
                lr=lr,
                betas=betas,
                eps=eps,
                weight_decay=weight_decay,
                initial_accumulator=initial_accumulator,
                maximize=maximize,
            ),
        )
