# SPDX-License-Identifier: Apache-2.0
"""AdaDelta with the interface of torch.optim; see `Optimizer`."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from torchopt.alias.adadelta import adadelta
from torchopt.optim.base import Optimizer
from torchopt.typing import ScalarOrSchedule

__all__ = ["AdaDelta", "Adadelta"]


class AdaDelta(Optimizer):
    """AdaDelta with the interface of torch.optim; see `Optimizer`.

    Args:
        params: Tensors, or a tree of them.

    The hyper-parameters are those of `torchopt.adadelta`; mind the defaults and the positional
    order, which are those of this class.

    Raises:
        ValueError: A hyper-parameter out of range.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: ScalarOrSchedule = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(
            params,
            adadelta(
                lr=lr,
                rho=rho,
                eps=eps,
                weight_decay=weight_decay,
            ),
        )


Adadelta = AdaDelta
