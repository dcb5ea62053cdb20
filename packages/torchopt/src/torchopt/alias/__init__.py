# SPDX-License-Identifier: Apache-2.0
"""Optimizers as gradient transformations."""

from __future__ import annotations

from torchopt.alias.adadelta import adadelta
from torchopt.alias.adagrad import adagrad
from torchopt.alias.adam import adam
from torchopt.alias.adamax import adamax
from torchopt.alias.adamw import adamw
from torchopt.alias.radam import radam
from torchopt.alias.rmsprop import rmsprop
from torchopt.alias.sgd import sgd

__all__ = ["adadelta", "adagrad", "adam", "adamax", "adamw", "radam", "rmsprop", "sgd"]
