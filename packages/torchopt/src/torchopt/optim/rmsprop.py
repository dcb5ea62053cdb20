# SPDX-License-Identifier: Apache-2.0
"""RMSProp with the interface of torch.optim; see `Optimizer`."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from torchopt.alias.rmsprop import rmsprop
from torchopt.optim.base import Optimizer
from torchopt.typing import ScalarOrSchedule

__all__ = ["RMSProp", "RMSprop"]


class RMSProp(Optimizer):
    """RMSProp with the interface of torch.optim; see `Optimizer`.

    Args:
        params: Tensors, or a tree of them.

    The hyper-parameters are those of `torchopt.rmsprop`; mind the defaults and the positional
    order, which are those of this class.

    Raises:
        ValueError: A hyper-parameter out of range.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: ScalarOrSchedule = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        *,
        initial_scale: float = 0.0,
        nesterov: bool = False,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            rmsprop(
                lr=lr,
                alpha=alpha,
                eps=eps,
                weight_decay=weight_decay,
                momentum=momentum,
                centered=centered,
                initial_scale=initial_scale,
                nesterov=nesterov,
                maximize=maximize,
            ),
        )


RMSprop = RMSProp
