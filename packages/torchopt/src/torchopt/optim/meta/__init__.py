# SPDX-License-Identifier: Apache-2.0
"""Optimizers that step a module as part of the graph."""

from __future__ import annotations

from torchopt.optim.meta.adabelief import MetaAdaBelief
from torchopt.optim.meta.adadelta import MetaAdaDelta, MetaAdadelta
from torchopt.optim.meta.adafactor import MetaAdafactor
from torchopt.optim.meta.adagrad import MetaAdaGrad, MetaAdagrad
from torchopt.optim.meta.adam import MetaAdam
from torchopt.optim.meta.adamax import MetaAdaMax, MetaAdamax
from torchopt.optim.meta.adamw import MetaAdamW
from torchopt.optim.meta.adan import MetaAdan
from torchopt.optim.meta.adopt import MetaADOPT
from torchopt.optim.meta.amsgrad import MetaAMSGrad
from torchopt.optim.meta.amsgradw import MetaAMSGradW
from torchopt.optim.meta.asgd import MetaASGD
from torchopt.optim.meta.base import MetaOptimizer
from torchopt.optim.meta.lamb import MetaLAMB
from torchopt.optim.meta.lars import MetaLARS
from torchopt.optim.meta.lion import MetaLion
from torchopt.optim.meta.muon import MetaMuon
from torchopt.optim.meta.nadam import MetaNAdam
from torchopt.optim.meta.nadamw import MetaNAdamW
from torchopt.optim.meta.radam import MetaRAdam
from torchopt.optim.meta.rmsprop import MetaRMSProp, MetaRMSprop
from torchopt.optim.meta.rprop import MetaRprop
from torchopt.optim.meta.schedule_free_adamw import MetaScheduleFreeAdamW
from torchopt.optim.meta.schedule_free_sgd import MetaScheduleFreeSGD
from torchopt.optim.meta.sgd import MetaSGD
from torchopt.optim.meta.shampoo import MetaShampoo
from torchopt.optim.meta.sophia import MetaSophia
from torchopt.optim.meta.yogi import MetaYogi

__all__ = [
    "MetaADOPT",
    "MetaAMSGrad",
    "MetaAMSGradW",
    "MetaASGD",
    "MetaAdaBelief",
    "MetaAdaDelta",
    "MetaAdaGrad",
    "MetaAdaMax",
    "MetaAdadelta",
    "MetaAdafactor",
    "MetaAdagrad",
    "MetaAdam",
    "MetaAdamW",
    "MetaAdamax",
    "MetaAdan",
    "MetaLAMB",
    "MetaLARS",
    "MetaLion",
    "MetaMuon",
    "MetaNAdam",
    "MetaNAdamW",
    "MetaOptimizer",
    "MetaRAdam",
    "MetaRMSProp",
    "MetaRMSprop",
    "MetaRprop",
    "MetaSGD",
    "MetaScheduleFreeAdamW",
    "MetaScheduleFreeSGD",
    "MetaShampoo",
    "MetaSophia",
    "MetaYogi",
]
