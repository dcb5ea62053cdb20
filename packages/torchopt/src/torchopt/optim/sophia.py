# SPDX-License-Identifier: Apache-2.0
"""Sophia with the interface of torch.optim; see `Optimizer`."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from torchopt.alias.sophia import sophia
from torchopt.optim.base import Optimizer
from torchopt.typing import ScalarOrSchedule

__all__ = ["Sophia"]


class Sophia(Optimizer):
    """Sophia with the interface of torch.optim; see `Optimizer`.

    Args:
        params: Tensors, or a tree of them.

    The hyper-parameters are those of `torchopt.alias.sophia`.

    Raises:
        ValueError: A hyper-parameter out of range.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: ScalarOrSchedule = 1e-4,
        betas: tuple[float, float] = (0.965, 0.99),
        rho: float = 0.04,
        weight_decay: float = 0.1,
        eps: float = 1e-15,
        batch_size: float = 1.0,
        update_every: int | None = 10,
        *,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
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
        )
