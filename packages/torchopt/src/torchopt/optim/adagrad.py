# SPDX-License-Identifier: Apache-2.0
"""Where `AdaGrad` was published."""

from torchopt.optim import AdaGrad, Adagrad

__all__ = ["AdaGrad", "Adagrad"]
