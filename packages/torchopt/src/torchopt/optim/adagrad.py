# SPDX-License-Identifier: Apache-2.0
"""Where `AdaGrad` was published."""

from __future__ import annotations

from torchopt.optim import AdaGrad, Adagrad

__all__ = ["AdaGrad", "Adagrad"]
