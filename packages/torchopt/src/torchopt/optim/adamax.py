# SPDX-License-Identifier: Apache-2.0
"""Where `AdaMax` was published."""

from torchopt.optim import AdaMax, Adamax

__all__ = ["AdaMax", "Adamax"]
