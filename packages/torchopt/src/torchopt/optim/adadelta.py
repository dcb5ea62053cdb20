# SPDX-License-Identifier: Apache-2.0
"""The published import path of `AdaDelta`."""

from torchopt.optim import AdaDelta, Adadelta

__all__ = ["AdaDelta", "Adadelta"]
