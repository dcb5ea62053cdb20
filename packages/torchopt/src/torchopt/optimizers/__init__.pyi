# SPDX-License-Identifier: Apache-2.0
# Written by tools/make_stubs.py; run it after a change instead of editing this file.
"""The optimizers, one per file: its state, its rule, the transformation `scale_by_x`, and `x`.

`torchopt.index` lists them.
"""

from torchopt.alias.adadelta import adadelta as adadelta
from torchopt.alias.adagrad import adagrad as adagrad
from torchopt.alias.adam import adam as adam
from torchopt.alias.adamax import adamax as adamax
from torchopt.alias.adamw import adamw as adamw
from torchopt.alias.radam import radam as radam
from torchopt.alias.rmsprop import rmsprop as rmsprop
from torchopt.alias.sgd import sgd as sgd
from torchopt.optimizers.adabelief import adabelief as adabelief
from torchopt.optimizers.adafactor import adafactor as adafactor
from torchopt.optimizers.adan import adan as adan
from torchopt.optimizers.ademamix import ademamix as ademamix
from torchopt.optimizers.adopt import adopt as adopt
from torchopt.optimizers.amsgrad import amsgrad as amsgrad, amsgradw as amsgradw
from torchopt.optimizers.asgd import asgd as asgd
from torchopt.optimizers.lamb import lamb as lamb
from torchopt.optimizers.lars import lars as lars
from torchopt.optimizers.lion import lion as lion
from torchopt.optimizers.mars import mars as mars
from torchopt.optimizers.muon import muon as muon
from torchopt.optimizers.nadam import nadam as nadam, nadamw as nadamw
from torchopt.optimizers.prodigy import prodigy as prodigy
from torchopt.optimizers.psgd import psgd as psgd
from torchopt.optimizers.rprop import rprop as rprop
from torchopt.optimizers.schedule_free import (
    schedule_free_adamw as schedule_free_adamw,
    schedule_free_sgd as schedule_free_sgd,
)
from torchopt.optimizers.schedule_free_radam import schedule_free_radam as schedule_free_radam
from torchopt.optimizers.shampoo import shampoo as shampoo
from torchopt.optimizers.signum import signum as signum
from torchopt.optimizers.soap import soap as soap
from torchopt.optimizers.sophia import sophia as sophia
from torchopt.optimizers.yogi import yogi as yogi

__all__ = [
    'adabelief', 'adadelta', 'adafactor', 'adagrad', 'adam', 'adamax', 'adamw', 'adan', 'ademamix',
    'adopt', 'amsgrad', 'amsgradw', 'asgd', 'lamb', 'lars', 'lion', 'mars', 'muon', 'nadam',
    'nadamw', 'prodigy', 'psgd', 'radam', 'rmsprop', 'rprop', 'schedule_free_adamw',
    'schedule_free_radam', 'schedule_free_sgd', 'sgd', 'shampoo', 'signum', 'soap', 'sophia',
    'yogi',
]
