# SPDX-License-Identifier: Apache-2.0
"""Optimizers that step a module as part of the graph."""

from __future__ import annotations

from torchopt.optim.meta.adadelta import MetaAdaDelta, MetaAdadelta
from torchopt.optim.meta.adagrad import MetaAdaGrad, MetaAdagrad
from torchopt.optim.meta.adam import MetaAdam
from torchopt.optim.meta.adamax import MetaAdaMax, MetaAdamax
from torchopt.optim.meta.adamw import MetaAdamW
from torchopt.optim.meta.base import MetaOptimizer
from torchopt.optim.meta.radam import MetaRAdam
from torchopt.optim.meta.rmsprop import MetaRMSProp, MetaRMSprop
from torchopt.optim.meta.sgd import MetaSGD

__all__ = [
    "MetaAdaDelta",
    "MetaAdaGrad",
    "MetaAdaMax",
    "MetaAdadelta",
    "MetaAdagrad",
    "MetaAdam",
    "MetaAdamW",
    "MetaAdamax",
    "MetaOptimizer",
    "MetaRAdam",
    "MetaRMSProp",
    "MetaRMSprop",
    "MetaSGD",
]
