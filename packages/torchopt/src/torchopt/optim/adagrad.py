# SPDX-License-Identifier: Apache-2.0
"""AdaGrad with the interface of torch.optim; see `Optimizer`."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from torchopt.alias.adagrad import adagrad
from torchopt.optim.base import Optimizer
from torchopt.typing import ScalarOrSchedule

__all__ = ["AdaGrad", "Adagrad"]


class AdaGrad(Optimizer):
    """AdaGrad with the interface of torch.optim; see `Optimizer`.

    Args:
        params: Tensors, or a tree of them.

    The hyper-parameters are those of `torchopt.adagrad`; mind the defaults and the positional
    order, which are those of this class.

    Raises:
        ValueError: A hyper-parameter out of range.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: ScalarOrSchedule = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        *,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            adagrad(
                lr=lr,
                lr_decay=lr_decay,
                weight_decay=weight_decay,
                initial_accumulator_value=initial_accumulator_value,
                eps=eps,
                maximize=maximize,
            ),
        )


Adagrad = AdaGrad
