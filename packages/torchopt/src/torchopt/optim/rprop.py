# SPDX-License-Identifier: Apache-2.0
"""Rprop with the interface of torch.optim; see `Optimizer`."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from torchopt.alias.rprop import rprop
from torchopt.optim.base import Optimizer

__all__ = ["Rprop"]


class Rprop(Optimizer):
    """Rprop with the interface of torch.optim; see `Optimizer`.

    Args:
        params: Tensors, or a tree of them.

    The hyper-parameters are those of `torchopt.alias.rprop`.

    Raises:
        ValueError: A hyper-parameter out of range.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float | Tensor = 1e-2,
        etas: tuple[float, float] = (0.5, 1.2),
        step_sizes: tuple[float, float] = (1e-6, 50.0),
        *,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            rprop(
                lr=lr,
                etas=etas,
                step_sizes=step_sizes,
                maximize=maximize,
            ),
        )
