# SPDX-License-Identifier: Apache-2.0
"""Optimizers as gradient transformations."""

from __future__ import annotations

# First the modules of the published package, because the functions below replace their names.
from torchopt.alias import adadelta, adagrad, adam, adamax, adamw, radam, rmsprop, sgd, utils
from torchopt.index import OPTIMIZERS, exported

globals().update((name, exported()[name]) for name in OPTIMIZERS)

__all__ = sorted(OPTIMIZERS)  # noqa: PLE0605 - the names of the index
