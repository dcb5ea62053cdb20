# SPDX-License-Identifier: Apache-2.0
"""Optimizers with the interface of torch.optim, and the functional and meta-optimizers.

The classes are made from the functions in `torchopt.alias`, one for each line of `torchopt.index`.
"""

from __future__ import annotations

from inspect import Parameter

from torchopt import alias
from torchopt.index import ALIASES, OPTIMIZERS
from torchopt.optim.base import Optimizer
from torchopt.optim.from_function import Form, class_from
from torchopt.optim.func import FuncOptimizer
from torchopt.optim.torch_optimizer import TorchOptimizer

__all__ = ["FuncOptimizer", "Optimizer", "TorchOptimizer"]
__all__ += [*OPTIMIZERS.values(), *ALIASES]  # noqa: PLE0604

_CLASSIC = Form(
    Optimizer,
    "torchopt.optim",
    Parameter("params", Parameter.POSITIONAL_OR_KEYWORD, annotation="Iterable[Tensor]"),
    "params: Tensors, or a tree of them.",
    "{name} with the interface of torch.optim; see `Optimizer`.",
    """\
>>> import torch, torchopt
>>> p = torch.tensor([[3.0]], requires_grad=True)
>>> optimizer = torchopt.{name}([p], lr=0.1)
>>> for _ in range(8):
...     optimizer.zero_grad()
...     p.square().sum().backward()
...     optimizer.step()
>>> p.item() < 3.0
True""",
    dropped="moment_requires_grad",
)

globals().update({c: class_from(getattr(alias, f), c, _CLASSIC) for f, c in OPTIMIZERS.items()})
globals().update({other: globals()[c] for other, c in ALIASES.items()})
