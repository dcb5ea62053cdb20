# SPDX-License-Identifier: Apache-2.0
"""The index of optimizers: one line each, the function and the name of its classes.

`torchopt.lion`, `torchopt.Lion` and `torchopt.MetaLion` are made from the line of `lion`. After a
change, `python tools/make_stubs.py` writes what type checkers read.
"""

from __future__ import annotations

__all__ = ["ALIASES", "OPTIMIZERS"]

OPTIMIZERS = {
    "adabelief": "AdaBelief",
    "adadelta": "AdaDelta",
    "adafactor": "Adafactor",
    "adagrad": "AdaGrad",
    "adam": "Adam",
    "adamax": "AdaMax",
    "adamw": "AdamW",
    "adan": "Adan",
    "ademamix": "AdEMAMix",
    "adopt": "ADOPT",
    "amsgrad": "AMSGrad",
    "amsgradw": "AMSGradW",
    "asgd": "ASGD",
    "lamb": "LAMB",
    "lars": "LARS",
    "lion": "Lion",
    "mars": "MARS",
    "muon": "Muon",
    "nadam": "NAdam",
    "nadamw": "NAdamW",
    "prodigy": "Prodigy",
    "psgd": "PSGD",
    "radam": "RAdam",
    "rmsprop": "RMSProp",
    "rprop": "Rprop",
    "schedule_free_adamw": "ScheduleFreeAdamW",
    "schedule_free_sgd": "ScheduleFreeSGD",
    "sgd": "SGD",
    "shampoo": "Shampoo",
    "signum": "Signum",
    "soap": "SOAP",
    "sophia": "Sophia",
    "yogi": "Yogi",
}

ALIASES = {
    "Adadelta": "AdaDelta",
    "Adagrad": "AdaGrad",
    "Adamax": "AdaMax",
    "RMSprop": "RMSProp",
}
"""Second names of classes, as torch.optim writes them."""
