# SPDX-License-Identifier: Apache-2.0
"""Optimizers as gradient transformations."""

from __future__ import annotations

from torchopt.alias.adabelief import adabelief
from torchopt.alias.adadelta import adadelta
from torchopt.alias.adafactor import adafactor
from torchopt.alias.adagrad import adagrad
from torchopt.alias.adam import adam
from torchopt.alias.adamax import adamax
from torchopt.alias.adamw import adamw
from torchopt.alias.adan import adan
from torchopt.alias.adopt import adopt
from torchopt.alias.amsgrad import amsgrad
from torchopt.alias.amsgradw import amsgradw
from torchopt.alias.asgd import asgd
from torchopt.alias.lamb import lamb
from torchopt.alias.lars import lars
from torchopt.alias.lion import lion
from torchopt.alias.muon import muon
from torchopt.alias.nadam import nadam
from torchopt.alias.nadamw import nadamw
from torchopt.alias.radam import radam
from torchopt.alias.rmsprop import rmsprop
from torchopt.alias.rprop import rprop
from torchopt.alias.schedule_free_adamw import schedule_free_adamw
from torchopt.alias.schedule_free_sgd import schedule_free_sgd
from torchopt.alias.sgd import sgd
from torchopt.alias.shampoo import shampoo
from torchopt.alias.sophia import sophia
from torchopt.alias.yogi import yogi
from torchopt.optimizers.ademamix import ademamix
from torchopt.optimizers.mars import mars
from torchopt.optimizers.prodigy import prodigy
from torchopt.optimizers.psgd import psgd
from torchopt.optimizers.signum import signum
from torchopt.optimizers.soap import soap

__all__ = [
    "adabelief",
    "adadelta",
    "adafactor",
    "adagrad",
    "adam",
    "adamax",
    "adamw",
    "adan",
    "ademamix",
    "adopt",
    "amsgrad",
    "amsgradw",
    "asgd",
    "lamb",
    "lars",
    "lion",
    "mars",
    "muon",
    "nadam",
    "nadamw",
    "prodigy",
    "psgd",
    "radam",
    "rmsprop",
    "rprop",
    "schedule_free_adamw",
    "schedule_free_sgd",
    "sgd",
    "shampoo",
    "signum",
    "soap",
    "sophia",
    "yogi",
]
