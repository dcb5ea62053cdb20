# SPDX-License-Identifier: Apache-2.0
"""Optimizers with the interface of torch.optim, and the functional and meta variants."""

from __future__ import annotations

from torchopt.optim.adabelief import AdaBelief
from torchopt.optim.adadelta import AdaDelta, Adadelta
from torchopt.optim.adafactor import Adafactor
from torchopt.optim.adagrad import AdaGrad, Adagrad
from torchopt.optim.adam import Adam
from torchopt.optim.adamax import AdaMax, Adamax
from torchopt.optim.adamw import AdamW
from torchopt.optim.adan import Adan
from torchopt.optim.adopt import ADOPT
from torchopt.optim.amsgrad import AMSGrad
from torchopt.optim.amsgradw import AMSGradW
from torchopt.optim.asgd import ASGD
from torchopt.optim.base import Optimizer
from torchopt.optim.func import FuncOptimizer
from torchopt.optim.lamb import LAMB
from torchopt.optim.lars import LARS
from torchopt.optim.lion import Lion
from torchopt.optim.muon import Muon
from torchopt.optim.nadam import NAdam
from torchopt.optim.nadamw import NAdamW
from torchopt.optim.radam import RAdam
from torchopt.optim.rmsprop import RMSProp, RMSprop
from torchopt.optim.rprop import Rprop
from torchopt.optim.schedule_free_adamw import ScheduleFreeAdamW
from torchopt.optim.schedule_free_sgd import ScheduleFreeSGD
from torchopt.optim.sgd import SGD
from torchopt.optim.shampoo import Shampoo
from torchopt.optim.sophia import Sophia
from torchopt.optim.torch_optimizer import TorchOptimizer
from torchopt.optim.yogi import Yogi

__all__ = [
    "ADOPT",
    "ASGD",
    "LAMB",
    "LARS",
    "SGD",
    "AMSGrad",
    "AMSGradW",
    "AdaBelief",
    "AdaDelta",
    "AdaGrad",
    "AdaMax",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Adan",
    "FuncOptimizer",
    "Lion",
    "Muon",
    "NAdam",
    "NAdamW",
    "Optimizer",
    "RAdam",
    "RMSProp",
    "RMSprop",
    "Rprop",
    "ScheduleFreeAdamW",
    "ScheduleFreeSGD",
    "Shampoo",
    "Sophia",
    "TorchOptimizer",
    "Yogi",
]
