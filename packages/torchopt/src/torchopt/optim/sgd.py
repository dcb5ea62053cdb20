# SPDX-License-Identifier: Apache-2.0
"""SGD with the interface of torch.optim; see `Optimizer`."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from torchopt.alias.sgd import sgd
from torchopt.optim.base import Optimizer
from torchopt.typing import ScalarOrSchedule

__all__ = ["SGD"]


class SGD(Optimizer):
    """SGD with the interface of torch.optim; see `Optimizer`.

    Args:
        params: Tensors, or a tree of them.

    The hyper-parameters are those of `torchopt.sgd`; mind the defaults and the positional order,
    which are those of this class.

    Raises:
        ValueError: A hyper-parameter out of range.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: ScalarOrSchedule,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        dampening: float = 0.0,
        nesterov: bool = False,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            sgd(
                lr=lr,
                momentum=momentum,
                weight_decay=weight_decay,
                dampening=dampening,
                nesterov=nesterov,
                maximize=maximize,
            ),
        )
