# SPDX-License-Identifier: Apache-2.0
"""Where `AdaDelta` was published."""

from torchopt.optim import AdaDelta, Adadelta

__all__ = ["AdaDelta", "Adadelta"]
