# SPDX-License-Identifier: Apache-2.0
"""See `torchopt.optimizers.adadelta`."""

from torchopt.optimizers.adadelta import adadelta

__all__ = ["adadelta"]
