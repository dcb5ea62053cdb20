# SPDX-License-Identifier: Apache-2.0
"""Meta-optimizers, which step a module as part of the graph.

The classes are made from the functions in `torchopt.alias`, one for each line of `torchopt.index`.
"""

from __future__ import annotations

from inspect import Parameter

from torchopt import alias
from torchopt.index import ALIASES, OPTIMIZERS
from torchopt.optim.from_function import Form, class_from
from torchopt.optim.meta.base import MetaOptimizer

__all__ = ["MetaOptimizer"]
__all__ += [f"Meta{c}" for c in (*OPTIMIZERS.values(), *ALIASES)]

_META = Form(
    MetaOptimizer,
    "torchopt.optim.meta",
    Parameter("module", Parameter.POSITIONAL_OR_KEYWORD, annotation="nn.Module"),
    "module: The module to step.",
    "{name} as part of the graph; see `MetaOptimizer`.",
    """\
>>> import torch, torchopt
>>> net = torch.nn.Linear(1, 1, bias=False)
>>> start = net.weight
>>> optimizer = torchopt.{name}(net, lr=0.1)
>>> optimizer.step(net.weight.square().sum())
>>> torch.autograd.grad(net.weight.sum(), start)[0].shape
torch.Size([1, 1])""",
)

for _f, _c in OPTIMIZERS.items():
    globals()[f"Meta{_c}"] = class_from(getattr(alias, _f), f"Meta{_c}", _META)
globals().update({f"Meta{other}": globals()[f"Meta{c}"] for other, c in ALIASES.items()})
