# SPDX-License-Identifier: Apache-2.0
"""Optimizers with the interface of torch.optim, and the functional and meta variants."""

from __future__ import annotations

from torchopt.optim.adadelta import AdaDelta, Adadelta
from torchopt.optim.adagrad import AdaGrad, Adagrad
from torchopt.optim.adam import Adam
from torchopt.optim.adamax import AdaMax, Adamax
from torchopt.optim.adamw import AdamW
from torchopt.optim.base import Optimizer
from torchopt.optim.func import FuncOptimizer
from torchopt.optim.radam import RAdam
from torchopt.optim.rmsprop import RMSProp, RMSprop
from torchopt.optim.sgd import SGD
from torchopt.optim.torch_optimizer import TorchOptimizer

__all__ = [
    "SGD",
    "AdaDelta",
    "AdaGrad",
    "AdaMax",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "FuncOptimizer",
    "Optimizer",
    "RAdam",
    "RMSProp",
    "RMSprop",
    "TorchOptimizer",
]
