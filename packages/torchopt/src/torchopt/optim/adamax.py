# SPDX-License-Identifier: Apache-2.0
"""The published import path of `AdaMax`."""

from torchopt.optim import AdaMax, Adamax

__all__ = ["AdaMax", "Adamax"]
