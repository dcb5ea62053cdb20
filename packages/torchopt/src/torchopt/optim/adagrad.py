# SPDX-License-Identifier: Apache-2.0
"""The published import path of `AdaGrad`."""

from torchopt.optim import AdaGrad, Adagrad

__all__ = ["AdaGrad", "Adagrad"]
