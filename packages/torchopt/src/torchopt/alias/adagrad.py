# SPDX-License-Identifier: Apache-2.0
"""See `torchopt.optimizers.adagrad`."""

from torchopt.optimizers.adagrad import _adagrad_lr_schedule as _adagrad_lr_schedule
from torchopt.optimizers.adagrad import adagrad

__all__ = ["adagrad"]
